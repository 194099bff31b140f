"""How a setting is declared: a field of a record, with all that others must know of it."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar, get_type_hints

from coconut_serve.errors import require


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a field's declaration says beyond its type and default."""

    doc: str
    low: float | None = None
    high: float | None = None
    is_open: bool = False  # `low` itself is outside
    paper: str = ""  # where the setting comes from
    asked: str | None = None  # its dotted name in `reasoning`, or its name in a request's body
    blame: str | None = None  # what a request names that leads to it, if it is not asked for itself
    takes: Any = None  # its type in a request, where that differs from the field's
    usual: str = ""  # the default in words, where no single value is
    also: float | None = None  # a request may say this for the default, as vLLM's -1 for "all"
    least: float | None = None  # what a request may say at least, where `low` says "off"
    shortest: int = 0  # how many a list must hold
    longest: int | None = None  # how many it may
    has_tokens: bool = False  # holds token ids
    is_column: bool = False  # of a list: engines keep it beside numbers, `longest` wide
    is_set: bool = False  # of a list: naming an item twice is naming it once
    type: Any = None  # of the field
    default: Any = None  # of the field

    def complaint(self, value: Any) -> str:
        """What is wrong with a value; empty if nothing is."""
        if isinstance(value, list | tuple):
            if self.longest is not None and len(value) > self.longest:
                return f"takes at most {self.longest}"
            return "must not be empty" if len(value) < self.shortest else ""
        if self.low is None or self.high is None:
            return ""
        is_inside = self.low <= value <= self.high and not (self.is_open and value == self.low)
        return "" if is_inside else f"must be {self.range}"

    def check(self, value: Any, param: str) -> None:
        """Raise InvalidRequestError naming `param` if something is wrong with the value."""
        text = self.complaint(value)
        require(not text, param, text)

    @property
    def unsaid(self) -> Any:
        """The default in a request: a word it may say, None where it depends on others."""
        word = self.usual if self.usual in _WORDS else None
        return word if self.usual else self.default

    @property
    def range(self) -> str:
        """The range in words; empty if the setting has none."""
        if self.low is None or self.high is None:
            return ""
        low, high = f"{self.low:.10g}", f"{self.high:.10g}"
        if self.is_open:
            return f"above {low} and at most {high}"
        if self.high >= MAX_INT:
            return f"at least {low}" if self.low > -MAX_INT else "a 64-bit integer"
        return f"in {low}..{high}"


MAX_INT = 2**31 - 1
_WORDS = ("auto", "none")  # defaults in words that a request may say too
_KEY = "setting"


def setting(
    default: Any,
    doc: str,
    within: tuple[float, float] | None = None,
    *,
    asked: str | None = "",
    is_shown: bool = True,
    **more: Any,
) -> Any:
    """Declare a field of a record.

    Args:
        default: The value where nobody says otherwise; a class: made by calling it.
        doc: One line for people.
        within: The closed range of a number.
        asked: The name in a request; "": that of the field, None: no request sets it.
        is_shown: Whether the record's text has it.
        more: Other fields of Setting.
    """
    low, high = within or (None, None)
    own = Setting(doc=doc, low=low, high=high, asked=asked, **more)
    made: dict[str, Any] = {"default_factory" if isinstance(default, type) else "default": default}
    return field(**made, repr=is_shown, metadata={_KEY: own})


internal = functools.partial(setting, asked=None)  # what no request sets by itself


class Declared:
    """Base of the records: every field is a setting."""

    path: ClassVar[str] = ""  # in front of the names in a request
    __slots__ = ()

    def check_ranges(self) -> None:
        """Raise InvalidRequestError naming the first number that is out of range."""
        for name, own in settings_of(type(self)).items():
            if own.low is not None or own.longest is not None:
                own.check(getattr(self, name), self.path + (own.asked or own.blame or name))


def settings_of(kind: Any) -> Mapping[str, Setting]:
    """The declarations of a record's fields, by field; each with its type and default."""
    return _settings(kind)


@functools.cache
def _settings(kind: Any) -> Mapping[str, Setting]:
    hints = get_type_hints(kind)
    found: dict[str, Setting] = {}
    for each in fields(kind):
        own: Setting = each.metadata[_KEY]
        default = None if each.default is MISSING else each.default
        asked = each.name if own.asked == "" else own.asked
        found[each.name] = replace(own, asked=asked, type=hints[each.name], default=default)
    return found


@functools.cache
def names_of(kind: Any) -> Mapping[str, str]:
    """The dotted names of a record's fields among the settings of a request, by field."""
    prefix = kind.path.removeprefix("reasoning.")
    return {field: f"{prefix}{own.asked or field}" for field, own in _settings(kind).items()}


def token_ids(record: Declared) -> Iterator[tuple[str, tuple[int, ...]]]:
    """All token ids in a record and the records in it, by the field of a request behind them.

    -1 stands for a token that the model does not have, and is left out.
    """
    for name, own in settings_of(type(record)).items():
        value = getattr(record, name)
        if isinstance(value, Declared):
            yield from token_ids(value)
        elif own.has_tokens and value is not None:
            ids = (value,) if isinstance(value, int) else value
            blame = own.asked or own.blame
            where = record.path + blame if blame else record.path.removesuffix(".")
            yield where, tuple(token_id for token_id in ids if token_id != -1)


_R = TypeVar("_R", bound=Declared)


def map_token_ids(record: _R, change: Callable[[int], int]) -> _R:
    """The same record with every token id in it changed; records in it too."""
    changed: dict[str, Any] = {}
    for name, own in settings_of(type(record)).items():
        value = getattr(record, name)
        if isinstance(value, Declared):
            changed[name] = map_token_ids(value, change)
        elif own.has_tokens and value is not None:
            is_one = isinstance(value, int)
            changed[name] = change(value) if is_one else tuple(map(change, value))
    return replace(record, **changed)  # type: ignore[type-var]  # each subclass is a dataclass

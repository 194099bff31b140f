"""Settings as record fields that declare their range, documentation and name in a request."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar, get_type_hints

from coconut_serve.errors import require


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a declaration adds to a field, together with the field's type and default."""

    doc: str
    low: float | None = None
    high: float | None = None
    is_open: bool = False  # `low` itself is excluded
    paper: str = ""  # arXiv id of its source
    asked: str | None = None  # its dotted name under `reasoning`, or its name in the request body
    blame: str | None = None  # the request field behind it, for errors, if it has no own name
    takes: Any = None  # its type in a request, if not the field's
    usual: str = ""  # the default in words, if it is no single value
    also: float | None = None  # a request may send this for the default, like vLLM's -1 for all
    least: float | None = None  # smallest value in a request, if `low` means off
    shortest: int = 0  # minimum length of a list
    longest: int | None = None  # maximum length of a list
    has_tokens: bool = False  # holds token ids
    is_column: bool = False  # of a list: engines store it as a column, `longest` wide
    is_set: bool = False  # of a list: duplicates count once
    type: Any = None  # of the field
    default: Any = None  # of the field

    def complaint(self, value: Any) -> str:
        """Say what is wrong with a value; empty if nothing is."""
        if isinstance(value, list | tuple):
            if self.longest is not None and len(value) > self.longest:
                return f"takes at most {self.longest}"
            return "must not be empty" if len(value) < self.shortest else ""
        if self.low is None or self.high is None:
            return ""
        is_inside = self.low <= value <= self.high and not (self.is_open and value == self.low)
        return "" if is_inside else f"must be {self.range}"

    def check(self, value: Any, param: str) -> None:
        """Raise InvalidRequestError naming `param` if the value is invalid."""
        text = self.complaint(value)
        require(not text, param, text)

    @property
    def unsaid(self) -> Any:
        """The default in a request: a value, a word, or None if other settings determine it."""
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
_WORDS = ("auto", "none")  # defaults in words that a request may send too
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
        default: The default value; a class is called to make it.
        doc: One line of user documentation.
        within: The closed range of a number.
        asked: The name in a request; "": the field's name, None: no request sets it.
        is_shown: Whether repr() includes it.
        more: Other fields of Setting.
    """
    low, high = within or (None, None)
    own = Setting(doc=doc, low=low, high=high, asked=asked, **more)
    made: dict[str, Any] = {"default_factory" if isinstance(default, type) else "default": default}
    return field(**made, repr=is_shown, metadata={_KEY: own})


internal = functools.partial(setting, asked=None)  # no request sets it directly


class Declared:
    """Base of records in which every field is a setting."""

    path: ClassVar[str] = ""  # prefix of the names in a request
    __slots__ = ()

    def check_ranges(self) -> None:
        """Raise InvalidRequestError naming the first setting that is out of range."""
        for name, own in settings_of(type(self)).items():
            if own.low is not None or own.longest is not None:
                own.check(getattr(self, name), self.path + (own.asked or own.blame or name))


def settings_of(kind: Any) -> Mapping[str, Setting]:
    """Return a record's declarations by field, each with its type and default."""
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
    """Map each field of a record to its dotted name under `reasoning`."""
    prefix = kind.path.removeprefix("reasoning.")
    return {field: f"{prefix}{own.asked or field}" for field, own in _settings(kind).items()}


def token_ids(record: Declared) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the token ids in a record and its nested records, by the request field behind them.

    Skips -1, which stands for a token that the model lacks.
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
    """Apply `change` to every token id in a record and its nested records."""
    changed: dict[str, Any] = {}
    for name, own in settings_of(type(record)).items():
        value = getattr(record, name)
        if isinstance(value, Declared):
            changed[name] = map_token_ids(value, change)
        elif own.has_tokens and value is not None:
            is_one = isinstance(value, int)
            changed[name] = change(value) if is_one else tuple(map(change, value))
    return replace(record, **changed)  # type: ignore[type-var]  # each subclass is a dataclass

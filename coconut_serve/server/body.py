"""Building blocks of request bodies: strict types, and fields made from settings."""

import functools
import operator
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from coconut_serve.declare import MAX_INT, Setting

MAX_ENTRIES = 1024  # of an object that maps names to values


def _strict_number(value: object) -> object:
    """Accept 1 as 1.0, but neither "1" nor true."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return value


def _bounded(value: object) -> object:
    """Reject a huge object before validating each of its values."""
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise ValueError(f"takes at most {MAX_ENTRIES}")
    return value


T = TypeVar("T")
V = TypeVar("V")
# Stops at the first wrong item: a million errors take seconds, and a gigabyte.
Items = Annotated[list[T], Field(fail_fast=True)]
Values = Annotated[dict[str, V], BeforeValidator(_bounded), Field(max_length=MAX_ENTRIES)]
Number = Annotated[float, BeforeValidator(_strict_number)]


class Body(BaseModel):
    """An object of a request. Unknown fields are kept, to be reported."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


def say(text: str, **options: Any) -> Any:
    """An optional field with its description in /openapi.json."""
    return Field(default=None, description=text, **options)


def body_of(
    name: str,
    about: str,
    settings: Mapping[str, Setting],
    examples: Mapping[str, list[str]] | None = None,
    **objects: type[Body],
) -> Any:
    """Make a body whose fields are settings.

    Args:
        name: What the schema calls it.
        about: Its description.
        settings: Its fields.
        examples: Example values, by field.
        objects: Fields that are bodies themselves.

    Returns:
        The class, as Any: type checkers do not know classes made at run time.
    """
    shown = examples or {}
    made: dict[str, Any] = {
        field: (request_type(own) | None, _declared(own, shown.get(field)))
        for field, own in settings.items()
    }
    made |= {field: (body | None, say(str(body.__doc__))) for field, body in objects.items()}
    return create_model(name, __base__=Body, __doc__=about, **made)


def _declared(own: Setting, examples: list[str] | None) -> Any:
    """The field of a setting, with the range that its type checks."""
    bounds: dict[str, Any] = {}
    if own.low is not None and own.high is not None:
        least = own.low if own.also is None else min(own.also, own.low)
        bounds = {"exclusiveMinimum" if own.is_open else "minimum": least}
        bounds |= {"maximum": own.high} if own.high < MAX_INT else {}
    return say(own.doc, examples=examples, json_schema_extra=bounds or None)


def request_type(own: Setting) -> Any:
    """The type of a setting in a request, which checks its range."""
    kind = _strict(own.type if own.takes is None else own.takes)
    if own.low is None and own.longest is None and not own.shortest:
        return kind

    def check(value: Any) -> Any:
        if own.also is not None and value == own.also:
            return own.default
        if text := own.complaint(value):
            raise ValueError(text)
        return value

    return Annotated[kind, AfterValidator(check)]


def _strict(kind: Any) -> Any:
    """The strict form of a type: 1 is a number, "1" and true are not; lists fail fast."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is float:
        return Number
    if origin in (list, tuple):
        item = _strict(parts[0])
        return Annotated[list[item], Field(fail_fast=True)]  # type: ignore[valid-type]
    if origin in (UnionType, Union):
        return functools.reduce(operator.or_, map(_strict, parts))
    return kind

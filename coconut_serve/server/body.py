"""What the parts of request bodies are made of: strict types, and ranges that the schema tells."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.annotated_handlers import GetJsonSchemaHandler
from pydantic_core import CoreSchema

MAX_ENTRIES = 1024  # of an object that maps names to values


def _strict_number(value: object) -> object:
    """Take 1 for 1.0, but neither "1" nor true."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return value


def _bounded(value: object) -> object:
    """Refuse a huge object before each of its values is complained of."""
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise ValueError(f"takes at most {MAX_ENTRIES}")
    return value


T = TypeVar("T")
V = TypeVar("V")
# The first wrong item is enough: a million complaints take seconds, and a gigabyte.
Items = Annotated[list[T], Field(fail_fast=True)]
Values = Annotated[dict[str, V], BeforeValidator(_bounded), Field(max_length=MAX_ENTRIES)]
Number = Annotated[float, BeforeValidator(_strict_number)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
# Bounds come before the validator: behind it they would hold, but be in no schema.
Temperature = Annotated[float, Field(ge=0, le=2), BeforeValidator(_strict_number)]
TopP = Annotated[float, Field(gt=0, le=1), BeforeValidator(_strict_number)]
TopK = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(lambda k: max(0, k))]  # -1: all, too
MinP = Annotated[float, Field(ge=0, le=1), BeforeValidator(_strict_number)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=2), BeforeValidator(_strict_number)]
Penalty = Annotated[float, Field(ge=-2, le=2), BeforeValidator(_strict_number)]


class Body(BaseModel):
    """An object of a request. Unknown fields are kept, to be told of."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}  # that types.py checks

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Add the ranges that are checked elsewhere."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, (low, high) in cls.ranges.items():
            if name in schema["properties"]:
                schema["properties"][name] |= {"minimum": low, "maximum": high}
        return schema


def say(text: str, **options: Any) -> Any:
    """An optional field: what it is, for the reference at /openapi.json."""
    return Field(default=None, description=text, **options)

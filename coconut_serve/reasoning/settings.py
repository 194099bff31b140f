"""The settings of each slot's request, as columns of one table.

The columns are derived from the parameter records: every field and property that is a number, a
flag, a choice or a short list. Choices are stored as their index, None as -1. `Slots` keeps the
table on the device and a mirror of it on the host.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from types import NoneType
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from coconut_serve.declare import Setting, settings_of
from coconut_serve.params import (
    HaltParams,
    MixtureParams,
    ReasoningParams,
    SamplingParams,
    SwitchParams,
)
from coconut_serve.types import Request

T = TypeVar("T", Tensor, np.ndarray)
WORD_BYTES = 8
NO_ID = -2  # pads lists of token ids; -1 is a step without text
_FORMATS = {torch.int64: "q", torch.float32: "f", torch.bool: "?"}
_HOST = {torch.int64: np.int64, torch.float32: np.float32, torch.bool: np.bool_}
_KINDS = {int: torch.int64, float: torch.float32, bool: torch.bool}


@dataclass(frozen=True, slots=True)
class SlotSnapshot:
    """The state of a preempted sequence, to resume in any slot."""

    row: Tensor  # [num_state_words] int64
    buffers: Mapping[str, Tensor]  # name of a large buffer -> that slot's row


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A request that takes a slot."""

    slot: int
    next_token_id: int = 0  # the first input that the slot holds
    seed: int = 0  # of all noise of the thinking phase
    reasoning: ReasoningParams = field(default_factory=ReasoningParams)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    thinking: SamplingParams | None = None  # of thinking tokens; None: as `sampling`
    prompt_token_ids: tuple[int, ...] = ()  # for the repetition penalty
    hidden_token_id: int = 0  # vLLM: stands for a step without text
    failure_token_id: int = -1  # vLLM: ends a row with NaN or Inf; -1: none
    counts_steps: bool = True  # False: another engine samples until the steps are spent
    snapshot: SlotSnapshot | None = None  # to resume from after a preemption

    @classmethod
    def read(cls, slot: int, request: Request, snapshot: SlotSnapshot | None = None) -> "Admission":
        return cls(
            slot=slot,
            next_token_id=request.prompt_token_ids[-1],
            seed=request.thinking_seed,
            reasoning=request.reasoning,
            sampling=request.sampling,
            thinking=request.thinking,
            prompt_token_ids=request.prompt_token_ids,
            snapshot=snapshot,
        )

    @property
    def draws(self) -> SamplingParams:
        """How to sample thinking tokens."""
        return self.thinking or self.sampling


@dataclass(frozen=True, slots=True)
class Column:
    """The place of a value in the rows of a table of 8-byte words."""

    offset: int  # in words
    dtype: torch.dtype
    width: int | None  # None: a number, not a list

    @property
    def num_words(self) -> int:
        return -(-(self.width or 1) * self.dtype.itemsize // WORD_BYTES)

    @property
    def format(self) -> str:
        """How `struct` packs it."""
        count = self.width or 1
        padding = self.num_words * WORD_BYTES - count * self.dtype.itemsize
        return f"{count}{_FORMATS[self.dtype]}{padding}x"

    def of(self, table: Tensor) -> Tensor:
        """View a table's column; [num_rows, num_words] int64 -> [num_rows] or [num_rows, width]."""
        words = table[:, self.offset : self.offset + self.num_words].view(self.dtype)
        return words[:, 0] if self.width is None else words[:, : self.width]

    def of_host(self, table: np.ndarray) -> np.ndarray:
        """View the column of a table on the host; shapes as in `of`."""
        words: np.ndarray = table[:, self.offset : self.offset + self.num_words]
        words = words.view(_HOST[self.dtype])
        return words[:, 0] if self.width is None else words[:, : self.width]


class Layout:
    """The columns of a row, and how an admission fills them."""

    def __init__(self) -> None:
        self.columns: dict[str, Column] = {}
        self.num_words = 0
        self._format = "="
        self._reads: list[Callable[[Admission], Iterable[float]]] = []

    def add(
        self,
        name: str,
        dtype: torch.dtype,
        width: int | None,
        read: Callable[[Admission], Iterable[float]],
    ) -> Column:
        """Append a column.

        Raises:
            ValueError: The name is taken.
        """
        if name in self.columns:
            raise ValueError(f"slot column {name!r} exists")
        column = self.columns[name] = Column(self.num_words, dtype, width)
        self.num_words += column.num_words
        self._format += column.format
        self._reads.append(read)
        return column

    def pack(self, admission: Admission) -> bytes:
        values = [value for read in self._reads for value in read(admission)]
        return struct.pack(self._format, *values)


class Rows(Generic[T]):
    """Columns of some rows, as attributes that gather when read."""

    def __init__(self, columns: Mapping[str, T], rows: Tensor | list[int], prefix: str) -> None:
        self._columns: Mapping[str, T] = columns
        self._rows: Any = rows
        self._prefix = prefix

    def __getattr__(self, name: str) -> T:
        column = self._columns.get(self._prefix + name)
        if column is None:
            raise AttributeError(f"no slot column {self._prefix + name!r}")
        taken: T = column[self._rows]
        return taken


def settings_layout() -> Layout:
    """Derive the columns from the parameter records; the slot comes first."""
    layout = Layout()
    for each in fields(Admission):
        _add(layout, each.name, Setting(doc="", type=_TYPES[each.name]), attrgetter(each.name))
    for prefix, kind, at in _RECORDS:
        own = dict(settings_of(kind)) | dict(_derived(kind))
        for name, setting in own.items():
            _add(layout, prefix + name, setting, attrgetter(f"{at}.{name}"))
    return layout


_TYPES = get_type_hints(Admission)
_RECORDS: tuple[tuple[str, type, str], ...] = (  # prefix of the names, record, its path
    ("", ReasoningParams, "reasoning"),
    ("", MixtureParams, "reasoning.mixture"),
    ("", HaltParams, "reasoning.halt"),
    ("", SwitchParams, "reasoning.switch"),
    ("answer_", SamplingParams, "sampling"),
    ("thinking_", SamplingParams, "draws"),
)


def _derived(kind: type) -> Iterator[tuple[str, Setting]]:
    """Yield the properties of a record, which can be columns too."""
    for name, each in vars(kind).items():
        if isinstance(each, property):
            yield name, Setting(doc="", type=get_type_hints(each.fget)["return"])


def _add(layout: Layout, name: str, own: Setting, read: Callable[..., Any]) -> None:
    """Append the column of one setting, if its type can be one."""
    hint = own.type
    if get_origin(hint) is Literal:
        options = get_args(hint)
        layout.add(name, torch.int64, None, lambda a: (options.index(read(a)),))
    elif own.is_column and own.longest is not None:
        dtype, width = _KINDS[get_args(hint)[0]], own.longest
        fill = (NO_ID if dtype is torch.int64 else float("nan"),)

        def padded(admission: Admission) -> Iterable[float]:
            values = tuple(dict.fromkeys(read(admission)) if own.is_set else read(admission))
            return values + fill * (width - len(values))

        layout.add(name, dtype, width, padded)
    elif hint in _KINDS:
        layout.add(name, _KINDS[hint], None, lambda a: (read(a),))
    elif set(get_args(hint)) == {int, NoneType}:
        layout.add(name, torch.int64, None, lambda a: (-1 if read(a) is None else read(a),))


def choice(kind: type, name: str, value: str) -> int:
    """Return the number that stands for `value` in a column of choices."""
    return get_args(get_type_hints(kind)[name]).index(value)

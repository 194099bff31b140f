"""What the asyncio side of the native engine and its working side tell each other."""

from dataclasses import dataclass

from coconut_serve.errors import EngineDeadError
from coconut_serve.types import Request, RequestOutput, StepStats


@dataclass(frozen=True, slots=True)
class Add:
    """A new sequence."""

    request: Request
    arrival_seconds: float  # time.monotonic(), which all processes of a machine share


@dataclass(frozen=True, slots=True)
class Abort:
    """Nobody wants the sequence any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End everything."""


Message = Add | Abort | Stop


@dataclass(frozen=True, slots=True)
class Event:
    """What a step did."""

    stats: list[StepStats]  # to be counted before the outputs are seen
    outputs: list[tuple[str, RequestOutput | EngineDeadError]]  # by request id
    num_restarts: int
    death: EngineDeadError | None = None  # nothing follows

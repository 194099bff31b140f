"""Messages between the asyncio side of the native engine and its core."""

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
    """End a sequence that nobody waits for."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End everything."""


Message = Add | Abort | Stop


@dataclass(frozen=True, slots=True)
class Event:
    """The results of a step."""

    stats: list[StepStats]  # to record before the outputs are delivered
    outputs: list[tuple[str, RequestOutput | EngineDeadError]]  # by request id
    num_restarts: int
    death: EngineDeadError | None = None  # then this is the last event

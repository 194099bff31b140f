"""The seam between the service and an engine."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from coconut_serve.types import Request, RequestOutput, StepStats

OnStep = Callable[[StepStats], None]  # called from the engine's own thread


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine is and can do, known once it has started."""

    engine: str
    vocab_size: int
    max_model_len: int  # positions a sequence may have
    kv_cache_positions: int
    block_size: int
    modes: tuple[str, ...]
    dtype: str = "none"
    device: str = "none"
    fingerprint: str = ""  # of the weights and what they run on
    unsupported_features: tuple[str, ...] = ()  # what such an engine could have and this refuses


class Engine(Protocol):
    """Generates sequences; many at once, each one an async generator."""

    async def start(self) -> None:
        """Load the model and begin to work.

        Raises:
            StartupError: It cannot run as configured.
        """

    def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Yield what each step adds; the last output alone has a finish_reason.

        Closing the generator aborts the sequence and frees its blocks within one step, so callers
        iterate it inside `contextlib.aclosing`.

        Raises:
            InvalidRequestError: The request can never be served, e.g. it is too long.
            EngineDeadError: The engine failed, before or while it ran.
        """

    async def check_health(self) -> None:
        """Return if the engine works.

        Raises:
            EngineDeadError: It does not.
        """

    async def stop(self) -> None:
        """End all sequences with EngineDeadError and free everything."""

    @property
    def info(self) -> EngineInfo:
        """What the engine can do; only after `start`."""

    @property
    def num_restarts(self) -> int:
        """How often the engine recovered from a failure."""

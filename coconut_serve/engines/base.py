"""The interface between the service and an engine."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from coconut_serve.declare import token_ids
from coconut_serve.errors import ContextLengthError, InvalidRequestError, require
from coconut_serve.reasoning.registry import check_params
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
    weights_bytes: int = 0  # 0: unknown
    kv_cache_bytes: int = 0  # at most
    hidden_size: int = 0  # of the model's inputs; 0: no vectors
    fingerprint: str = ""  # of the weights and what they run on
    adapters: tuple[str, ...] = ()  # available between hidden states and inputs
    unsupported_features: tuple[str, ...] = ()  # that such engines may have and this one rejects

    @property
    def system_fingerprint(self) -> str:
        """Identifies what makes answers; vectors are valid only for the same one."""
        return f"coconut-{self.engine}-{self.fingerprint or '0'}"


def check_request(request: Request, info: EngineInfo) -> None:
    """Reject a request that an engine can never run.

    Raises:
        InvalidRequestError: The prompt does not fit, or a reasoning setting is not supported.
    """
    ids, reasoning = request.prompt_token_ids, request.reasoning
    last = info.vocab_size - 1
    require(bool(ids), "prompt", "must not be empty")
    if len(ids) >= info.max_model_len:
        detail = f"the prompt has {len(ids)}, and the answer needs one."
        raise ContextLengthError(info.max_model_len, detail, param="prompt")
    require(min(ids) >= 0 and max(ids) <= last, "prompt", f"has token ids outside 0..{last}")
    if reasoning.mode not in info.modes:
        raise InvalidRequestError(
            f"reasoning_mode {reasoning.mode!r} is not one of {', '.join(info.modes)}",
            param="reasoning_mode",
            code="unsupported_reasoning_mode",
        )
    check_params(reasoning)
    adapters = ("none", *info.adapters)
    is_known = reasoning.adapter in adapters
    require(is_known, "reasoning.adapter", f"must be one of {', '.join(adapters)}")
    size, length = 4 * info.hidden_size, len(reasoning.replay_vectors)
    num_given = length // size if size else 0
    is_whole = length == num_given * size and len(reasoning.replay_token_ids) in (0, num_given)
    require(is_whole, "reasoning.replay", f"must hold vectors of {info.hidden_size} numbers")
    for param, ids in token_ids(reasoning):
        is_inside = all(0 <= token_id <= last for token_id in ids)
        require(is_inside, param, f"names token ids outside 0..{last}")


class Engine(Protocol):
    """Generates sequences; many at once, each one an async generator."""

    async def start(self) -> None:
        """Load the model and start working.

        Raises:
            StartupError: It cannot run as configured.
        """

    def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Yield what each step adds; only the last output has a finish_reason.

        Closing the generator aborts the sequence and frees its blocks within one step, so callers
        iterate it inside `contextlib.aclosing`.

        Raises:
            InvalidRequestError: The request can never be served, e.g. it is too long.
            EngineDeadError: The engine failed, before or while it ran.
        """

    async def check_health(self) -> None:
        """Check that the engine works.

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

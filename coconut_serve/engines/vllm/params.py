"""Reasoning settings as flat `SamplingParams.extra_args`, the way vLLM carries them to its workers.

Our engine and plain `vllm serve` (`vllm_xargs`) use the same keys: `reasoning_` and the name of a
field of ReasoningParams, MixtureParams or HaltParams, such as `reasoning_mode`,
`reasoning_top_k` or `reasoning_entropy_below`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from vllm.sampling_params import SamplingParams as VllmSamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from coconut_serve.errors import InvalidRequestError
from coconut_serve.reasoning.registry import load_mode, mode_names
from coconut_serve.reasoning.report import width
from coconut_serve.reasoning.rows import NOTHING, Wanted
from coconut_serve.types import (
    HaltParams,
    MixtureParams,
    NoiseKind,
    ReasoningParams,
    Request,
    require,
)

_PREFIX = "reasoning_"
_PLAIN = {"mode": str, "steps": int, "is_fixed": bool, "stop_token_id": int}
_NESTED: dict[str, type[MixtureParams] | type[HaltParams]] = {
    f.name: kind for kind in (MixtureParams, HaltParams) for f in fields(kind)
}
_OWN = {"seed": int, "hidden_token_id": int, "min_tokens": int, "report_width": int}
_WANTED = {"num_logprobs": int, "trace_top_k": int, "wants_vector": bool}
_LISTS = ("end_token_ids", "stop_token_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """What a worker must know of one request."""

    params: ReasoningParams
    seed: int = 0
    hidden_token_id: int = 0  # what vLLM sees of a position that has no token
    stop_token_ids: tuple[int, ...] = ()  # the first one ends a row that went numerically wrong
    min_tokens: int = 0  # of the answer; 0: vLLM counts by itself
    wanted: Wanted = NOTHING
    report_width: int = 0  # columns of the step report sent in place of log-probabilities; 0: none

    @property
    def feeds_vectors(self) -> bool:
        """Whether positions of the thinking phase may hold vectors instead of tokens."""
        return self.params.steps > 0 and load_mode(self.params.mode).feeds_vectors


def thinking_of(request: Request, *, hidden_size: int, hidden_token_id: int) -> Thinking:
    """Say what the workers must know of a request of ours."""
    params, sampling, wanted = request.reasoning, request.sampling, Wanted.read(request)
    has_report = wanted.has_scores or not _is_legible(params)
    stop_token_ids = tuple(sorted(sampling.stop_token_ids))
    return Thinking(
        params=params,
        seed=sampling.seed,
        hidden_token_id=hidden_token_id,
        stop_token_ids=stop_token_ids,
        min_tokens=0 if params.is_fixed or not params.steps else sampling.min_tokens,
        wanted=wanted,
        report_width=width(wanted, hidden_size) if has_report else 0,
    )


def _is_legible(params: ReasoningParams) -> bool:
    """Whether the tokens that vLLM sees tell where the phases end; a report costs time."""
    if params.steps == 0 or params.is_fixed:
        return True
    if load_mode(params.mode).feeds_vectors:
        return False
    ends = params.end_token_ids
    return params.stop_token_id is None or not ends or params.stop_token_id == ends[0]


def to_extra_args(thinking: Thinking) -> dict[str, Any]:
    """Write settings as flat scalars and lists."""
    params = thinking.params
    flat: dict[str, Any] = {name: getattr(params, name) for name in _PLAIN}
    flat |= asdict(params.mixture) | asdict(params.halt) | asdict(thinking.wanted)
    flat |= {name: getattr(thinking, name) for name in _OWN}
    flat["end_token_ids"] = list(params.end_token_ids)
    flat["stop_token_ids"] = list(thinking.stop_token_ids)
    return {_PREFIX + name: value for name, value in flat.items() if value is not None}


def from_extra_args(extra_args: Mapping[str, Any] | None) -> Thinking | None:
    """Read settings; None for a request that does not think.

    Raises:
        InvalidRequestError: A key is unknown or a value wrong; `param` names it.
    """
    flat = {k: v for k, v in (extra_args or {}).items() if k.startswith(_PREFIX)}
    if not flat:
        return None
    read = {key.removeprefix(_PREFIX): _typed(key, value) for key, value in flat.items()}
    mode = read.get("mode", "none")
    known = mode_names()
    require(mode in known, "reasoning_mode", f"must be one of {', '.join(known)}")

    def pick(names: Any) -> dict[str, Any]:
        return {name: read[name] for name in names if name in read}

    def nested(kind: Any) -> Any:
        return kind(**pick(f.name for f in fields(kind)))

    params = ReasoningParams(
        **pick((*_PLAIN, "end_token_ids")), mixture=nested(MixtureParams), halt=nested(HaltParams)
    )
    wanted = Wanted(**pick(_WANTED))
    return Thinking(params=params, wanted=wanted, **pick((*_OWN, "stop_token_ids")))


def _typed(key: str, value: Any) -> Any:
    """Check the type of one value; JSON has no difference between 1 and 1.0."""
    name = key.removeprefix(_PREFIX)
    if name in _LISTS:
        is_list = isinstance(value, list | tuple) and all(type(i) is int for i in value)
        require(is_list, key, "must be a list of token ids")
        return tuple(value)
    if name == "noise":
        require(value in get_args(NoiseKind), key, f"must be one of {get_args(NoiseKind)}")
        return value
    kind = {**_PLAIN, **_OWN, **_WANTED}.get(name)
    if kind is None:
        require(name in _NESTED, key, "is not known")
        kind = type(getattr(_NESTED[name](), name))
    if kind is float and type(value) is int:
        return float(value)
    if kind in (int, float) and isinstance(value, float) and kind(value) == value:
        return kind(value)
    require(type(value) is kind, key, f"must be a {kind.__name__}")
    return value


class ReasoningParamsCheck(LogitsProcessor):
    """Refuses bad settings where a request comes in: a worker must never meet them.

    Named in `--logits-processors`, vLLM's place for checking `extra_args`; it changes no logits.
    """

    @classmethod
    def validate_params(cls, sampling_params: VllmSamplingParams) -> None:
        """Raise ValueError, which vLLM answers as 400."""
        try:
            thinking = from_extra_args(sampling_params.extra_args)
            if thinking is not None:
                _check_plain(thinking, sampling_params)
        except InvalidRequestError as error:
            raise ValueError(error.message) from error

    def add_request(self, req_idx: int, sampling_params: VllmSamplingParams) -> bool:
        """Decline: nothing is changed."""
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        """Return the logits as they are."""
        return logits


def _check_plain(thinking: Thinking, sampling: VllmSamplingParams) -> None:
    """Check what our own service decides by itself and a plain vLLM client must say."""
    params = thinking.params
    extra_args = sampling.extra_args or {}
    if params.mode == "none":
        return
    require(_PREFIX + "steps" in extra_args, "reasoning_steps", f"is needed for {params.mode}")
    # A latent position has no token of its own; a stop token in its place would end the request.
    if params.mode not in ("cot", "distribution"):
        key, stops = "reasoning_hidden_token_id", sampling.stop_token_ids or ()
        has_own = _PREFIX + "hidden_token_id" in extra_args
        require(has_own, key, "is needed: a special token of the model that ends no answer")
        require(thinking.hidden_token_id not in stops, key, "must not be in stop_token_ids")
    needs_gate = sampling.structured_outputs is not None
    require(not needs_gate, "structured_outputs", "are not supported while the model thinks")

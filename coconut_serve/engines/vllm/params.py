"""Reasoning settings as flat `SamplingParams.extra_args`, the way vLLM carries them to its workers.

Our engine and plain `vllm serve` (`vllm_xargs`) use the same keys: `reasoning_` and the name of a
field of ReasoningParams, MixtureParams or HaltParams, such as `reasoning_mode`,
`reasoning_top_k` or `reasoning_entropy_below`.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from vllm.sampling_params import SamplingParams as VllmSamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from coconut_serve.declare import map_token_ids, settings_of
from coconut_serve.errors import InvalidRequestError, require
from coconut_serve.params import (
    HaltParams,
    MixtureParams,
    ReasoningParams,
    SamplingParams,
    SwitchParams,
)
from coconut_serve.reasoning.mode import load_mode, needs_of
from coconut_serve.reasoning.plan import NOTHING, Wanted
from coconut_serve.reasoning.registry import NO_THINKING, check_params, mode_names, properties_of
from coconut_serve.reasoning.report import width
from coconut_serve.types import Request

_PREFIX = "reasoning_"
_NESTED = (MixtureParams, HaltParams, SwitchParams, Wanted)
_NOT_PLAIN = (
    "mixture", "halt", "switch", "trace", "trace_top_k",
    "pad_positions", "max_total_steps",  # not supported; vLLM's own max_tokens
)  # fmt: skip
_PLAIN = tuple(f.name for f in fields(ReasoningParams) if f.name not in _NOT_PLAIN)
_OWN = (
    "seed", "hidden_token_id", "answer_stop_token_ids", "min_tokens", "report_width", "draw",
)  # fmt: skip
# Sent only by our engine, which reads the report and counts the tokens.
_INTERNAL = (
    *_OWN[2:], "replay_vectors", "replay_token_ids", "answer_tokens",
    *(f.name for f in fields(Wanted)),
)  # fmt: skip
_MAX_ID = 2**31 - 1
# -1 where the model has no such token.
_SIGNED = {"seed", *(name for name, own in settings_of(SwitchParams).items() if own.default == -1)}


def check_names(*groups: Iterable[str]) -> None:
    """Raise TypeError if two settings share a flat key: one would overwrite the other.

    Args:
        groups: The field names of each record.
    """
    count = Counter(name for group in groups for name in group)
    twice = sorted(name for name, times in count.items() if times > 1)
    if twice:
        raise TypeError(f"settings of two records share a name: {', '.join(twice)}")


check_names(_PLAIN, _OWN, *((f.name for f in fields(kind)) for kind in _NESTED))


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """Everything a worker needs to know about one request."""

    params: ReasoningParams
    seed: int = 0
    hidden_token_id: int = 0  # what vLLM sees at a position without a token
    answer_stop_token_ids: tuple[int, ...] = ()  # the first ends a row with NaN or Inf
    min_tokens: int = 0  # of the answer; 0: vLLM counts by itself
    wanted: Wanted = NOTHING
    draw: tuple[float, ...] = ()  # temperature, top_p, top_k, min_p of thinking tokens, if they
    # differ from the answer's
    report_width: int = 0  # columns of the step report sent in place of log-probabilities; 0: none

    @property
    def draws(self) -> SamplingParams | None:
        """How to sample thinking tokens; None: vLLM samples them like the answer's."""
        if not self.draw:
            return None
        temperature, top_p, top_k, min_p = self.draw
        return SamplingParams(
            temperature=temperature, top_p=top_p, top_k=int(top_k), min_p=min_p, seed=self.seed
        )

    @property
    def num_fed(self) -> int:
        """Positions after the prompt that may hold vectors instead of tokens."""
        params = self.params
        if params.mixture.in_answer:
            return _MAX_ID
        if params.steps == 0 or not properties_of(params.mode).feeds_vectors:
            return 0
        if params.enter_token_id is not None:
            return _MAX_ID  # wherever the model opens a block
        return params.steps + params.end_adds_vector + params.keeps_last

    @property
    def passes_through(self) -> bool:
        """Whether vLLM's own samples are used unchanged until the steps are spent.

        Only the end token can end such a phase, and no forced token follows it.
        """
        params = self.params
        return (
            load_mode(params.mode).takes_samples
            and _tokens_reveal_phases(params, has_stop=False)
            and self.report_width == self.min_tokens == 0
            and not self.draw
            and (params.num_forced <= 1 or not params.halt.stop_token_ids)
        )

    def within(self, vocab_size: int) -> "Thinking":
        """Clamp every id to the vocabulary: a worker must not write beyond its tables."""

        def inside(token_id: int) -> int:
            return min(token_id, vocab_size - 1)

        return replace(
            self,
            params=map_token_ids(self.params, inside),
            hidden_token_id=inside(self.hidden_token_id),
            answer_stop_token_ids=tuple(map(inside, self.answer_stop_token_ids)),
        )


def worker_params(request: Request, *, hidden_size: int, hidden_token_id: int) -> Thinking:
    """Derive what workers need to know about one of our requests."""
    params, sampling, wanted = request.reasoning, request.sampling, Wanted.read(request)
    stop_token_ids = tuple(sorted(sampling.stop_token_ids))
    own = request.thinking
    has_report = wanted.has_scores or not _tokens_reveal_phases(
        params, has_stop=bool(stop_token_ids)
    )
    return Thinking(
        params=params,
        seed=request.thinking_seed,
        draw=(own.temperature, own.top_p, float(own.top_k), own.min_p) if own else (),
        hidden_token_id=hidden_token_id,
        answer_stop_token_ids=stop_token_ids,
        min_tokens=0 if counts_by_itself(params) else sampling.min_tokens,
        wanted=wanted,
        report_width=width(wanted, hidden_size) if has_report else 0,
    )


def counts_by_itself(params: ReasoningParams) -> bool:
    """Whether vLLM's own min_tokens works: thinking has a fixed length and never reads logits.

    vLLM masks stop tokens while a row thinks, too.
    """
    has_vectors = properties_of(params.mode).feeds_vectors
    looks = needs_of(params).logits or not has_vectors
    return params.steps == 0 or (params.is_fixed and not looks)


def _tokens_reveal_phases(params: ReasoningParams, *, has_stop: bool) -> bool:
    """Whether vLLM's tokens alone reveal where phases end; a report takes time.

    A stop token ends a row with NaN or Inf, so the request must have one.
    """
    if params.mixture.in_answer:
        return False
    if params.steps == 0:
        return True
    if params.enter_token_id is not None:
        return False
    mode, halt = properties_of(params.mode), params.halt
    if mode.feeds_vectors:
        return params.is_fixed and not mode.has_text and has_stop
    is_plain = not halt.needs_logits(has_text=True) and params.min_steps == 0
    ends = params.end_token_ids
    return is_plain and (not halt.stop_token_ids or not ends or halt.stop_token_ids == ends[:1])


def to_extra_args(thinking: Thinking) -> dict[str, Any]:
    """Write settings as flat scalars and lists."""
    params = thinking.params
    flat: dict[str, Any] = {name: getattr(params, name) for name in _PLAIN}
    flat |= {name: getattr(thinking, name) for name in _OWN}
    for record in (params.mixture, params.halt, params.switch, thinking.wanted):
        flat |= asdict(record)
    return {
        _PREFIX + name: list(value) if isinstance(value, tuple) else value
        for name, value in flat.items()
        if value is not None
    }


def from_extra_args(extra_args: Mapping[str, Any] | None) -> Thinking | None:
    """Parse settings; None if there are none.

    Raises:
        InvalidRequestError: A key is unknown or a value wrong; `param` names it.
    """
    flat = {k: v for k, v in (extra_args or {}).items() if k.startswith(_PREFIX)}
    if not flat:
        return None
    read = {key.removeprefix(_PREFIX): _typed(key, value) for key, value in flat.items()}
    mode, known = read.get("mode", NO_THINKING), mode_names()
    require(mode in known, "reasoning_mode", f"must be one of {', '.join(known)}")

    def pick(names: Any) -> dict[str, Any]:
        return {name: read[name] for name in names if name in read}

    def nested(kind: Any) -> Any:
        return kind(**pick(f.name for f in fields(kind)))

    params = ReasoningParams(
        **pick(_PLAIN),
        mixture=nested(MixtureParams),
        halt=nested(HaltParams),
        switch=nested(SwitchParams),
    )
    check_params(params)
    return Thinking(params=params, wanted=nested(Wanted), **pick(_OWN))


@functools.cache
def _hints() -> dict[str, Any]:
    """The type of each allowed key."""
    hints = {name: hint for kind in _NESTED for name, hint in get_type_hints(kind).items()}
    hints |= {name: get_type_hints(ReasoningParams)[name] for name in _PLAIN}
    return hints | {name: get_type_hints(Thinking)[name] for name in _OWN}


def _typed(key: str, value: Any) -> Any:
    """Check the type of one value; JSON does not tell 1 from 1.0."""
    name = key.removeprefix(_PREFIX)
    require(name in _hints(), key, "is not known")
    hint = _hints()[name]
    if get_origin(hint) is Literal:
        require(value in get_args(hint), key, f"must be one of {', '.join(get_args(hint))}")
        return value
    if get_origin(hint) is tuple:
        return _typed_list(key, get_args(hint)[0], value)
    kind = next(each for each in (get_args(hint) or (hint,)) if each is not type(None))
    if isinstance(value, float) and kind is int and value.is_integer():
        value = int(value)
    if kind is float and type(value) is int:
        value = float(value)
    require(type(value) is kind, key, f"must be a {kind.__name__}")
    if kind is int:
        low, high = (-(2**63), 2**63 - 1) if name == "seed" else (-1, _MAX_ID)
        low = low if name in _SIGNED else 0
        require(low <= value <= high, key, f"must be in {low}..{high}")
    return value


def _typed_list(key: str, kind: type, value: Any) -> tuple[Any, ...]:
    """Check a list of token ids or of numbers."""
    if kind is float:
        is_list = isinstance(value, list | tuple) and all(type(i) in (int, float) for i in value)
        require(is_list, key, "must be a list of numbers")
        return tuple(float(i) for i in value)
    is_list = isinstance(value, list | tuple) and all(type(i) is int for i in value)
    is_inside = is_list and all(0 <= i <= _MAX_ID for i in value)
    require(is_inside, key, "must be a list of token ids")
    return tuple(value)


class ReasoningParamsCheck(LogitsProcessor):
    """Rejects bad settings at the API: they must never reach a worker.

    Named in `--logits-processors`, vLLM's place for checking `extra_args`; it changes no logits.
    """

    is_ours: ClassVar[bool] = False  # whether requests come from our own service, checked there

    @classmethod
    def validate_params(cls, sampling_params: VllmSamplingParams) -> None:
        """Raise ValueError, which vLLM answers as 400."""
        try:
            thinking = from_extra_args(sampling_params.extra_args)
            if thinking is not None and not cls.is_ours:
                _check_plain(thinking, sampling_params)
        except InvalidRequestError as error:
            raise ValueError(error.message) from error

    def add_request(self, req_idx: int, sampling_params: VllmSamplingParams) -> bool:
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        return logits


class OwnReasoningParamsCheck(ReasoningParamsCheck):
    """The same behind our own service."""

    is_ours = True


def _check_plain(thinking: Thinking, sampling: VllmSamplingParams) -> None:
    """Check what our service decides itself and a plain vLLM client must send."""
    params = thinking.params
    extra_args = sampling.extra_args or {}
    for name in _INTERNAL:
        require(_PREFIX + name not in extra_args, _PREFIX + name, "is not known")
    has_none = params.adapter == "none"
    require(has_none, "reasoning_adapter", "is not supported here; use coconut-serve's own server")
    has_no_gate = params.mixture.kind != "gated"
    require(has_no_gate, "reasoning_kind", "gated needs an adapter; use coconut-serve's own server")
    if not properties_of(params.mode).thinks:
        return
    require(_PREFIX + "steps" in extra_args, "reasoning_steps", f"is needed for {params.mode}")
    # A latent position has no token of its own; a stop token in its place would end the request.
    if not properties_of(params.mode).has_text:
        key, stops = "reasoning_hidden_token_id", sampling.stop_token_ids or ()
        has_own = _PREFIX + "hidden_token_id" in extra_args
        require(has_own, key, "is needed: a special token of the model that ends no answer")
        require(thinking.hidden_token_id not in stops, key, "must not be in stop_token_ids")
    needs_gate = sampling.structured_outputs is not None
    require(not needs_gate, "structured_outputs", "are not supported while the model thinks")

"""Request bodies: strict types, ranges, and a clear word on every unknown field.

Responses are `openai.types` classes with our extra fields; requests are these models, because
openai's own request types drop unknown keys and know no ranges.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from coconut_serve.errors import InvalidRequestError
from coconut_serve.limits import MAX_STEPS
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.service.presets import EFFORTS, PRESETS

MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 256
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_PROMPTS = 128
MAX_MESSAGES = 1024

# Accepted because client libraries send them; without effect here.
IGNORED_FIELDS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options", "verbosity", "parallel_tool_calls",
    "modalities", "prediction",
})  # fmt: skip
# Known to OpenAI's API and not served: using them is an error, never silence.
REJECTED_FIELDS = frozenset({
    "tools", "tool_choice", "functions", "function_call", "audio",
    "web_search_options", "moderation", "suffix", "best_of", "prompt_embeds", "chat_template",
})  # fmt: skip


def _strict_number(value: object) -> object:
    """Take 1 for 1.0, but neither "1" nor true."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return value


def _bounded(value: object) -> object:
    """Refuse a huge object before each of its values is complained of."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"takes at most {MAX_LOGIT_BIAS}")
    return value


T = TypeVar("T")
V = TypeVar("V")
# The first wrong item is enough: a million complaints take seconds, and a gigabyte.
Items = Annotated[list[T], Field(fail_fast=True)]
Values = Annotated[dict[str, V], BeforeValidator(_bounded)]
Number = Annotated[float, BeforeValidator(_strict_number)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Temperature = Annotated[Number, Field(ge=0, le=2)]
TopP = Annotated[Number, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(lambda k: max(0, k))]  # -1: all, too
MinP = Annotated[Number, Field(ge=0, le=1)]


# Fields that go into SamplingParams under their own name when they are given.
SAMPLING_FIELDS = (
    "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty",
)  # fmt: skip


def openapi_body(model: type[BaseModel]) -> dict[str, Any]:
    """Describe a request body for /openapi.json; routes read theirs by hand."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class MixtureBody(_Body):
    """reasoning.mixture; see docs/methods.md."""

    kind: Literal["topk", "full", "multiplex", "moi", "gated"] | None = None
    top_k: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    filter_top_k: int | None = None
    min_p: Number | None = None
    noise: Literal["none", "gumbel", "dirichlet"] | None = None
    noise_temperature: Number | None = None
    noise_clamp: Items[Number] | None = None
    dirichlet_alpha: Number | None = None
    weights: Literal["prob", "equal"] | None = None
    replacement: bool | None = None
    moi_beta: Number | None = None
    in_answer: bool | None = None
    norm: Literal["none", "l2", "embed_mean"] | None = None


HaltRule = Literal["learned", "stop_token", "cold_stop", "uncertain", "converged"]
HaltRules = Annotated[Items[HaltRule], Field(min_length=1)]


class HaltBody(_Body):
    """reasoning.halt."""

    rule: Literal["auto", "fixed", HaltRule] | HaltRules | None = None
    stop_tokens: Items[int | str] | None = None
    stop_test: Literal["argmax", "sampled", "prob"] | None = None
    stop_temperature: Number | None = None
    stop_prob: Number | None = None
    sample: bool | None = None
    entropy_below: Number | None = None
    entropy_patience: int | None = None
    entropy_above: Number | None = None
    entropy_unit: Literal["nats", "normalized"] | None = None
    converge_metric: Literal["none", "cosine", "rel_l2", "kl", "argmax_stable"] | None = None
    converge_below: Number | None = None
    converge_patience: int | None = None


class SwitchBody(_Body):
    """reasoning.switch."""

    rule: Literal["none", "swi", "confidence"] | None = None
    soft_when: Literal["confident", "uncertain"] | None = None
    p_max: Number | None = None
    window: int | None = None
    alpha: Number | None = None
    beta: Number | None = None
    max_switches: int | None = None
    answer_tokens: int | None = None
    hard_tokens: Literal["math", "none"] | Items[int | str] | None = None


class AfterBody(_Body):
    """reasoning.after."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None


class ReplayStep(_Body):
    """A step of `reasoning_trace`; what else it says is not looked at."""

    vector: str
    token_id: Annotated[int, Field(ge=0)] | None = None


class ReplayBody(_Body):
    """reasoning.replay."""

    fingerprint: str
    steps: Annotated[Items[ReplayStep], Field(min_length=1, max_length=MAX_STEPS)]


class ReasoningBody(_Body):
    """The `reasoning` object of chat and completions."""

    mode: str | None = None
    effort: str | None = None
    summary: str | None = None  # OpenAI's; accepted without effect
    preset: str | None = None
    steps: Annotated[int, Field(ge=0)] | None = None
    min_steps: Annotated[int, Field(ge=0)] | None = None
    max_blocks: Annotated[int, Field(ge=1)] | None = None
    pad_positions: bool | None = None
    max_total_steps: Annotated[int, Field(ge=1)] | None = None
    start: str | int | Items[int | str] | None = None
    end: str | int | Items[int | str] | None = None
    source: Literal["hidden", "distribution", "constant"] | None = None
    adapter: str | None = None
    latent_noise_std: Number | None = None
    latent_temperature: Number | None = None
    soft_weight: Number | None = None
    mixture: MixtureBody | None = None
    halt: HaltBody | None = None
    switch: SwitchBody | None = None
    after: AfterBody | None = None
    speed: int | str | None = None
    seed: Seed | None = None
    branches: Annotated[int, Field(ge=1)] | None = None
    select: Literal["first", "vote", "logprob", "all"] | None = None
    trace: Literal["none", "summary", "topk", "vectors"] | None = None
    trace_top_k: int | None = None
    replay: ReplayBody | None = None


class StreamOptions(_Body):
    """stream_options."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # accepted without effect


class NamedBody(_Body):
    """A body that names the model it is for."""

    model: str | None = None


class GenerationBody(NamedBody):
    """Fields that chat and completions share."""

    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Values[Number] | None = None
    seed: Seed | None = None
    stop: str | Items[str] | None = None
    stop_token_ids: Annotated[Items[int], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    include_reasoning: bool = True
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")] | None = None
    reasoning_mode: str | None = None
    reasoning_effort: str | None = None
    reasoning: ReasoningBody | None = None

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, checked.

        Raises:
            InvalidRequestError: Too many, too long or empty.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"stop takes at most {MAX_STOP_STRINGS}", param="stop")
        if any(not s or len(s) > MAX_STOP_LENGTH for s in stop):
            raise InvalidRequestError(
                f"stop: each must have 1..{MAX_STOP_LENGTH} characters", param="stop"
            )
        return tuple(stop)

    def bias(self) -> dict[int, float]:
        """logit_bias by token id, checked.

        Raises:
            InvalidRequestError: Keys are no ids, or values out of range.
        """
        given = self.logit_bias or {}
        if any(not key.isdecimal() or len(key) > 10 for key in given):
            raise InvalidRequestError("logit_bias: keys must be token ids", param="logit_bias")
        if any(not -100 <= value <= 100 for value in given.values()):
            raise InvalidRequestError("logit_bias: values must be in -100..100", param="logit_bias")
        return {int(key): value for key, value in given.items()}


Messages = Annotated[Items[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]


class ResponseFormat(_Body):
    """response_format; text only so far."""

    type: str


class ChatRequest(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: Values[bool | int | str] | None = None


class CompletionRequest(GenerationBody):
    """POST /v1/completions."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TokenizeRequest(NamedBody):
    """POST /tokenize: a prompt or messages."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(NamedBody):
    """POST /detokenize."""

    tokens: Items[Annotated[int, Field(ge=0)]]


def unknown_fields(body: BaseModel) -> list[str]:
    """Name fields that no one knows; reject those that must not be ignored.

    Raises:
        InvalidRequestError: A field is known but not served, or looks like a setting of reasoning
            and is misspelt.
    """
    unknown = []
    known = set(type(body).model_fields)
    for name, value in (body.model_extra or {}).items():
        if name in IGNORED_FIELDS or value is None:
            continue
        if name in REJECTED_FIELDS:
            raise InvalidRequestError(
                f"{name} is not supported", param=name, code="unsupported_parameter"
            )
        if any(word in name.lower() for word in ("reason", "latent", "think", "soft")):
            raise InvalidRequestError(
                f"unknown field {name!r}{_suggest(name, known)}",
                param=name,
                code="unknown_parameter",
            )
        unknown.append(name)
    return unknown


def _suggest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def flatten_reasoning(body: ReasoningBody | None) -> dict[str, Any]:
    """Explicit settings by dotted name, e.g. "mixture.top_k".

    Raises:
        InvalidRequestError: A setting is unknown.
    """
    asked: dict[str, Any] = {}
    if body is not None:
        _flatten(body, "", asked)
    _check_values(asked)
    return asked


def _flatten(part: _Body, prefix: str, asked: dict[str, Any]) -> None:
    for name, value in part:  # declared fields, then unknown ones
        dotted = prefix + name
        if isinstance(value, _Body):
            _flatten(value, f"{dotted}.", asked)
        elif value is not None:
            known = set(type(part).model_fields)
            if name not in known:
                raise InvalidRequestError(
                    f"unknown field reasoning.{dotted}{_suggest(name, known)}",
                    param=f"reasoning.{dotted}",
                    code="unknown_parameter",
                )
            asked[dotted] = value


def _check_values(asked: Mapping[str, Any]) -> None:
    preset = asked.get("preset")
    if preset is not None and preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise InvalidRequestError(
            f"reasoning.preset must be one of {known}", param="reasoning.preset"
        )
    speed = asked.get("speed", "auto")
    if speed != "auto" and (isinstance(speed, str) or speed < 1):
        raise InvalidRequestError(
            "reasoning.speed must be 'auto' or a whole number from 1", param="reasoning.speed"
        )


def check_mode_name(mode: str, param: str) -> str:
    """Return the mode if it exists.

    Raises:
        InvalidRequestError: It does not; the text names those that do.
    """
    if mode not in mode_names():
        names = list(mode_names())
        raise InvalidRequestError(
            f"{param} must be one of {', '.join(names)}{_suggest(mode, set(names))}",
            param=param,
            code="invalid_reasoning_mode",
        )
    return mode


def check_effort(effort: str | None, param: str) -> str | None:
    """Return the effort if it is one.

    Raises:
        InvalidRequestError: It is not.
    """
    if effort is not None and effort != "none" and effort not in EFFORTS:
        names = ", ".join(["none", *EFFORTS])
        raise InvalidRequestError(f"{param} must be one of {names}", param=param)
    return effort

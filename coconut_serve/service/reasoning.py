"""From what a request asks of reasoning to resolved parameters, each with its source."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from coconut_serve.checkpoint.manifest import Manifest
from coconut_serve.errors import InvalidRequestError, StartupError
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.service.tokenizer import Tokenizer
from coconut_serve.types import MAX_STEPS, HaltParams, MixtureParams, ReasoningParams, require

T = TypeVar("T")

PRESETS: dict[str, dict[str, Any]] = {
    "coconut": {"mode": "latent"},
    "soft_thinking": {
        "mode": "distribution",
        "mixture.top_k": 10,
        "mixture.temperature": 0.6,
        "mixture.top_p": 0.95,
        "mixture.filter_top_k": 30,
        "mixture.min_p": 0.001,
        "mixture.noise": "none",
        "halt.entropy_below": 0.01,
        "halt.entropy_patience": 256,
    },
    "stochastic_soft": {
        "mode": "distribution",
        "mixture.top_k": 15,
        "mixture.temperature": 0.6,
        "mixture.top_p": 0.95,
        "mixture.filter_top_k": 30,
        "mixture.min_p": 0.0,
        "mixture.noise": "gumbel",
        "mixture.noise_temperature": 0.5,
        "halt.entropy_below": 0.0,
    },
}
# reasoning_effort scales the default step budget; "none" picks the mode `none`.
EFFORTS: dict[str, float] = {
    "minimal": 0.25, "low": 0.5, "medium": 1.0, "high": 2.0, "xhigh": 4.0, "max": 8.0,
}  # fmt: skip
_DEFAULT_SOFT_STEPS = 16  # distribution on a model without think tokens (DESIGN 5)
_EFFORT_THINKING_TOKENS = 4096  # what effort scales where thinking is otherwise unbounded


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReasoning:
    """What the served model can do, read once from manifest and tokenizer."""

    modes: tuple[str, ...]
    default_mode: str
    manifest: Manifest | None
    think_start_id: int | None
    think_end_id: int | None
    max_model_len: int

    @classmethod
    def read(
        cls,
        manifest: Manifest | None,
        tokenizer: Tokenizer | None,
        *,
        engine_modes: tuple[str, ...],
        allowed_modes: tuple[str, ...] | None,
        default_mode: str | None,
        max_model_len: int,
    ) -> "ModelReasoning":
        """Combine manifest, tokenizer and server settings.

        Raises:
            StartupError: A mode does not exist, or the server's default is not the model's.
        """
        declared = tuple(manifest.modes) if manifest else ("none", "cot", "distribution")
        unknown = [mode for mode in declared if mode not in mode_names()]
        if unknown:
            raise StartupError(
                f"latent_config.json: modes: {unknown[0]!r} is none of {', '.join(mode_names())}",
                param="modes",
            )
        modes = tuple(m for m in engine_modes if m in declared)
        if allowed_modes is not None:
            modes = tuple(m for m in modes if m in allowed_modes)
        preferred = default_mode or (manifest.default_mode if manifest else None)
        if default_mode is not None and default_mode not in modes:
            raise StartupError(
                f"--default-reasoning-mode {default_mode!r} is not one of {', '.join(modes)}",
                param="--default-reasoning-mode",
            )
        fallback = "cot" if "cot" in modes else next(iter(modes), "none")
        start = manifest.tokens.think_start if manifest else None
        end = manifest.tokens.think_end if manifest else None
        find = tokenizer.find_id if tokenizer else lambda _: None
        start_id = start.id if start else find("<think>")
        end_id = end.id if end else find("</think>")
        is_thinker = start_id is not None and end_id is not None
        return cls(
            modes=modes,
            default_mode=preferred if preferred in modes else fallback,
            manifest=manifest,
            think_start_id=start_id if is_thinker else None,
            think_end_id=end_id if is_thinker else None,
            max_model_len=max_model_len,
        )

    @property
    def is_thinker(self) -> bool:
        """Whether the model has think tokens, which then bound its phases."""
        return self.think_end_id is not None

    @property
    def question_template(self) -> str | None:
        """The template of a model that takes questions, not chats; else None."""
        prompt = (self.manifest or Manifest()).prompt
        return None if prompt.chat_template else prompt.template or "{question}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """How one request thinks, and how that was decided."""

    params: ReasoningParams
    suffix_ids: tuple[int, ...]  # to append to the prompt
    parameters: dict[str, dict[str, Any]]  # name -> {"value", "source"}
    warnings: tuple[str, ...]


@dataclass(slots=True)
class _Picker:
    """Looks a setting up in the request, the preset, the manifest and the defaults."""

    layers: list[tuple[str, Mapping[str, Any]]]  # source name, settings
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, name: str, default: Any) -> Any:
        source, value = next(
            ((source, layer[name]) for source, layer in self.layers if name in layer),
            ("default", default),
        )
        self.parameters[name] = {"value": value, "source": source}
        return value


def check_mode(mode: str, model: ModelReasoning, asked: Mapping[str, Any]) -> None:
    """Refuse a mode that the model does not have.

    Raises:
        InvalidRequestError: With code unsupported_reasoning_mode.
    """
    if mode in model.modes:
        return
    if mode == "latent" and asked.get("adapter") == "realign":
        raise not_yet("reasoning.adapter", "realign")
    hint = ""
    if mode == "latent":
        hint = (
            f": it has no {'latent mode in its ' if model.manifest else ''}latent_config.json; "
            'the training-free adapter "realign" would be needed'
        )
    raise InvalidRequestError(
        f"reasoning_mode {mode!r} is not supported by this model{hint}. "
        f"Supported: {', '.join(model.modes)}",
        param="reasoning_mode",
        code="unsupported_reasoning_mode",
    )


def not_yet(param: str, value: object) -> InvalidRequestError:
    """Build the error for a known setting that this version cannot serve."""
    return InvalidRequestError(
        f"{param}={value!r} is not yet supported", param=param, code="not_yet_supported"
    )


def resolve(
    mode: str,
    asked: Mapping[str, Any],
    model: ModelReasoning,
    *,
    effort: str | None,
    max_trace: str,
    num_prompt_tokens: int,
    max_tokens: int,
) -> Resolved:
    """Resolve a request's reasoning.

    Args:
        mode: A mode the model supports.
        asked: Explicit settings by dotted name, e.g. "mixture.top_k".
        model: What the model can do.
        effort: reasoning_effort, which scales the default step budget.
        max_trace: The most detailed trace the server gives.
        num_prompt_tokens: Length of the prompt before the suffix.
        max_tokens: Answer tokens asked for.

    Raises:
        InvalidRequestError: A setting is out of range or not supported.
    """
    preset = PRESETS.get(asked.get("preset", ""), {})
    declared = (model.manifest or Manifest()).distribution.model_dump(exclude_none=True)
    from_manifest = {f"mixture.{name}": value for name, value in declared.items()}
    pick = _Picker([("request", asked), ("preset", preset), ("manifest", from_manifest)])
    warnings: list[str] = []
    suffix: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    stop_id: int | None = None
    steps = 0
    if mode == "latent":
        suffix, end = _latent_bounds(asked, model)
        steps = _latent_steps(pick, model, effort, warnings)
    elif mode != "none":
        steps, stop_id = _token_steps(pick, mode, model, effort, num_prompt_tokens, max_tokens)
        end = (stop_id,) if stop_id is not None else ()
    is_soft = mode == "distribution"
    params = ReasoningParams(
        mode=mode,
        steps=steps,
        is_fixed=mode == "latent",
        end_token_ids=end,
        stop_token_id=stop_id,
        mixture=_pick_all(pick, MixtureParams, "mixture") if is_soft else MixtureParams(),
        halt=_pick_all(pick, HaltParams, "halt") if is_soft else HaltParams(),
        trace=_trace(pick, max_trace),
        trace_top_k=pick("trace_top_k", 5),
    )
    unused = _unused(pick, mode, effort)
    if unused:
        warnings.append(f"without effect in mode {mode}: {', '.join(unused)}")
    return Resolved(
        params=params, suffix_ids=suffix, parameters=pick.parameters, warnings=tuple(warnings)
    )


def _latent_bounds(
    asked: Mapping[str, Any], model: ModelReasoning
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and end tokens of a latent phase: the manifest's unless the request says."""
    manifest = model.manifest or Manifest()

    def ids(name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = asked.get(name, "auto")
        if value == "auto":
            return default
        if value == "none":
            return ()
        return tuple(value) if isinstance(value, list) else (value,)

    return ids("start", manifest.start_token_ids), ids("end", manifest.end_token_ids)


def _latent_steps(
    pick: _Picker, model: ModelReasoning, effort: str | None, warnings: list[str]
) -> int:
    manifest = model.manifest or Manifest()
    default = manifest.steps
    if effort is not None:
        default = min(manifest.max_steps, round(default * EFFORTS[effort]))
    steps = int(pick("steps", default))
    require(steps <= manifest.max_steps, "reasoning.steps", f"must be in 0..{manifest.max_steps}")
    trained = manifest.is_trained_for
    if steps not in trained and not manifest.variable_steps:
        warnings.append(f"steps={steps}, but this checkpoint was trained with {trained}")
    return steps


def _token_steps(
    pick: _Picker,
    mode: str,
    model: ModelReasoning,
    effort: str | None,
    num_prompt_tokens: int,
    max_tokens: int,
) -> tuple[int, int | None]:
    """Step budget and stop token of `cot` and `distribution`."""
    if not model.is_thinker and mode != "distribution":
        return 0, None  # without think tokens cot is plain decoding
    room = max(0, model.max_model_len - num_prompt_tokens - max_tokens - 1)
    scale = 1.0 if effort is None else EFFORTS[effort]
    if model.is_thinker:
        default = room if effort is None else min(room, round(_EFFORT_THINKING_TOKENS * scale))
        limit = model.max_model_len
    else:
        default, limit = round(_DEFAULT_SOFT_STEPS * scale), MAX_STEPS
    steps = int(pick("steps", default))
    require(0 <= steps <= limit, "reasoning.steps", f"must be in 0..{limit}")
    return steps, model.think_end_id


def _pick_all(pick: _Picker, kind: type[T], prefix: str) -> T:
    """Build a record whose fields are picked by their names."""
    values = {f.name: pick(f"{prefix}.{f.name}", f.default) for f in fields(kind)}  # type: ignore[arg-type]  # only dataclasses come here
    return kind(**values)


def _unused(pick: _Picker, mode: str, effort: str | None) -> list[str]:
    """Name what the request asked for and the mode does not look at."""
    asked = pick.layers[0][1]
    used = {*pick.parameters, "adapter", "mixture.kind", "halt.rule"}
    used |= {"start", "end"} if mode == "latent" else set()
    used |= {"preset"} if PRESETS.get(asked.get("preset", ""), {}).get("mode") == mode else set()
    unused = sorted(f"reasoning.{name}" for name in asked if name not in used)
    if effort is not None and pick.parameters.get("steps", {}).get("source") != "default":
        unused.append("reasoning_effort")
    return unused


def _trace(pick: _Picker, max_trace: str) -> Any:
    levels = ("none", "summary", "topk", "vectors")
    level = pick("trace", "none")
    require(
        levels.index(level) <= levels.index(max_trace),
        "reasoning.trace",
        f"must be at most {max_trace!r} on this server (--max-trace)",
    )
    return level

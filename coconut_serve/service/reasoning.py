"""From what a request asks of reasoning to resolved parameters, each with its source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

from coconut_serve.checkpoint.manifest import Manifest
from coconut_serve.declare import settings_of
from coconut_serve.errors import InvalidRequestError, require
from coconut_serve.params import (
    AFTER,
    MAX_FORCED_TOKENS,
    MAX_STEPS,
    HaltParams,
    MixtureParams,
    ReasoningParams,
    Select,
    Source,
    SwitchParams,
    TraceLevel,
)
from coconut_serve.reasoning.registry import Feeds, check_params, properties_of
from coconut_serve.service.model import ModelReasoning
from coconut_serve.service.presets import (
    DEFAULT_KIND,
    EFFORTS,
    EOS,
    HARD_TOKENS,
    MIXTURES,
    NOISES,
    PRESETS,
)
from coconut_serve.service.settings import Picker, check_asked, make_picker, unused

_GATED, _GATE = "gated", "gate"  # a kind of mixture, and the kind of adapter it needs
_SWI = "swi"  # the rule of `auto` that has no mixture
# What halt.rule names -> the field of HaltParams without which that rule is off.
_RULES = {
    "learned": "learned_token_ids", "stop_token": "stop_token_ids", "cold_stop": "entropy_below",
    "uncertain": "entropy_above", "converged": "converge_metric",
}  # fmt: skip
_REALIGN = "realign"  # the adapter that serves models without latent training, on request
_FINAL_WORDS = "\n\nThe final answer is"  # what SwiReasoning's code forces behind </think>
_FINAL_ANSWER_TOKENS = 32  # what it allows from there on
_DEFAULT_SOFT_STEPS = 16  # of a model without think tokens that was trained for soft ones
_EFFORT_THINKING_TOKENS = 4096  # what effort scales where thinking is otherwise unbounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """How one request thinks, and how that was decided."""

    params: ReasoningParams
    suffix_ids: tuple[int, ...]  # to append to the prompt
    parameters: dict[str, dict[str, Any]]  # name -> {"value", "source"}
    warnings: tuple[str, ...]
    seed: int | None = None  # of the thinking phase; None: the request's
    after: Mapping[str, Any] = field(default_factory=dict)  # how the answer is drawn otherwise
    branches: int = 1  # sequences of each choice
    select: Select = "first"

    def seeded(self, seed: int, source: str) -> "Resolved":
        """Let the request's seed serve thinking that has none of its own, and tell it."""
        if self.seed is not None:
            return self
        told = {"seed": {"value": seed, "source": source}} if "seed" in self.parameters else {}
        return replace(self, seed=seed, parameters=self.parameters | told)


def check_mode(mode: str, model: ModelReasoning, asked: Mapping[str, Any]) -> None:
    """Refuse a mode that the model does not have.

    Raises:
        InvalidRequestError: With code unsupported_reasoning_mode.
    """
    if mode in model.modes:
        return
    feeds_hidden = properties_of(mode).feeds is Feeds.HIDDEN
    if feeds_hidden and asked.get("adapter") == _REALIGN and _REALIGN in model.adapters:
        return
    hint = ""
    if feeds_hidden:
        hint = (
            f": it has no {'latent mode in its ' if model.manifest else ''}latent_config.json; "
            'the training-free adapter "realign" would be needed, where the engine has it'
        )
    raise InvalidRequestError(
        f"reasoning_mode {mode!r} is not supported by this model{hint}. "
        f"Supported: {', '.join(model.modes)}",
        param="reasoning_mode",
        code="unsupported_reasoning_mode",
    )


def resolve(
    mode: str,
    asked: Mapping[str, Any],
    model: ModelReasoning,
    *,
    effort: str | None,
    trace_bounds: tuple[TraceLevel, TraceLevel],
    num_prompt_tokens: int,
    max_tokens: int,
    has_speed: bool = False,
    is_open: bool = True,
) -> Resolved:
    """Resolve a request's reasoning.

    Args:
        mode: A mode of the model.
        asked: Explicit settings by dotted name, e.g. "mixture.top_k".
        model: What the model can do.
        effort: reasoning_effort, which scales the default step budget.
        trace_bounds: The least detailed trace the server gives, and the most.
        num_prompt_tokens: Length of the prompt before the suffix.
        max_tokens: Answer tokens asked for.
        has_speed: The prompt says how fast to think.
        is_open: `cot` may think: the prompt is not a text that goes on as it is.

    Raises:
        InvalidRequestError: A setting is out of range or not supported.
    """
    check_asked(asked)
    pick = make_picker(mode, asked, model)
    warnings, phase = list[str](), _Phase()
    if model.has_slots(mode):
        phase = _latent_phase(pick, model, effort, warnings)
    elif properties_of(mode).thinks and is_open:
        phase = _token_phase(pick, mode, model, effort, num_prompt_tokens, max_tokens, warnings)
    thinks = phase.steps > 0
    rule = pick("halt.rule", "auto") if thinks else None
    halt = _halt(pick, rule, phase, model) if thinks else HaltParams()
    fed = _fed(pick, mode, model, warnings)
    params = ReasoningParams(
        mode=mode,
        steps=phase.steps,
        is_fixed=(phase.is_counted or rule == "fixed") and not _may_halt(halt, fed),
        end_token_ids=phase.end_ids,
        halt=halt,
        **fed,
        **(_of_thinking(pick, mode) if thinks else {}),
        max_total_steps=pick("max_total_steps", None) or 0,
        **_trace(pick, *trace_bounds),
    )
    check_params(params)
    _note_choices(pick, mode, effort, has_speed)
    seed = pick("seed", None) if thinks else None
    after = {name: value for name in AFTER if (value := pick(f"after.{name}", None)) is not None}
    branches, select = _branches(pick)
    warnings += [*unused(pick, mode, effort), *(_untrained(mode, model) if thinks else ())]
    return Resolved(
        params=params, suffix_ids=phase.start_ids, seed=seed, after=after, select=select,
        parameters=pick.parameters, warnings=tuple(warnings), branches=branches,
    )  # fmt: skip


def _untrained(mode: str, model: ModelReasoning) -> tuple[str, ...]:
    note = f"mode {mode!r}: this model was not trained to think in soft tokens"
    return (note,) if model.lacks_training(mode) else ()


def _may_halt(halt: HaltParams, fed: Mapping[str, Any]) -> bool:
    """Whether a rule or a budget of switches can end the phase before its steps are spent."""
    return halt.may_halt or ("switch" in fed and fed["switch"].max_switches > 0)


def _of_thinking(pick: Picker, mode: str) -> dict[str, Any]:
    """What every phase that has steps takes."""
    return {
        "min_steps": pick("min_steps", 0),
        "noise_std": pick("latent_noise_std", 0.0) if properties_of(mode).feeds_vectors else 0.0,
        "pad_positions": pick("pad_positions", False),
    }


def _note_choices(pick: Picker, mode: str, effort: str | None, has_speed: bool) -> None:
    """Note what was decided elsewhere: mode, preset, effort, speed, and that there are no steps."""
    _speed(pick, has_speed)
    pick("mode", mode)
    pick.settle("mode", mode)
    preset = pick.layers[0][1].get("preset")
    if preset is None or PRESETS[preset]["mode"] == mode:
        pick("preset", None)
    pick.parameters.setdefault("steps", {"value": 0, "source": "default"})
    if effort is None or pick.source("steps") == "effort":
        source = "default" if effort is None else "request"
        pick.parameters["effort"] = {"value": effort, "source": source}


def _speed(pick: Picker, has_speed: bool) -> None:
    """Note the speed that the prompt names; PromptBuilder has put it there."""
    asked = pick.layers[0][1]
    needs = "needs a chat, and a model whose prompt template has {speed}"
    require(has_speed or "speed" not in asked, "reasoning.speed", needs)
    if has_speed:
        pick("speed", None)


def _branches(pick: Picker) -> tuple[int, Select]:
    """How many lines of thought a choice has, and which of them is shown."""
    branches = pick("branches", 1)
    if branches > 1:
        return branches, pick("select", "vote")
    pick.parameters["select"] = {"value": "first", "source": "default"}
    return branches, "first"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Phase:
    """How a thinking phase is bounded."""

    steps: int = 0
    is_counted: bool = False  # the count is exact, unless a halting rule is on
    start_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()  # the model's own end of thought
    source: str = "default"  # of the bounds that the request leaves to the model


def _fed(pick: Picker, mode: str, model: ModelReasoning, warnings: list[str]) -> dict[str, Any]:
    """What the mode feeds."""
    manifest = model.manifest or Manifest()
    own = properties_of(mode)
    if own.feeds is Feeds.HIDDEN:
        return _latent_input(pick, manifest, warnings)
    if own.switches:
        return _switching(pick, model, manifest)
    return _mixture(pick, manifest, is_named=True) if own.feeds is Feeds.MIXTURE else {}


def _source(pick: Picker, known: Sequence[str]) -> str:
    """What is fed, of what the mode can feed; the first unless the request says otherwise."""
    source: str = pick("source", known[0])
    require(source in known, "reasoning.source", f"must be {' or '.join(known)} in this mode")
    return source


def _mixture(pick: Picker, manifest: Manifest, *, is_named: bool = False) -> dict[str, Any]:
    """The mixture, of what its kind looks at, and the adapter of a gated one."""
    if is_named:
        _source(pick, (Feeds.MIXTURE.value,))
    kind = pick("mixture.kind", DEFAULT_KIND)
    values = {name: pick(f"mixture.{name}", own) for name, own in MIXTURES[kind].items()}
    noise = NOISES[values.get("noise", "none")]
    values |= {name: pick(f"mixture.{name}", own) for name, own in noise.items()}
    clamp = tuple(values.get("noise_clamp", ()))
    mixture = MixtureParams(**values | {"kind": kind, "noise_clamp": clamp})
    if mixture.kind != _GATED:
        return {"mixture": mixture}
    adapter = pick("adapter", "auto")
    if adapter == "auto":
        adapter = "default"
        pick.settle("adapter", adapter, "manifest")
    has_gate = adapter in manifest.adapters and manifest.adapters[adapter].type == _GATE
    require(has_gate, "reasoning.mixture.kind", "'gated' needs a model with a trained gate")
    return {"mixture": mixture, "adapter": adapter}


def _switching(pick: Picker, model: ModelReasoning, manifest: Manifest) -> dict[str, Any]:
    """When `auto` switches, and what its soft tokens are: swi's are always the same."""
    hard = pick("switch.hard_tokens", "none")
    hard = HARD_TOKENS[hard] if isinstance(hard, str) else hard
    newline = model.find_token("\n")
    given: dict[str, Any] = {
        "hard_token_ids": _tokens("switch.hard_tokens", hard, model),
        "think_token_id": -1 if model.think_start_id is None else model.think_start_id,
        "end_token_id": -1 if model.think_end_id is None else model.think_end_id,
        "newline_token_id": -1 if newline is None else newline,
    }
    defaults = SwitchParams()
    has_budget = pick("switch.rule", _SWI) == _SWI and pick("switch.max_switches", 0) > 0
    if has_budget and model.think_end_id is not None:
        defaults = replace(defaults, answer_tokens=_FINAL_ANSWER_TOKENS)
        given["final_token_ids"] = _final_words(pick, model, model.think_end_id)
    names = [f.name for f in fields(SwitchParams) if f.name not in (*given, "final_token_ids")]
    asked: dict[str, Any] = {
        name: pick(f"switch.{name}", getattr(defaults, name)) for name in names
    }
    switch = SwitchParams(**given, **asked)
    return {"switch": switch, **(_mixture(pick, manifest) if switch.rule != _SWI else {})}


def _final_words(pick: Picker, model: ModelReasoning, end_id: int) -> tuple[int, ...]:
    """What is fed where the switches are spent; (): what ends any phase, as `end` says."""
    words = (end_id, *(model.encode(_FINAL_WORDS) if model.encode else ()))
    is_usual = pick("end", "auto") == "auto"
    return words if is_usual and 1 < len(words) <= MAX_FORCED_TOKENS else ()


def _latent_input(pick: Picker, manifest: Manifest, warnings: list[str]) -> dict[str, Any]:
    """What a latent step feeds."""
    adapter = pick("adapter", "auto")
    if adapter == "auto":
        has_own = "default" in manifest.adapters
        adapter = "default" if has_own else "none"
        pick.settle("adapter", adapter, "manifest" if has_own else "default")
    if adapter == _REALIGN:
        warnings.append("adapter 'realign': this model was not trained to think in latents")
    source = _source(pick, get_args(Source))
    token = manifest.tokens.latent or manifest.tokens.start
    is_map = adapter not in manifest.adapters or manifest.adapters[adapter].type != _GATE
    require(is_map, "reasoning.adapter", f"{adapter!r} is for mixture.kind 'gated'")
    opens = manifest.tokens.start if manifest.boundary == "model_emitted" else None
    return {
        "end_adds_vector": manifest.halting.end_adds_latent,
        "keeps_last": manifest.halting.keeps_last,
        "enter_token_id": opens.id if opens else None,
        "max_blocks": pick("max_blocks", 64 if opens else 1),
        "adapter": adapter,
        "source": source,
        "constant_token_id": token.id if token and source == "constant" else None,
        "latent_temperature": pick("latent_temperature", 1.0),
        "soft_weight": pick("soft_weight", 0.0),
    }


def _tokens(name: str, tokens: Sequence[int | str], model: ModelReasoning) -> tuple[int, ...]:
    """Ids of tokens given by id or text.

    Those of our own lists, which are tuples, are left out where their text is no token.
    """
    found: list[int] = []
    is_asked = isinstance(tokens, list)
    for token in tokens:
        if token == EOS and not is_asked:
            found += model.eos_token_ids
            continue
        token_id = model.find_token(token)
        is_known = token_id is not None or not is_asked
        require(is_known, f"reasoning.{name}", f"{token!r} is no single token of this model")
        found += [] if token_id is None else [token_id]
    return tuple(found)


def _halt(pick: Picker, rule: Any, phase: _Phase, model: ModelReasoning) -> HaltParams:
    """The halting rules: all that are set up, or those that `rule` names, which then must be."""
    if rule == "fixed":
        return HaltParams()
    named = [] if rule == "auto" else [rule] if isinstance(rule, str) else rule
    off = {setting for name, setting in _RULES.items() if named and name not in named}
    own = settings_of(HaltParams)
    defaults = {name: each.default for name, each in own.items() if name not in off}
    if named and "stop_token_ids" in defaults:
        defaults["stop_token_ids"] = phase.end_ids[:1]
    values = {
        name: pick(f"halt.{own[name].asked or name}", default) for name, default in defaults.items()
    }
    if "stop_token_ids" in values:
        stops = _tokens("halt.stop_tokens", values["stop_token_ids"], model)
        values["stop_token_ids"] = tuple(dict.fromkeys((*phase.stop_ids, *stops)))
        source = phase.source if values["stop_token_ids"] else "default"
        pick.settle("halt.stop_tokens", values["stop_token_ids"], source)
    if "learned_token_ids" in values:
        values["learned_token_ids"] = tuple(values["learned_token_ids"])
    for name in named:
        setting = _RULES[name]
        is_on = values[setting] not in ((), 0, "none")
        if name == "learned":
            require(is_on, "reasoning.halt.rule", "'learned' is not declared by this model")
        param = f"reasoning.halt.{own[setting].asked or setting}"
        require(is_on, param, f"must be set: halt.rule names {name!r}")
    return HaltParams(**values)


def _bound(
    pick: Picker, name: str, model: ModelReasoning, default: tuple[int, ...], source: str
) -> tuple[int, ...]:
    """The tokens at one end of a phase: those of `source` unless the request names others."""
    value = pick(name, "auto")
    ids = default if value == "auto" else ()
    if value not in ("auto", "none"):
        ids = _tokens(name, value if isinstance(value, list | tuple) else [value], model)
    pick.settle(name, ids, source if ids else "default")
    return ids


def _latent_phase(
    pick: Picker, model: ModelReasoning, effort: str | None, warnings: list[str]
) -> _Phase:
    """A phase in latent slots."""
    manifest = model.manifest or Manifest()
    source = "manifest" if model.manifest else "default"
    limit = manifest.max_steps if model.manifest else MAX_STEPS
    scaled = None if effort is None else min(limit, round(manifest.steps * EFFORTS[effort]))
    steps = _steps(pick, manifest.steps, scaled, limit, warnings)
    trained = manifest.is_trained_for
    if model.manifest and steps not in trained and not manifest.variable_steps:
        warnings.append(f"steps={steps}, but this checkpoint was trained with {trained}")
    return _Phase(
        steps=steps,
        is_counted=True,
        start_ids=_bound(pick, "start", model, manifest.start_token_ids, source),
        end_ids=_bound(pick, "end", model, manifest.end_token_ids, source),
        source=source,
    )


def _steps(pick: Picker, default: int, scaled: int | None, limit: int, warnings: list[str]) -> int:
    """How many steps to take: the default, `scaled` where an effort was asked for, or as said."""
    if scaled is not None:
        pick.layers.insert(2, ("effort", {"steps": scaled}))  # before the manifest
    steps = int(pick("steps", default))
    if steps > limit and pick.source("steps") == "preset":
        warnings.append(f"steps={limit}, the most of this model; the preset has {steps}")
        pick.settle("steps", limit)
        return limit
    require(0 <= steps <= limit, "reasoning.steps", f"must be in 0..{limit}")
    return steps


def _token_phase(
    pick: Picker,
    mode: str,
    model: ModelReasoning,
    effort: str | None,
    num_prompt_tokens: int,
    max_tokens: int,
    warnings: list[str],
) -> _Phase:
    """A phase of `cot` or `distribution` in the text: capped, and ended by the think token."""
    if not model.is_thinker and properties_of(mode).thinks_in_text:
        return _Phase()  # without think tokens cot is plain decoding
    stop_ids = () if model.think_end_id is None else (model.think_end_id,)
    source = "manifest" if model.manifest and model.manifest.tokens.think_end else "default"
    end_ids = _bound(pick, "end", model, stop_ids, source)
    may_switch = properties_of(mode).switches and pick("switch.max_switches", 0) > 0
    num_forced = MAX_FORCED_TOKENS if may_switch else len(end_ids)  # its words may be longer
    default = max(0, model.max_model_len - num_prompt_tokens - max_tokens - num_forced)
    base, most, limit = _EFFORT_THINKING_TOKENS, default, model.max_model_len
    if not model.is_thinker:
        default = base = pick("steps", _DEFAULT_SOFT_STEPS)
        most = limit = MAX_STEPS
    scaled = None if effort is None else min(most, round(base * EFFORTS[effort]))
    steps = _steps(pick, default, scaled, limit, warnings)
    return _Phase(steps=steps, end_ids=end_ids, stop_ids=stop_ids, source=source)


def _trace(pick: Picker, least: TraceLevel, most: TraceLevel) -> dict[str, Any]:
    """How much is told of each step, within what the server allows."""
    levels = get_args(TraceLevel)
    level: TraceLevel = pick("trace", "none")
    require(
        levels.index(level) <= levels.index(most),
        "reasoning.trace",
        f"must be at most {most!r} on this server (--max-trace)",
    )
    if levels.index(level) < levels.index(least):
        level = least
        pick.parameters["trace"] = {"value": level, "source": "server"}
    return {"trace": level, "trace_top_k": pick("trace_top_k", 5)}

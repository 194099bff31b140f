"""Resolves a request's reasoning settings, each with its source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from coconut_serve.checkpoint.manifest import Manifest
from coconut_serve.declare import names_of, settings_of
from coconut_serve.errors import InvalidRequestError, require
from coconut_serve.params import (
    AFTER,
    MAX_FORCED_TOKENS,
    HaltParams,
    MixtureParams,
    ReasoningParams,
    Select,
    Source,
    SwitchParams,
    TraceLevel,
)
from coconut_serve.reasoning.registry import Feeds, check_params, properties_of
from coconut_serve.service.layers import Settings, Told, check_asked, fields_of, merge
from coconut_serve.service.model import ModelReasoning
from coconut_serve.service.phases import Bounds, bound_thinking, tokens_of
from coconut_serve.service.presets import HARD_TOKENS
from coconut_serve.service.relevance import GATED, RULES, SWI, named_rules, relevant, unused

_HIDDEN_SOURCE = settings_of(ReasoningParams)["source"].default
_GATE = "gate"  # the kind of adapter that a gated mixture needs
_REALIGN = "realign"  # the adapter that serves models without latent training, on request
_FINAL_WORDS = "\n\nThe final answer is"  # SwiReasoning's code forces this after </think>
_FINAL_ANSWER_TOKENS = 32  # and allows so many from there on


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The resolved reasoning of one request, with the source of each setting."""

    params: ReasoningParams
    suffix_ids: tuple[int, ...]  # to append to the prompt
    parameters: dict[str, dict[str, Any]]  # name -> {"value", "source"}
    warnings: tuple[str, ...]
    seed: int | None = None  # of the thinking phase; None: the request's
    after: Mapping[str, Any] = field(default_factory=dict)  # sampling settings of the answer alone
    branches: int = 1  # sequences of each choice
    select: Select = "first"

    def seeded(self, seed: int, source: str) -> "Resolved":
        """Use the request's seed for thinking without a seed of its own, and report it."""
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
    hint = f": it has no {'latent mode in its ' if model.manifest else ''}latent_config.json; "
    hint += 'the training-free adapter "realign" would be needed, where the engine has it'
    what = f"reasoning_mode {mode!r} is not supported by this model{hint if feeds_hidden else ''}"
    text = f"{what}. Supported: {', '.join(model.modes)}"
    raise InvalidRequestError(text, param="reasoning_mode", code="unsupported_reasoning_mode")


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

    `asked` holds its explicit settings by dotted name, e.g. "mixture.top_k"; `trace_bounds` the
    least and the most detailed trace the server gives. `has_speed`: the prompt says how fast to
    think. `is_open`: thinking in text is possible; not so in a text that is continued unchanged.

    Raises:
        InvalidRequestError: A setting is out of range or not supported.
    """
    check_asked(asked)
    asked = asked if effort is None else {**asked, "effort": effort}
    merged, num_taken = merge(mode, asked, model), num_prompt_tokens + max_tokens
    bounds = bound_thinking(mode, merged, model, num_taken, is_open=is_open)
    seen = relevant(mode, merged, bounds, has_speed=has_speed)
    params, worked = _params(mode, seen, bounds, model, trace_bounds)
    needs = "needs a chat, and a model whose prompt template has {speed}"
    require(has_speed or "speed" not in asked, "reasoning.speed", needs)
    told = {"select": Told("first"), **seen, **worked}
    ignored = unused(asked.keys() - seen.keys(), told, mode)
    preset_steps = merged["steps"].value if bounds.steps.source == "preset" else 0
    return Resolved(
        params=params, suffix_ids=bounds.ids("start"), seed=seen.get("seed", Told()).value,
        after={name: v for name in AFTER if (v := seen[f"after.{name}"].value) is not None},
        branches=seen["branches"].value, select=told["select"].value,
        parameters={name: each._asdict() for name, each in told.items()},
        warnings=_warnings(params, model, preset_steps, ignored),
    )  # fmt: skip


def _warnings(
    params: ReasoningParams, model: ModelReasoning, preset_steps: int, ignored: Sequence[str]
) -> tuple[str, ...]:
    """Warnings where settings depart from the request, its preset or the model's training."""
    mode, steps, notes = params.mode, params.steps, list[str]()
    if steps < preset_steps:
        notes.append(f"steps={steps}, the most of this model; the preset has {preset_steps}")
    if model.manifest and model.has_slots(mode) and not model.manifest.variable_steps:
        trained = model.manifest.trained_step_counts
        if steps not in trained:
            notes.append(f"steps={steps}, but this checkpoint was trained with {trained}")
    if params.adapter == _REALIGN:
        notes.append("adapter 'realign': this model was not trained to think in latents")
    notes += ignored
    if steps and model.lacks_training(mode):
        notes.append(f"mode {mode!r}: this model was not trained to think in soft tokens")
    return tuple(notes)


def _params(
    mode: str, seen: Settings, bounds: Bounds, model: ModelReasoning,
    trace_bounds: tuple[TraceLevel, TraceLevel],
) -> tuple[ReasoningParams, Settings]:  # fmt: skip
    """The engine's parameters, and the settings derived for them."""
    halt, stops = _halt(seen, bounds, model)
    fed, feeding = _fed(mode, seen, model)
    own = {"mode": seen["mode"].settled(mode), "steps": bounds.steps}
    worked = {**bounds.told, **own, **stops, **feeding, **_trace(seen, *trace_bounds)}
    is_exact = model.has_slots(mode) or seen.get("halt.rule", Told()).value == "fixed"
    is_fixed = is_exact and not halt.may_halt and fed["switch"].max_switches == 0
    fields = fields_of(ReasoningParams, {**seen, **worked}) | fed
    fields |= {"end_token_ids": bounds.ids("end"), "halt": halt, "is_fixed": is_fixed}
    params = ReasoningParams(**fields)
    check_params(params)
    return params, worked


def _halt(seen: Settings, bounds: Bounds, model: ModelReasoning) -> tuple[HaltParams, Settings]:
    """The halting rules: all configured ones, or those `halt.rule` names, which must be set up."""
    named = named_rules(seen["halt.rule"].value) if "halt.rule" in seen else []
    told, name = dict[str, Told](), "halt.stop_tokens"
    if name in seen:
        stops = seen[name].or_else(bounds.ids("end")[:1] if named else ()).value
        ids = tuple(dict.fromkeys((*bounds.stop_ids, *tokens_of(name, stops, model))))
        told[name] = seen[name].settled(ids, bounds.source if ids else "default")
    found = fields_of(HaltParams, {**seen, **told})
    for rule in named:
        needed = RULES[rule]
        is_on = found[needed] not in ((), 0, "none")
        if rule == "learned":
            require(is_on, "reasoning.halt.rule", "'learned' is not declared by this model")
        param = f"reasoning.{names_of(HaltParams)[needed]}"
        require(is_on, param, f"must be set: halt.rule names {rule!r}")
    return HaltParams(**found), told


def _fed(mode: str, seen: Settings, model: ModelReasoning) -> tuple[dict[str, Any], Settings]:
    """What the mode feeds, as fields of ReasoningParams, and the settings derived for it."""
    manifest, is_hidden = model.manifest or Manifest(), properties_of(mode).feeds is Feeds.HIDDEN
    fed, told = dict[str, Any](switch=SwitchParams()), dict[str, Told]()
    if "source" in seen:
        known = get_args(Source) if is_hidden else (Feeds.MIXTURE.value,)
        told["source"] = source = seen["source"].or_else(known[0])
        what = f"must be {' or '.join(known)} in this mode"
        require(source.value in known, "reasoning.source", what)
        fed |= _latents(manifest, source.value) if is_hidden else {"source": _HIDDEN_SOURCE}
    if "max_blocks" in seen:
        own = settings_of(ReasoningParams)["max_blocks"]
        most = own.high if fed["enter_token_id"] is not None else own.default
        told["max_blocks"] = seen["max_blocks"].or_else(most)
    if "switch.rule" in seen:
        fed["switch"], switching = _switch(seen, model)
        told |= switching
    fed["mixture"] = mixture = MixtureParams(**fields_of(MixtureParams, seen))
    if "adapter" in seen:
        told["adapter"] = _adapter(seen, manifest, is_gated=mixture.kind == GATED)
    return fed, told


def _latents(manifest: Manifest, source: str) -> dict[str, Any]:
    """Fields that say how the model was trained on hidden states."""
    opens = manifest.tokens.start if manifest.boundary == "model_emitted" else None
    token = manifest.tokens.latent or manifest.tokens.start
    return {
        "end_adds_vector": manifest.halting.end_adds_latent,
        "keeps_last": manifest.halting.keeps_last,
        "enter_token_id": opens.id if opens else None,
        "constant_token_id": token.id if token and source == "constant" else None,
    }


def _adapter(seen: Settings, manifest: Manifest, *, is_gated: bool) -> Told:
    """The adapter of hidden states, or the gate of a gated mixture."""
    adapter, own = seen["adapter"], manifest.adapters
    if adapter.value == "auto":
        has_own = "default" in own
        adapter = adapter.settled("default", "manifest") if has_own else adapter.settled("none")
    has_gate = adapter.value in own and own[adapter.value].type == _GATE
    if is_gated:
        require(has_gate, "reasoning.mixture.kind", "'gated' needs a model with a trained gate")
    else:
        require(not has_gate, "reasoning.adapter", f"{adapter.value!r} is for mixture.kind 'gated'")
    return adapter


def _switch(seen: Settings, model: ModelReasoning) -> tuple[SwitchParams, Settings]:
    """When the mode switches, and what it feeds once its switches are spent."""
    hard, end_id = seen["switch.hard_tokens"].value, model.think_end_id
    hard = HARD_TOKENS[hard] if isinstance(hard, str) else hard
    found = {
        "think_token_id": model.think_start_id, "end_token_id": end_id,
        "newline_token_id": model.find_token("\n"),
    }  # fmt: skip
    ids: dict[str, Any] = {name: -1 if i is None else i for name, i in found.items()}
    ids["hard_token_ids"] = tokens_of("switch.hard_tokens", hard, model)
    told = dict[str, Told]()
    has_budget = seen["switch.rule"].value == SWI and seen["switch.max_switches"].value > 0
    if has_budget and end_id is not None and "end" in seen:
        answer = seen["switch.answer_tokens"]
        is_free = answer.source == "default"
        told["switch.answer_tokens"] = Told(_FINAL_ANSWER_TOKENS) if is_free else answer
        told["end"] = seen["end"]  # as requested: the final words may be fed instead
        words = (end_id, *(model.encode(_FINAL_WORDS) if model.encode else ()))
        if seen["end"].value == "auto" and 1 < len(words) <= MAX_FORCED_TOKENS:
            ids["final_token_ids"] = words
    return SwitchParams(**fields_of(SwitchParams, {**seen, **told}) | ids), told


def _trace(seen: Settings, least: TraceLevel, most: TraceLevel) -> Settings:
    """The trace level, where the server raises it above the request's."""
    levels, level = get_args(TraceLevel), seen["trace"].value
    is_allowed = levels.index(level) <= levels.index(most)
    require(is_allowed, "reasoning.trace", f"must be at most {most!r} on this server (--max-trace)")
    is_raised = levels.index(level) < levels.index(least)
    return {"trace": Told(least, "server")} if is_raised else {}

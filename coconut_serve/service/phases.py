"""Bounds of a thinking phase: its number of steps and the tokens at its ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from coconut_serve.checkpoint.manifest import Manifest
from coconut_serve.errors import require
from coconut_serve.params import MAX_FORCED_TOKENS, MAX_STEPS
from coconut_serve.reasoning.registry import properties_of
from coconut_serve.service.layers import Settings, Told
from coconut_serve.service.model import ModelReasoning
from coconut_serve.service.presets import EFFORTS, EOS

_DEFAULT_SOFT_STEPS = 16  # of a model trained for soft tokens, without think tokens
_EFFORT_THINKING_TOKENS = 4096  # effort scales this where thinking is otherwise unbounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds of a thinking phase; the default is no phase."""

    told: Settings = field(default_factory=dict)  # final steps, start and end
    stop_ids: tuple[int, ...] = ()  # the model's own end of thought
    source: str = "default"  # of the bounds that the request leaves to the model

    @property
    def steps(self) -> Told:
        return self.told.get("steps", Told(0))

    def ids(self, name: str) -> tuple[int, ...]:
        """The tokens at its "start" or "end"."""
        ids: tuple[int, ...] = self.told.get(name, Told(())).value
        return ids


def bound_thinking(
    mode: str, merged: Settings, model: ModelReasoning, num_taken: int, *, is_open: bool
) -> Bounds:
    """Bound a phase of latent positions, or of text if `is_open`, beside `num_taken` others.

    Raises:
        InvalidRequestError: Too many steps, or a text that is not a token.
    """
    if model.has_slots(mode):
        return _in_slots(merged, model)
    own = properties_of(mode)
    # Without think tokens, thinking in plain text is plain decoding.
    thinks = own.thinks and is_open and (model.is_thinker or not own.thinks_in_text)
    return _in_text(mode, merged, model, num_taken) if thinks else Bounds()


def _in_slots(merged: Settings, model: ModelReasoning) -> Bounds:
    """Bound a phase of latent positions."""
    manifest = model.manifest or Manifest()
    source = "manifest" if model.manifest else "default"
    limit = manifest.max_steps if model.manifest else MAX_STEPS
    scaled = _scale(merged, manifest.steps, limit)
    told = {
        "steps": _steps(merged, manifest.steps, scaled, limit),
        "start": _bound(merged, "start", model, manifest.start_token_ids, source),
        "end": _bound(merged, "end", model, manifest.end_token_ids, source),
    }
    return Bounds(told=told, source=source)


def _in_text(mode: str, merged: Settings, model: ModelReasoning, num_taken: int) -> Bounds:
    """Bound a phase of text: capped, and ended by the think token."""
    stop_ids = () if model.think_end_id is None else (model.think_end_id,)
    source = "manifest" if model.manifest and model.manifest.tokens.think_end else "default"
    end = _bound(merged, "end", model, stop_ids, source)
    may_switch = properties_of(mode).switches and merged["switch.max_switches"].value > 0
    num_forced = MAX_FORCED_TOKENS if may_switch else len(end.value)  # final words may be longer
    if model.is_thinker:
        default, limit = max(0, model.max_model_len - num_taken - num_forced), model.max_model_len
        scaled = _scale(merged, _EFFORT_THINKING_TOKENS, default)
    else:
        default, limit = merged["steps"].or_else(_DEFAULT_SOFT_STEPS).value, MAX_STEPS
        scaled = _scale(merged, default, limit)
    told = {"steps": _steps(merged, default, scaled, limit), "end": end}
    return Bounds(told=told, stop_ids=stop_ids, source=source)


def _scale(merged: Settings, steps: int, most: int) -> int | None:
    effort = merged["effort"].value
    return None if effort is None else min(most, round(steps * EFFORTS[effort]))


def _steps(merged: Settings, default: int, scaled: int | None, limit: int) -> Told:
    """The number of steps; an effort overrides the manifest, but neither preset nor request."""
    steps = merged["steps"].or_else(default)
    if scaled is not None and steps.source not in ("request", "preset"):
        steps = Told(scaled, "effort")
    if steps.source == "preset":
        steps = Told(min(steps.value, limit), steps.source)
    require(0 <= steps.value <= limit, "reasoning.steps", f"must be in 0..{limit}")
    return steps


def _bound(
    merged: Settings, name: str, model: ModelReasoning, default: tuple[int, ...], source: str
) -> Told:
    """The tokens at one end of a phase: those of `source` unless the request names others."""
    value = merged[name].value
    ids = default if value == "auto" else ()
    if value not in ("auto", "none"):
        ids = tokens_of(name, value if isinstance(value, list | tuple) else [value], model)
    return merged[name].settled(ids, source if ids else "default")


def tokens_of(name: str, tokens: Sequence[int | str], model: ModelReasoning) -> tuple[int, ...]:
    """Ids of tokens given by id or text.

    Our own lists, which are tuples, skip texts that are not a token.

    Raises:
        InvalidRequestError: A text of the request is not a single token.
    """
    found, is_asked = list[int](), isinstance(tokens, list)
    for token in tokens:
        if token == EOS and not is_asked:
            found += model.eos_token_ids
            continue
        token_id = model.find_token(token)
        is_known = token_id is not None or not is_asked
        require(is_known, f"reasoning.{name}", f"{token!r} is no single token of this model")
        found += [] if token_id is None else [token_id]
    return tuple(found)

"""Merges the layers of a request's settings; each setting keeps its value and source."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from coconut_serve.checkpoint.manifest import Manifest
from coconut_serve.declare import names_of
from coconut_serve.params import ASKED, HaltParams, MixtureParams, SwitchParams
from coconut_serve.reasoning.registry import Feeds, properties_of
from coconut_serve.service.model import ModelReasoning, has_slots
from coconut_serve.service.presets import DEFAULT_KIND, MIXTURES, PRESETS, UNTRAINED

_LEARNED = "halt.learned_token_ids"  # set by manifests, never by requests


class Told(NamedTuple):
    """A setting's value and source; None: unset, so its value depends on other settings."""

    value: Any = None
    source: str = "default"  # or request, preset, manifest, effort, server (its bounds)

    def or_else(self, default: Any) -> "Told":
        """Itself, or `default` if unset."""
        return Told(default) if self.value is None else self

    def settled(self, value: Any, source: str = "default") -> "Told":
        """The final value; `source` counts only if nobody set it."""
        return Told(value, source if self.source == "default" else self.source)


Settings = Mapping[str, Told]  # by dotted name
_DEFAULTS: Settings = {_LEARNED: Told(()), **{n: Told(own.unsaid) for n, own in ASKED.items()}}


def merge(mode: str, asked: Mapping[str, Any], model: ModelReasoning) -> Settings:
    """Merge request, preset, manifest and declared defaults; the first of them wins."""
    manifest = model.manifest or Manifest()
    preset = PRESETS.get(asked.get("preset", ""), {})
    declared = _declared(manifest, mode)
    trained = manifest.distribution.kind or DEFAULT_KIND
    if "mixture.kind" in preset or asked.get("mixture.kind", trained) != trained:
        # The manifest's numbers are for its own kind, and a preset is the same on every model.
        declared = {k: v for k, v in declared.items() if not k.startswith("mixture.")}
    mild: dict[str, Any] = {}
    if model.lacks_training(mode) and not model.is_thinker and not preset:
        parts = {name.partition(".")[0] for name in asked}
        mild = {name: v for name, v in UNTRAINED.items() if name.partition(".")[0] not in parts}
    kind = (declared | preset | {**asked}).get("mixture.kind", DEFAULT_KIND)
    of_kind = {f"mixture.{name}": value for name, value in MIXTURES.get(kind, {}).items()}
    layers = {"default": of_kind | mild, "manifest": declared, "preset": preset, "request": asked}
    told = {**_DEFAULTS}
    for source, layer in layers.items():
        told |= {name: Told(value, source) for name, value in layer.items()}
    return told


def _declared(manifest: Manifest, mode: str) -> dict[str, Any]:
    """The manifest's settings, under their names in a request."""
    own = properties_of(mode)
    declared = {f"mixture.{name}": value for name, value in manifest.distribution.mixture.items()}
    declared["speed"] = manifest.prompt.speed
    declared |= {"mode": mode} if manifest.default_mode == mode else {}
    if own.feeds is Feeds.HIDDEN and "source" in manifest.model_fields_set:
        declared["source"] = manifest.source
    if has_slots(mode, manifest) and "steps" in manifest.model_fields_set:
        declared["steps"] = manifest.steps
    halting = manifest.halting
    if own.is_steady and halting.rule != "fixed":
        is_drawn = halting.test == "sampled"
        declared["halt.stop_temperature"] = halting.temperature
        declared["min_steps"] = halting.min_steps
        if halting.rule == "binary_rows":
            declared |= {_LEARNED: halting.token_ids, "halt.sample": is_drawn}
        else:
            declared |= {"halt.stop_tokens": halting.token_ids, "halt.stop_test": halting.test}
    return declared


def fields_of(kind: Any, told: Settings) -> dict[str, Any]:
    """Values of a record's settings by field name; lists become tuples."""
    found = {field: told[name].value for field, name in names_of(kind).items() if name in told}
    values = ((field, value) for field, value in found.items() if value is not None)
    return {field: tuple(v) if isinstance(v, list) else v for field, v in values}


def check_asked(asked: Mapping[str, Any]) -> None:
    """Check each requested setting, whether or not the mode uses it.

    Raises:
        InvalidRequestError: A setting is out of range.
    """
    for name, value in asked.items():
        if name in ASKED:
            ASKED[name].check(value, f"reasoning.{name}")
    told = {name: Told(value) for name, value in asked.items()}
    for part in (MixtureParams, HaltParams, SwitchParams):
        part(**fields_of(part, told))

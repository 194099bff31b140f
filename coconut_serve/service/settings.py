"""Where the settings of a request come from, and which of those asked for are looked at."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from coconut_serve.checkpoint.manifest import Manifest
from coconut_serve.params import ASKED, HaltParams, MixtureParams, SwitchParams
from coconut_serve.reasoning.registry import Feeds, properties_of
from coconut_serve.service.model import ModelReasoning, has_slots
from coconut_serve.service.presets import DEFAULT_KIND, NOISES, PRESETS, UNTRAINED

_PARTS = {"mixture.": MixtureParams, "halt.": HaltParams, "switch.": SwitchParams}
_OF_NOISE = {f"mixture.{name}" for settings in NOISES.values() for name in settings}


@dataclass(slots=True)
class Picker:
    """Looks a setting up in the request, the preset, the manifest and the defaults.

    A source is one of these four, "effort" (the request's) or "server" (its bounds).
    """

    layers: list[tuple[str, Mapping[str, Any]]]  # source name, settings
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, name: str, default: Any) -> Any:
        """The value of a setting, by its dotted name; noted with its source."""
        source, value = next(
            ((source, layer[name]) for source, layer in self.layers if name in layer),
            ("default", default),
        )
        self.parameters[name] = {"value": value, "source": source}
        return value

    def source(self, name: str) -> str:
        """Where a setting that was looked up came from."""
        return str(self.parameters[name]["source"])

    def settle(self, name: str, value: Any, source: str = "default") -> None:
        """Note what a setting came to, and whose it is if neither request nor preset set it."""
        noted = self.source(name)
        self.parameters[name] = {"value": value, "source": source if noted == "default" else noted}


def check_asked(asked: Mapping[str, Any]) -> None:
    """Check what was asked for by itself, whether the mode looks at it or not.

    Raises:
        InvalidRequestError: A setting is out of range.
    """
    for name, value in asked.items():
        if name in ASKED:
            ASKED[name].check(value, f"reasoning.{name}")
    for prefix, part in _PARTS.items():
        names = {f.name for f in fields(part)}
        part(**{name: asked[prefix + name] for name in names if prefix + name in asked})


def make_picker(mode: str, asked: Mapping[str, Any], model: ModelReasoning) -> Picker:
    """Where settings come from, first come first served."""
    manifest = model.manifest or Manifest()
    preset = PRESETS.get(asked.get("preset", ""), {})
    declared = _declared(manifest, mode)
    trained = manifest.distribution.kind or DEFAULT_KIND
    if "mixture.kind" in preset or asked.get("mixture.kind", trained) != trained:
        # Numbers mean nothing for another kind, and a preset is the same on every model.
        declared = {k: v for k, v in declared.items() if not k.startswith("mixture.")}
    mild: dict[str, Any] = {}
    if model.lacks_training(mode) and not model.is_thinker and not preset:
        parts = {name.partition(".")[0] for name in asked}
        mild = {name: v for name, v in UNTRAINED.items() if name.partition(".")[0] not in parts}
    layers = [("request", asked), ("preset", preset), ("manifest", declared), ("default", mild)]
    return Picker(layers)


def _declared(manifest: Manifest, mode: str) -> dict[str, Any]:
    """What the manifest says of settings, by the names of a request."""
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
            declared |= {"halt.learned_token_ids": halting.token_ids, "halt.sample": is_drawn}
        else:
            declared |= {"halt.stop_tokens": halting.token_ids, "halt.stop_test": halting.test}
    return declared


def unused(pick: Picker, mode: str, effort: str | None) -> list[str]:
    """Warn of what the request asked for and nobody looks at."""
    asked = pick.layers[0][1]
    used = {name for name in pick.parameters if pick.source(name) in ("request", "server")}
    ignored: dict[str, list[str]] = {}
    for name in sorted(asked.keys() - used):
        cause = _cause(name, pick.parameters) or f"in mode {mode}"
        ignored.setdefault(cause, []).append(f"reasoning.{name}")
    if effort is not None and "effort" not in pick.parameters:
        ignored.setdefault(f"in mode {mode}", []).append("reasoning_effort")
    return [f"without effect {cause}: {', '.join(names)}" for cause, names in ignored.items()]


def _cause(name: str, parameters: Mapping[str, Mapping[str, Any]]) -> str:
    """The choice because of which a setting of the mixture is not looked at, if it is one."""
    choice = "mixture.noise" if name in _OF_NOISE else "mixture.kind"
    choice = choice if choice in parameters else "mixture.kind"
    is_chosen = name.startswith("mixture.") and choice in parameters
    return f"with {choice} {parameters[choice]['value']!r}" if is_chosen else ""

"""Which settings a request's thinking uses, and warnings for those without effect."""

from collections.abc import Collection

from coconut_serve.declare import names_of
from coconut_serve.params import AFTER, ASKED, HaltParams
from coconut_serve.reasoning.registry import Feeds, properties_of
from coconut_serve.service.layers import Settings
from coconut_serve.service.phases import Bounds
from coconut_serve.service.presets import MIXTURES, NOISES, PRESETS

GATED = "gated"  # the kind of mixture that has an adapter
SWI = "swi"  # the switching rule without a mixture
# Name in halt.rule -> the field of HaltParams that turns the rule on.
RULES = {
    "learned": "learned_token_ids", "stop_token": "stop_token_ids", "cold_stop": "entropy_below",
    "uncertain": "entropy_above", "converged": "converge_metric",
}  # fmt: skip
_AFTER = [f"after.{name}" for name in AFTER]
_ALWAYS = ("mode", "max_total_steps", "trace", "trace_top_k", "branches", *_AFTER)
_THINKING = ("halt.rule", "min_steps", "pad_positions", "seed")
_HIDDEN = ("adapter", "source", "max_blocks")
_SWITCHING = [name for name in ASKED if name.startswith("switch.")]
_OF_NOISE = {f"reasoning.mixture.{name}" for settings in NOISES.values() for name in settings}


def relevant(mode: str, merged: Settings, bounds: Bounds, *, has_speed: bool) -> Settings:
    """The settings in use; reading any other is a KeyError.

    They follow from the mode's properties, the choices among the settings (kind, noise, rules),
    the bounds of the thinking phase, and whether the prompt says how fast to think.
    """
    own, preset = properties_of(mode), merged["preset"].value
    thinks, soft = bounds.steps.value > 0, own.feeds is Feeds.MIXTURE
    has_effort = bounds.steps.source == "effort" or merged["effort"].value is None
    mixes = soft and not (own.switches and merged["switch.rule"].value == SWI)
    groups: tuple[tuple[bool, Collection[str]], ...] = (
        (True, _ALWAYS),
        (True, bounds.told),
        (has_effort, ["effort"]),
        (has_speed, ["speed"]),
        (preset is None or PRESETS[preset]["mode"] == mode, ["preset"]),
        (merged["branches"].value > 1, ["select"]),
        (thinks, _THINKING),
        (thinks, _halting(merged["halt.rule"].value) if thinks else ()),
        (thinks and own.feeds_vectors, ["latent_noise_std"]),
        (own.feeds is Feeds.HIDDEN, _HIDDEN),
        (True, own.settings),
        (own.switches, _SWITCHING),
        (soft and own.is_steady, ["source"]),
        (mixes, _mixing(merged) if mixes else ()),
    )
    return {name: merged[name] for is_on, names in groups if is_on for name in names}


def _mixing(merged: Settings) -> list[str]:
    """Settings that the chosen mixture kind and its noise use."""
    own = MIXTURES[merged["mixture.kind"].value]
    noise = NOISES[merged["mixture.noise"].value] if "noise" in own else ()
    names = [f"mixture.{name}" for name in ("kind", *own, *noise)]
    return names + (["adapter"] if merged["mixture.kind"].value == GATED else [])


def named_rules(rule: str | list[str]) -> list[str]:
    """The halting rules that halt.rule names; [] for auto (all configured) and fixed (none)."""
    return [] if rule in ("auto", "fixed") else [rule] if isinstance(rule, str) else rule


def _halting(rule: str | list[str]) -> list[str]:
    """Settings that the halting rules use."""
    named = named_rules(rule)
    off = {field for name, field in RULES.items() if named and name not in named}
    names = names_of(HaltParams) if rule != "fixed" else {}
    return [name for field, name in names.items() if field not in off]


def unused(names: Collection[str], told: Settings, mode: str) -> list[str]:
    """Warnings for settings without effect, with the choice that disables them."""
    causes: dict[str, list[str]] = {}
    paths = {"effort": "reasoning_effort"}
    for name in sorted(paths.get(name, f"reasoning.{name}") for name in names):
        choice = "mixture.noise" if name in _OF_NOISE else "mixture.kind"
        choice = choice if choice in told else "mixture.kind"
        is_chosen = name.startswith("reasoning.mixture.") and choice in told
        cause = f"with {choice} {told[choice].value!r}" if is_chosen else f"in mode {mode}"
        causes.setdefault(cause, []).append(name)
    return [f"without effect {cause}: {', '.join(names)}" for cause, names in causes.items()]

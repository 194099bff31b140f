"""The reasoning modes and their properties. Importing this loads no torch.

A new mode is one file in modes/ and one line here. All other code reads the properties: only this
file, modes/ and presets name a mode.
"""

from dataclasses import dataclass
from enum import StrEnum

from coconut_serve.errors import require
from coconut_serve.params import ReasoningParams

_MODES_OF_PACKAGE = "coconut_serve.reasoning.modes"


class Feeds(StrEnum):
    """What a thinking step feeds back; in metrics, the value labels the rows fed with it."""

    TOKEN = "decode"
    HIDDEN = "latent"  # the hidden state, or what an adapter makes of it
    MIXTURE = "distribution"  # a weighted mean of embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeProperties:
    """What other code must know of a mode without loading its class."""

    where: str  # module:Class
    feeds: Feeds = Feeds.HIDDEN
    thinks: bool = True  # False: there is no thinking phase
    switches: bool = False  # some steps may feed tokens
    settings: tuple[str, ...] = ()  # of `reasoning`, read by this mode alone

    @property
    def feeds_vectors(self) -> bool:
        """Whether steps feed vectors; otherwise every input is a token that clients see."""
        return self.feeds is not Feeds.TOKEN

    @property
    def is_steady(self) -> bool:
        """Whether every thinking step feeds a vector."""
        return self.feeds_vectors and not self.switches

    @property
    def has_text(self) -> bool:
        """Whether a step stands for a token."""
        return self.feeds is not Feeds.HIDDEN

    @property
    def thinks_in_text(self) -> bool:
        """Whether thoughts are ordinary text."""
        return self.thinks and self.feeds is Feeds.TOKEN


_MODES = {
    "none": ModeProperties(
        where=f"{_MODES_OF_PACKAGE}.none:NoneMode", feeds=Feeds.TOKEN, thinks=False
    ),
    "cot": ModeProperties(where=f"{_MODES_OF_PACKAGE}.cot:CotMode", feeds=Feeds.TOKEN),
    "latent": ModeProperties(
        where=f"{_MODES_OF_PACKAGE}.latent:LatentMode",
        settings=("latent_temperature", "soft_weight"),
    ),
    "distribution": ModeProperties(
        where=f"{_MODES_OF_PACKAGE}.distribution:DistributionMode", feeds=Feeds.MIXTURE
    ),
    "auto": ModeProperties(
        where=f"{_MODES_OF_PACKAGE}.auto:AutoMode", feeds=Feeds.MIXTURE, switches=True
    ),
}
NO_THINKING = "none"


def mode_names() -> tuple[str, ...]:
    """Return the names of all modes, in the order users see."""
    return tuple(_MODES)


def properties_of(name: str) -> ModeProperties:
    """Return the properties of a mode.

    Raises:
        KeyError: No mode has this name.
    """
    return _MODES[name]


def untrained_modes() -> tuple[str, ...]:
    """Return the modes that work with any model; hidden states need training or an adapter."""
    return tuple(name for name, own in _MODES.items() if own.feeds is not Feeds.HIDDEN)


def check_params(params: ReasoningParams) -> None:
    """Check settings against their mode.

    Raises:
        InvalidRequestError: One does not suit the mode; `param` names it.
    """
    mode, own = params.mode, properties_of(params.mode)
    require(own.thinks or params.steps == 0, "reasoning.steps", f"must be 0 in mode {mode}")
    is_bound = own.thinks or not params.end_token_ids
    require(is_bound, "reasoning.end", f"must be none in mode {mode}")
    metric, name = params.halt.converge_metric, "reasoning.halt.converge_metric"
    is_measured = own.feeds_vectors or metric not in ("cosine", "rel_l2")
    what = f"must be kl or argmax_stable: {mode} has no vectors to compare"
    require(is_measured, name, what)
    mixes = own.feeds is Feeds.MIXTURE and own.is_steady
    is_drawn = mixes and params.mixture.kind in ("moi", "gated")
    can_go_on = is_drawn or not params.mixture.in_answer
    require(can_go_on, "reasoning.mixture.in_answer", "is for moi and gated distributions")

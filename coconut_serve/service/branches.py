"""Branches of a choice need noise: without it they would all be the same."""

from coconut_serve.params import ReasoningParams
from coconut_serve.reasoning.registry import Feeds, properties_of


def has_noise(params: ReasoningParams, temperature: float, adapter_type: str | None) -> bool:
    """Whether branches of a request differ.

    Args:
        params: Its reasoning settings.
        temperature: Of its sampled tokens.
        adapter_type: Of its adapter in the manifest; None without one.
    """
    if params.steps == 0:
        return False
    mixture, halt = params.mixture, params.halt
    own = properties_of(params.mode)
    mixes = own.feeds is Feeds.MIXTURE and mixture.kind == "topk"
    draws_tokens = not own.is_steady or mixture.kind in ("moi", "gated", "multiplex")
    return (
        params.noise_std > 0
        or (mixes and mixture.noise != "none")
        or (adapter_type == "gaussian_head" and params.latent_temperature > 0)
        or (halt.sample and bool(halt.learned_token_ids))
        or (halt.stop_test == "sampled" and bool(halt.stop_token_ids))
        or (draws_tokens and temperature > 0)
    )

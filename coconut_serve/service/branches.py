"""Several lines of thought for one choice: which of them become the answer."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from coconut_serve.params import ReasoningParams, Select
from coconut_serve.reasoning.registry import Feeds, properties_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One branch that has ended."""

    text: str
    logprobs: Sequence[float]  # of its answer tokens
    place: int  # in the order in which they ended


def choose(branches: Sequence[Branch], select: Select) -> list[int]:
    """Pick the branches to show.

    Args:
        branches: All of one choice.
        select: first: the one that ended first. vote: the answer that most agree on, of those that
            agree the earliest. logprob: the answer of the highest mean log-probability a token.
            all: every one.
    """
    everyone = range(len(branches))
    match select:
        case "all":
            return list(everyone)
        case "first":
            return [min(everyone, key=lambda i: branches[i].place)]
        case "vote":
            texts = [branch.text.strip() for branch in branches]
            count = Counter(texts)
            return [max(everyone, key=lambda i: (count[texts[i]], -i))]
        case "logprob":
            return [max(everyone, key=lambda i: fmean(branches[i].logprobs or [float("-inf")]))]


def has_noise(params: ReasoningParams, temperature: float, adapter_type: str | None) -> bool:
    """Whether branches of a request differ: without any noise they would all be the same.

    Args:
        params: How it thinks.
        temperature: Of its tokens.
        adapter_type: Of its adapter, as the manifest says; None without one.
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

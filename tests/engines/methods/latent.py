"""What steps without text feed, and the rules that end phases of any kind."""

from collections.abc import Callable

import torch
from torch import Tensor

from coconut_serve.reasoning import noise
from tests.engines.methods.adapters import EMB_STD
from tests.engines.methods.loop import At, Fed, Parts, Step


def coconut(at: At) -> Fed:
    return Fed(None, at.hidden)


def noisy(at: At) -> Fed:
    """LatentTTS: N(0, 0.3) on top."""
    return Fed(None, at.hidden + 0.3 * at.normal(noise.VECTOR_STREAM))


def constant(token: int) -> Step:
    """Pause as thought: the embedding of one token."""
    return lambda at: Fed(None, at.table[token])


def adapted(name: str) -> Callable[[Parts], Step]:
    """CODI, LaTER, adaptive: the hidden state through a trained module."""
    return lambda parts: lambda at: Fed(None, parts.adapters[name](at.hidden))


def soft_weight(weight: float) -> Callable[[Parts], Step]:
    """SIM-CoT: prj(h) + w prj(softmax(lm_head h) E)."""

    def make(parts: Parts) -> Step:
        prj = parts.adapters["mlp_ln"]
        return lambda at: Fed(None, prj(at.hidden) + weight * prj(at.logits.softmax(-1) @ at.table))

    return make


def colar(temperature: float) -> Callable[[Parts], Step]:
    """Normal(mean, temperature exp(log_std)) times the spread of embeddings."""

    def make(parts: Parts) -> Step:
        def step(at: At) -> Fed:
            mean, std = parts.adapters["gaussian_head"](at.hidden)
            drawn = mean + std * temperature * at.normal(noise.ADAPTER_STREAM)
            return Fed(None, drawn * EMB_STD)

        return step

    return make


def realign(parts: Parts) -> Step:
    """LatentMAS: (O^T O + 1e-5 I)^-1 O^T E in double precision, then the mean length of E."""
    o, e = parts.head.double(), parts.table.double()
    matrix = torch.linalg.inv(o.T @ o + 1e-5 * torch.eye(o.shape[1])) @ o.T @ e
    length = e.norm(dim=1).mean()

    def step(at: At) -> Fed:
        mapped: Tensor = at.hidden.double() @ matrix
        return Fed(None, (mapped * length / mapped.norm()).float())

    return step


Rule = Callable[[At, Fed], bool]


def until(step: Step, *rules: Rule, min_steps: int = 0) -> Step:
    """A step that ends its phase where a rule holds."""

    def run(at: At) -> Fed:
        fed = step(at)
        held = [rule(at, fed) for rule in rules]  # all of them: some count
        return fed._replace(ends=any(held) and at.step >= min_steps)

    return run


def said(*stops: int) -> Rule:
    """The text of the step."""
    return lambda at, fed: fed.text in stops


def likeliest(*stops: int) -> Rule:
    """The argmax of the logits, where steps have no text."""
    return lambda at, fed: int(at.logits.argmax()) in stops


def drawn(*stops: int) -> Rule:
    """A draw from the logits is one of them."""

    def rule(at: At, fed: Fed) -> bool:
        [u] = at.uniform(noise.HALT_STREAM, [0])
        return u < float(at.logits.softmax(-1)[list(stops)].sum())

    return rule


def learned(go: int, stop: int, temperature: float = 1.0, least: float | None = None) -> Rule:
    """The two-way head: drawn, or at least so likely to stop."""

    def rule(at: At, fed: Fed) -> bool:
        p = float((at.logits[[go, stop]] / temperature).softmax(-1)[1])
        [u] = at.uniform(noise.HALT_STREAM, [0])
        return u < p if least is None else p >= least

    return rule


def likely(stops: tuple[int, ...], least: float) -> Rule:
    """The stop tokens are likely enough together at temperature 0.9."""
    return lambda at, fed: float((at.logits / 0.9).softmax(-1)[list(stops)].sum()) >= least


def entropy(at: At, temperature: float) -> float:
    p = (at.logits / temperature).softmax(-1)
    return -float((p * p.log()).sum())


def uncertain(above: float) -> Rule:
    return lambda at, fed: entropy(at, 1.0) > above


class Cold:
    """Cold Stop: the entropy was below a bound for so many steps in a row."""

    def __init__(self, below: float, patience: int, temperature: float) -> None:
        self.below, self.patience, self.temperature = below, patience, temperature
        self.count = 0

    def __call__(self, at: At, fed: Fed) -> bool:
        self.count = 0 if at.step == 0 else self.count
        self.count = self.count + 1 if entropy(at, self.temperature) < self.below else 0
        return self.count >= self.patience


class Kl:
    """sum p ln(p / q), p the distribution before and q this one, is below a bound."""

    def __init__(self, below: float) -> None:
        self.below = below
        self.before: Tensor | None = None

    def __call__(self, at: At, fed: Fed) -> bool:
        p, q = self.before if at.step else None, at.logits.softmax(-1)
        self.before = q
        return p is not None and float((p * (p / q).log()).sum()) < self.below

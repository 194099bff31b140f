"""What soft and switching steps feed, from the papers' formulas (docs/methods.md)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from coconut_serve.reasoning import noise
from tests.engines.methods.loop import At, Fed, Parts, Step

Weighted = list[tuple[int, float]]  # token ids and weights, heaviest first


def average(weighted: Weighted, table: Tensor) -> Tensor:
    total = sum(weight for _, weight in weighted)
    rows = [weight / total * table[token] for token, weight in weighted]
    return torch.stack(rows).sum(0)


def top(p: Tensor, count: int) -> Weighted:
    """The likeliest, renormalised."""
    found = p.topk(count)
    return list(
        zip(found.indices.tolist(), (found.values / found.values.sum()).tolist(), strict=True)
    )


def nucleus(logits: Tensor, temperature: float = 0.6) -> Weighted:
    """Soft Thinking's filters: top-k 30, top-p 0.95, min-p 0.001, each renormalised."""
    kept: Weighted = []
    for token, weight in top((logits / temperature).softmax(-1), 30):
        if sum(w for _, w in kept) >= 0.95:
            break
        kept.append((token, weight))
    kept = [(token, w) for token, w in kept if w >= 0.001 * kept[0][1]]
    total = sum(w for _, w in kept)
    return [(token, w / total) for token, w in kept]


def soft_thinking(at: At) -> Fed:
    """At most 10 of them; the text is the heaviest."""
    kept = nucleus(at.logits)[:10]
    return Fed(kept[0][0], average(kept, at.table))


def gumbel(at: At, kept: Weighted, tau: float, clamp: tuple[float, float]) -> Fed:
    """softmax((ln p + g) / tau)."""
    ids, total = [token for token, _ in kept], sum(w for _, w in kept)
    g = [-math.log(-math.log(u)) for u in at.uniform(noise.GUMBEL_STREAM, ids)]
    g = [min(clamp[1], max(clamp[0], x)) for x in g]
    scores = [(math.log(w / total) + x) / tau for (_, w), x in zip(kept, g, strict=True)]
    weights = torch.tensor(scores).softmax(-1).tolist()
    mixed = sorted(zip(ids, weights, strict=True), key=lambda pair: -pair[1])
    return Fed(mixed[0][0], average(mixed, at.table))


def stochastic(at: At) -> Fed:
    """Stochastic Soft Thinking: 15 tokens, Gumbel noise, tau 0.5."""
    return gumbel(at, nucleus(at.logits)[:15], 0.5, (-math.inf, math.inf))


def soft_grpo(at: At) -> Fed:
    """Top 5, tau 0.1, Gumbel noise clamped to [-1.5, 3]."""
    return gumbel(at, top(at.logits.softmax(-1), 5), 0.1, (-1.5, 3.0))


def dirichlet(at: At) -> Fed:
    """Dirichlet(4 p) over all that the filters leave, then the 10 heaviest."""
    kept = nucleus(at.logits)
    one = torch.tensor([at.seed]), torch.tensor([at.decision])
    ids, shape = torch.tensor([[t for t, _ in kept]]), torch.tensor([[4.0 * w for _, w in kept]])
    drawn = noise.log_gamma_draw(shape, *one, ids)[0].double().exp().tolist()
    mixed = sorted(zip(ids[0].tolist(), drawn, strict=True), key=lambda pair: -pair[1])[:10]
    return Fed(mixed[0][0], average(mixed, at.table))


def latent_sft(at: At) -> Fed:
    """Softmax over the ten largest raw logits."""
    found = at.logits.topk(10)
    kept = list(zip(found.indices.tolist(), found.values.softmax(-1).tolist(), strict=True))
    return Fed(kept[0][0], average(kept, at.table))


def full(at: At) -> Fed:
    p = at.logits.softmax(-1)
    return Fed(int(p.argmax()), p @ at.table)


def soft_tokens(at: At) -> Fed:
    """p E + sigma N(0, I), p at temperature 0.5."""
    p = (at.logits / 0.5).softmax(-1)
    return Fed(int(p.argmax()), p @ at.table + 0.2 * at.normal(noise.VECTOR_STREAM))


def top_k_by_length(at: At) -> Fed:
    """Top 5, divided by the root of the summed squares."""
    kept = top(at.logits.softmax(-1), 5)
    return Fed(kept[0][0], average(kept, at.table) / math.sqrt(sum(w * w for _, w in kept)))


def draw(at: At, temperature: float, top_k: int = 0) -> int:
    """Invert the cumulative distribution; of `top_k` tokens the largest of ln p + Gumbel noise."""
    p = (at.logits / temperature).softmax(-1)
    if top_k:
        ids = p.topk(top_k).indices.tolist()
        scores = {
            i: math.log(p[i]) - math.log(-math.log(u))
            for i, u in zip(ids, at.uniform(noise.SAMPLE_STREAM, ids), strict=True)
        }
        best: int = max(scores, key=lambda i: scores[i])
        return best
    cumulative = p.double().cumsum(-1)
    [u] = at.uniform(noise.SAMPLE_STREAM, [0])
    return int((cumulative <= u * cumulative[-1]).sum())


def greedy(at: At) -> int:
    return int(at.logits.argmax())


def tokens(say: Callable[[At], int]) -> Step:
    """cot: each token is fed as it is."""

    def step(at: At) -> Fed:
        token = say(at)
        return Fed(token, at.table[token])

    return step


def moi(say: Callable[[At], int], beta: float, temperature: float = 1.0) -> Step:
    """(H p + (beta + 1 - H) onehot(y)) / (beta + 1) over the 20 likeliest, H by ln 20."""

    def step(at: At) -> Fed:
        token, p = say(at), top((at.logits / temperature).softmax(-1), 20)
        entropy = -sum(w * math.log(w) for _, w in p if w > 0) / math.log(20)
        soft = average(p, at.table)
        return Fed(token, (entropy * soft + (beta + 1 - entropy) * at.table[token]) / (beta + 1))

    return step


def multiplex(at: At) -> Fed:
    """Three draws with replacement, weighted by their probabilities; the text is the first."""
    p = at.logits.softmax(-1)
    cumulative = p.double().cumsum(-1)
    drawn = at.uniform(noise.DRAW_STREAM, [0, 1, 2])
    ids = [int((cumulative <= u * cumulative[-1]).sum()) for u in drawn]
    return Fed(ids[0], average([(i, float(p[i])) for i in ids], at.table))


def multiplex_under_sample(at: At) -> Fed:
    """The text is the (greedy) sample, not the first draw."""
    return Fed(greedy(at), multiplex(at).vector)


def hrpo(say: Callable[[At], int]) -> Callable[[Parts], Step]:
    """p E / |p| at temperature 0.5 through the gate, with the embedding of the drawn token."""

    def make(parts: Parts) -> Step:
        def step(at: At) -> Fed:
            token, p = say(at), (at.logits / 0.5).softmax(-1)
            soft = p @ at.table / p.square().sum().sqrt()
            return Fed(token, parts.adapters["gate"](at.table[token], soft))

        return step

    return make


def confidence(at: At) -> Fed:
    """ThinkRouter: top 10 at temperature 1 where p_max >= 0.1, else the (greedy) token."""
    token, p = greedy(at), at.logits.softmax(-1)
    soft = average(top(p, 10), at.table)
    return Fed(token, soft if float(p.max()) >= 0.1 else at.table[token])


def confidence_full(at: At) -> Fed:
    """Soft over the whole vocabulary where p_max < 0.1, as long as a token's embedding is."""
    token, p = greedy(at), at.logits.softmax(-1)
    soft = p @ at.table
    soft = soft * at.table.norm(dim=-1).mean() / soft.norm()
    return Fed(token, soft if float(p.max()) < 0.1 else at.table[token])


class Swi:
    """SwiReasoning's state machine, written out for one row."""

    def __init__(
        self,
        window: int,
        marks: tuple[int, int, int],
        hard: tuple[int, ...],
        horizon: int,
        budget: int = 99,
    ) -> None:
        self.window, self.hard, self.horizon, self.budget = window, hard, horizon, budget
        self.think, self.end, self.newline = marks
        self.soft, self.stay, self.reference, self.switches = True, 0, 0.0, 0
        self.spent, self.says, self.locked = 0, False, False

    def __call__(self, at: At) -> Fed:
        p, token, table = at.logits.softmax(-1), greedy(at), at.table
        ends = self.says and self.spent > 2 * self.budget
        entropy = -float((p * p.log()).sum())
        self.locked |= token == self.end
        token, self.says = self.end if self.says else token, False
        went_hard = went_soft = False
        if at.step == 0:
            self.reference = entropy
        else:
            self.stay += 1
            went_hard = self.soft and entropy < self.reference
            went_soft = not self.soft and entropy > self.reference and self.stay >= self.window
            went_soft &= not self.locked
            if went_hard or went_soft:
                self.soft, self.stay, self.reference = went_soft, 0, entropy
                self.switches += 1
                self.spent += went_hard
                self.says = went_hard and self.spent >= self.budget
        self.soft &= not self.locked
        alpha, beta = (x + (1 - x) * at.step / self.horizon for x in (0.8, 0.7))
        soft = p @ table
        if at.step == 0:
            soft = 0.9 * soft + 0.1 * table[self.newline]
        if went_soft:
            soft = alpha * soft + (1 - alpha) * table[self.think]
        if self.soft:
            return Fed(token, table[token] if token in self.hard else soft, ends)
        if went_hard:
            return Fed(token, beta * table[token] + (1 - beta) * table[self.end], ends)
        return Fed(token, table[token], ends)

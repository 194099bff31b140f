"""Each soft or switching method against a loop over one row that recomputes the whole sequence.

Written from the papers' formulas (docs/methods.md), sharing no code with the engine but the
numbers that its random generator gives. Alone, and in one batch with all the others.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coconut_serve.reasoning import noise
from coconut_serve.types import (
    FinishReason,
    HaltParams,
    HaltReason,
    MixtureParams,
    Request,
    SwitchParams,
)
from tests.engines.native.test_exactness import prompt
from tests.fakes import Result, make_request, native_engine, run, run_all
from tests.models import load_plain

pytestmark = pytest.mark.torch

STEPS, END, ANSWER = 12, (7,), 6
FREE = {"top_p": 1.0, "filter_top_k": 0, "min_p": 0.0, "temperature": 1.0}
SEED = 5


def uniform(step: int, stream: int, columns: list[int], seed: int = SEED) -> list[float]:
    """The engine's random numbers of one decision."""
    one = torch.tensor([seed]), torch.tensor([step])
    drawn: list[float] = noise.uniform(*one, stream, torch.tensor([columns]))[0].tolist()
    return drawn


# What one step feeds, given its number, its logits and the embedding table: text and vector; None:
# the phase ends.
Step = Callable[[int, Tensor, Tensor], tuple[int, Tensor] | None]


def full(step: int, logits: Tensor, table: Tensor) -> tuple[int, Tensor]:
    p = logits.softmax(-1)
    return int(p.argmax()), p @ table


def top_k_by_length(step: int, logits: Tensor, table: Tensor) -> tuple[int, Tensor]:
    """Top 5, divided by the root of the summed squares."""
    p = torch.zeros_like(logits)
    top = logits.softmax(-1).topk(5)
    p[top.indices] = top.values / top.values.sum()
    return int(p.argmax()), (p @ table) / p.norm()


def moi(step: int, logits: Tensor, table: Tensor) -> tuple[int, Tensor]:
    """Greedy sample; n = 20, beta = 0.5."""
    n, beta, token = 20, 0.5, int(logits.argmax())
    top = logits.softmax(-1).topk(n)
    p = torch.zeros_like(logits)
    p[top.indices] = top.values / top.values.sum()
    entropy = -sum(float(x) * math.log(float(x)) for x in p if x > 0) / math.log(n)
    onehot = torch.zeros_like(logits)
    onehot[token] = 1.0
    w = (entropy * p + (beta + 1 - entropy) * onehot) / (beta + 1)
    return token, w @ table


def multiplex(step: int, logits: Tensor, table: Tensor, seed: int = SEED) -> tuple[int, Tensor]:
    """Three draws with replacement, weighted by their probabilities."""
    p = logits.softmax(-1)
    cumulative = p.double().cumsum(-1)
    ids = []
    for u in uniform(step, noise.DRAW_STREAM, [0, 1, 2], seed):
        ids.append(int((cumulative <= u * cumulative[-1]).sum()))
    weights = torch.stack([p[i] for i in ids])
    return ids[0], (weights / weights.sum()) @ table[ids]


def clamped_gumbel(step: int, logits: Tensor, table: Tensor) -> tuple[int, Tensor]:
    """SofT-GRPO: top 5, tau 0.1, Gumbel noise clamped to [-1.5, 3]."""
    top = logits.softmax(-1).topk(5)
    ids = top.indices.tolist()
    g = [-math.log(-math.log(u)) for u in uniform(step, noise.GUMBEL_STREAM, ids)]
    g = [min(3.0, max(-1.5, x)) for x in g]
    scores = torch.tensor(
        [
            (math.log(float(p / top.values.sum())) + x) / 0.1
            for p, x in zip(top.values, g, strict=True)
        ]
    )
    w = scores.softmax(-1)
    return ids[int(w.argmax())], w @ table[ids]


def confidence(step: int, logits: Tensor, table: Tensor) -> tuple[int, Tensor]:
    """ThinkRouter: top 10 at temperature 1 where p_max >= 0.1, else the (greedy) token."""
    token = int(logits.argmax())
    p = logits.softmax(-1)
    top = p.topk(10)
    soft = (top.values / top.values.sum()) @ table[top.indices]
    return token, soft if float(p.max()) >= 0.1 else table[token]


def multiplex_under_sample(step: int, logits: Tensor, table: Tensor) -> tuple[int, Tensor]:
    """The text is the (greedy) sample, not the first draw."""
    return int(logits.argmax()), multiplex(step, logits, table)[1]


def confidence_full(step: int, logits: Tensor, table: Tensor) -> tuple[int, Tensor]:
    """Soft over the whole vocabulary where p_max < 0.1, as long as a token's embedding is."""
    token, p = int(logits.argmax()), logits.softmax(-1)
    soft = p @ table
    soft = soft * table.norm(dim=-1).mean() / soft.norm()
    return token, soft if float(p.max()) < 0.1 else table[token]


class Swi:
    """SwiReasoning's state machine, written out for one row."""

    def __init__(
        self, window: int, think: int, end: int, newline: int, hard: set[int], budget: int = 99
    ) -> None:
        self.budget, self.spent, self.says, self.locked = budget, 0, False, False
        self.window, self.think, self.end, self.newline = window, think, end, newline
        self.hard, self.soft, self.stay, self.reference, self.switches = hard, True, 0, 0.0, 0

    def __call__(self, step: int, logits: Tensor, table: Tensor) -> tuple[int, Tensor] | None:
        if self.says and self.spent > 2 * self.budget:
            return None
        p = logits.softmax(-1)
        entropy = -float((p * p.log()).sum())
        token = int(logits.argmax())
        self.locked |= token == self.end
        token, self.says = self.end if self.says else token, False
        went_hard = went_soft = False
        if step == 0:
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
        alpha, beta = (x + (1 - x) * step / STEPS for x in (0.8, 0.7))
        soft = p @ table
        if step == 0:
            soft = 0.9 * soft + 0.1 * table[self.newline]
        if went_soft:
            soft = alpha * soft + (1 - alpha) * table[self.think]
        if self.soft:
            return token, table[token] if token in self.hard else soft
        if went_hard:
            return token, beta * table[token] + (1 - beta) * table[self.end]
        return token, table[token]


def token(step: int, logits: Tensor, table: Tensor) -> tuple[int, Tensor]:
    """Greedy cot."""
    likeliest = int(logits.argmax())
    return likeliest, table[likeliest]


def draw(step: int, logits: Tensor, temperature: float, top_k: int, seed: int) -> int:
    """Invert the cumulative distribution of the `top_k` likeliest."""
    p = (logits / temperature).softmax(-1)
    p[p < p.topk(top_k).values[-1]] = 0.0
    cumulative = p.double().cumsum(-1)
    [u] = uniform(step, noise.SAMPLE_STREAM, [0], seed)
    return int((cumulative <= u * cumulative[-1]).sum())


def drawn_thought(step: int, logits: Tensor, table: Tensor) -> tuple[int, Tensor]:
    found = draw(step, logits, 1.3, 60, 11)
    return found, table[found]


def drawn_answer(step: int, logits: Tensor) -> int:
    return draw(step, logits, 0.7, 5, SEED)


def greedy(step: int, logits: Tensor) -> int:
    return int(logits.argmax())


class UntilKl:
    """Ends once sum p ln(p / q), p the distribution before and q this one, is below a bound."""

    def __init__(self, step: Step, below: float) -> None:
        self.step, self.below = step, below
        self.before: Tensor | None = None

    def __call__(self, step: int, logits: Tensor, table: Tensor) -> tuple[int, Tensor] | None:
        p, q = self.before, logits.softmax(-1)
        self.before = q
        if p is not None and float((p * (p / q).log()).sum()) < self.below:
            return None
        return self.step(step, logits, table)


class UntilLikely:
    """Ends once a stop token is said, or they are likely enough together at temperature 0.9."""

    def __init__(self, step: Step, least: float) -> None:
        self.step, self.least = step, least

    def __call__(self, step: int, logits: Tensor, table: Tensor) -> tuple[int, Tensor] | None:
        likely = float((logits / 0.9).softmax(-1)[list(STOPS)].sum()) >= self.least
        fed = self.step(step, logits, table)
        return None if likely or fed is None or fed[0] in STOPS else fed


@torch.inference_mode()
def loop(
    model: Any,
    ids: tuple[int, ...],
    step: Step,
    say: Callable[[int, Tensor], int] = greedy,
    end: tuple[int, ...] = END,
    pads: bool = False,
) -> tuple[list[int], list[int]]:
    """Think, feed the end token, answer; -> texts of the steps, answer."""
    table = model.get_input_embeddings().weight
    inputs = table[list(ids)]
    positions = list(range(len(ids) + STEPS + len(end) + ANSWER))

    def logits() -> Tensor:
        at = torch.tensor(positions[: len(inputs)])[None]
        seen = torch.ones_like(at)  # without it a jump in position ids reads as another text
        found: Tensor = model(
            inputs_embeds=inputs[None], position_ids=at, attention_mask=seen, use_cache=False
        ).logits[0, -1]
        return found.float()

    texts: list[int] = []
    for number in range(STEPS):
        fed = step(number, logits(), table)
        if fed is None:
            break
        texts.append(fed[0])
        inputs = torch.cat([inputs, fed[1][None]])
    if pads:
        del positions[len(inputs) : len(ids) + STEPS]
    inputs = torch.cat([inputs, table[list(end)]])
    answer: list[int] = []
    for number in range(ANSWER):
        answer.append(say(len(texts) + len(end) + number, logits()))
        inputs = torch.cat([inputs, table[answer[-1:]]])
    return texts, answer


def soft(**mixture: Any) -> dict[str, Any]:
    return {"mode": "distribution", "reasoning": {"mixture": MixtureParams(**(FREE | mixture))}}


def kl(settings: dict[str, Any], below: float) -> dict[str, Any]:
    halt = HaltParams(converge_metric="kl", converge_below=below)
    return {**settings, "reasoning": {**settings.get("reasoning", {}), "halt": halt}}


def likely(settings: dict[str, Any], least: float) -> dict[str, Any]:
    halt = HaltParams(stop_token_ids=STOPS, stop_test="prob", stop_prob=least, stop_temperature=0.9)
    return {**settings, "reasoning": {**settings.get("reasoning", {}), "halt": halt}}


def auto(mixture: dict[str, Any] | None = None, **switch: Any) -> dict[str, Any]:
    reasoning: dict[str, Any] = {"switch": SwitchParams(**switch)}
    if mixture is not None:
        reasoning["mixture"] = MixtureParams(**(FREE | mixture))
    return {"mode": "auto", "reasoning": reasoning}


SWI: dict[str, Any] = {
    "window": 2,
    "alpha": 0.8,
    "think_token_id": 40,
    "end_token_id": 41,
    "newline_token_id": 42,
}
HARD = (28, 120, 63)
STOPS = (3, 28, 63, 77, 90, 101)
PAD = {"pad_positions": True}
APART: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": 5,
    "thinking": {"temperature": 1.3, "top_k": 60, "seed": 11},
}
METHODS: dict[str, tuple[dict[str, Any], Callable[[], Step]]] = {
    "full": (soft(kind="full"), lambda: full),
    "l2": (soft(top_k=5, norm="l2"), lambda: top_k_by_length),
    "moi": (soft(kind="moi", top_k=20, moi_beta=0.5), lambda: moi),
    "multiplex": (soft(kind="multiplex", top_k=3), lambda: multiplex),
    "soft_grpo": (
        soft(top_k=5, noise="gumbel", noise_temperature=0.1, noise_clamp=(-1.5, 3.0)),
        lambda: clamped_gumbel,
    ),
    "thinkrouter": (auto({"top_k": 10}, rule="confidence", p_max=0.1), lambda: confidence),
    "thinkrouter-full": (
        auto(
            {"kind": "full", "norm": "embed_mean"},
            rule="confidence",
            p_max=0.1,
            soft_when="uncertain",
        ),
        lambda: confidence_full,
    ),
    "no-switch": (auto({"top_k": 5, "norm": "l2"}, rule="none"), lambda: top_k_by_length),
    "no-switch-multiplex": (
        auto({"kind": "multiplex", "top_k": 3}, rule="none"),
        lambda: multiplex_under_sample,
    ),
    "swi": (auto(**SWI), lambda: Swi(2, 40, 41, 42, set())),
    "swi-budget": (
        auto(**SWI | {"window": 0}, max_switches=1),
        lambda: Swi(0, 40, 41, 42, set(), 1),
    ),
    "kl": (kl(soft(kind="full"), 0.6), lambda: UntilKl(full, 0.6)),
    "pad": (
        kl({**soft(kind="full"), "reasoning": {**soft(kind="full")["reasoning"], **PAD}}, 0.6),
        lambda: UntilKl(full, 0.6),
    ),
    "kl-cot": (kl({"mode": "cot"}, 0.6), lambda: UntilKl(token, 0.6)),
    "likely": (likely(soft(kind="full"), 0.065), lambda: UntilLikely(full, 0.065)),
    "likely-cot": (likely({"mode": "cot"}, 0.09), lambda: UntilLikely(token, 0.09)),
    "multiplex-seed": (
        {**soft(kind="multiplex", top_k=3), "thinking": {"seed": 11}},
        lambda: partial(multiplex, seed=11),
    ),
    "apart": ({"mode": "cot", **APART}, lambda: drawn_thought),
    # No end token: the step that ends the phase says the first token of the answer.
    "apart-kl": (
        kl({"mode": "cot", "end": (), **APART}, 0.45),
        lambda: UntilKl(drawn_thought, 0.45),
    ),
    "swi-hard": (auto(**SWI, hard_token_ids=HARD), lambda: Swi(2, 40, 41, 42, set(HARD))),
}


def requests() -> dict[tuple[str, int], Request]:
    return {
        (name, number): make_request(
            f"{name}{number}", prompt(number, 7 + number), steps=STEPS, max_tokens=ANSWER,
            seed=SEED, **{"end": END, **settings},
        )
        for name, (settings, _) in METHODS.items()
        for number in range(3)
    }  # fmt: skip


async def test_methods_equal_their_plain_loops(tiny_llama: Path) -> None:
    """Alone, all in one batch, and in a pool so small that rows are preempted, in chunks."""
    model, asked = load_plain(tiny_llama), requests()
    expected = {
        key: loop(
            model,
            request.prompt_token_ids,
            METHODS[key[0]][1](),
            drawn_answer if key[0].startswith("apart") else greedy,
            request.reasoning.end_token_ids,
            request.reasoning.pad_positions,
        )
        for key, request in asked.items()
    }

    def check(results: list[Result]) -> None:
        for key, result in zip(asked, results, strict=True):
            assert (result.thinking_ids, result.token_ids) == expected[key], key

    for kind in ("kl", "apart-kl", "likely", "likely-cot"):
        lengths = {len(texts) for (name, _), (texts, _) in expected.items() if name == kind}
        assert len(lengths) > 1, "phases end at different steps"
    spent = [texts for (name, _), (texts, _) in expected.items() if name == "swi-budget"]
    assert min(map(len, spent)) < STEPS, "a budget is spent"
    assert max(texts.count(SWI["end_token_id"]) for texts in spent) == 2, "after being said twice"
    async with native_engine(tiny_llama) as engine:
        check([await run(engine, request) for request in asked.values()])
        check(await run_all(engine, list(asked.values())))
    size = str(92 * 4 * (2 * 2 * 2 * 16 + 64))
    async with native_engine(
        tiny_llama, kv_cache_memory=size, max_model_len=60, max_num_batched_tokens=16
    ) as engine:
        results = await run_all(engine, list(asked.values()))
        check(results)
        assert sum(r.counts.num_preemptions for r in results) > 0


async def test_skipped_positions_count_towards_the_context(tiny_llama: Path) -> None:
    """7 prompt, 40 thinking and 1 end position leave 12, and the last token takes none."""
    padded = kl({"mode": "cot", "reasoning": PAD}, 0.6)
    asked = make_request("a", prompt(1, 7), steps=40, end=END, max_tokens=40, **padded)
    async with native_engine(tiny_llama, max_model_len=60) as engine:
        result = await run(engine, asked)
    assert result.counts.num_reasoning_steps < 40
    assert (len(result.token_ids), result.finish_reason) == (13, FinishReason.LENGTH)


async def test_swi_counts_its_switches_and_ends_at_the_bound(tiny_llama: Path) -> None:
    machine, ids = Swi(0, 40, 41, 42, set()), prompt(1, 8)
    free = {**SWI, "window": 0}
    bare = {**free, "end_token_id": -1}  # without </think> the first switch ends the phase
    loop(load_plain(tiny_llama), ids, machine)
    assert machine.switches >= 3, "another seed"
    async with native_engine(tiny_llama) as engine:
        result = await run(
            engine, make_request("a", ids, steps=STEPS, end=END, seed=SEED, **auto(**free))
        )
        assert result.counts.num_switches == machine.switches
        bound = await run(
            engine,
            make_request("b", ids, steps=STEPS, end=END, seed=SEED, **auto(**bare, max_switches=1)),
        )
        answers = [
            await run(
                engine,
                make_request(
                    f"c{most}", ids, steps=STEPS, end=end, max_tokens=9,
                    **auto(**bare, max_switches=most, answer_tokens=2),
                ),
            )
            for most, end in ((1, END), (1, ()), (99, END))
        ]  # fmt: skip
    assert [len(answer.token_ids) for answer in answers] == [2, 2, 9]
    assert {answer.finish_reason for answer in answers} == {FinishReason.LENGTH}
    assert answers[0].token_ids == bound.token_ids[:2]
    assert [o.halt_reason for o in bound.outputs if o.halt_reason] == [HaltReason.SWITCHES]
    assert bound.counts.num_switches == 1, "the switch is made, the step after it ends the phase"
    assert bound.counts.num_reasoning_steps < STEPS


async def test_moi_with_a_large_beta_is_ordinary_sampling(tiny_llama: Path) -> None:
    """Oracle 4: with beta to infinity the sample alone is fed."""
    ids = prompt(6, 9)
    large = soft(kind="moi", top_k=20, moi_beta=1e6)
    async with native_engine(tiny_llama) as engine:
        mixed = await run(
            engine, make_request("a", ids, steps=10, temperature=0.8, seed=3, max_tokens=5, **large)
        )
        plain = await run(engine, make_request("b", ids, temperature=0.8, seed=3, max_tokens=15))
    assert mixed.thinking_ids + mixed.token_ids == plain.token_ids

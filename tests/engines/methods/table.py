"""Every method that an engine must serve: its request and its slow, obvious reference."""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coconut_serve.params import HaltParams, MixtureParams, Phase, SwitchParams, TraceLevel
from coconut_serve.types import HaltReason, Request
from tests.engines.methods import latent, soft
from tests.engines.methods.loop import At, Parts, Say, Step, Told, loop
from tests.fakes import ROUNDING, Result, make_request

STEPS, END, ANSWER, SEED = 12, (7,), 6, 5
FREE: dict[str, Any] = {"top_p": 1.0, "filter_top_k": 0, "min_p": 0.0, "temperature": 1.0}
STOPS = (3, 28, 63, 77, 90, 101)
COMMON = (8, 126, 88, 60, 94, 30)
SAID = (74, 89, 120)
CLOSES = (94, 70, 62, 118)
MARKS = (40, 41, 42)  # think, end, newline
HARD = (70, 28, 120)
DRAWN = {"temperature": 1.0, "seed": 11}  # of thinking tokens, where the answer is greedy
APART: dict[str, Any] = {
    "temperature": 0.7, "top_k": 5, "thinking": {"temperature": 1.3, "top_k": 60, "seed": 11},
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    settings: dict[str, Any]  # of make_request
    step: Callable[[Parts], Step]
    say: Say = soft.greedy
    halts: frozenset[HaltReason] = frozenset()  # rules that end the phase of some row early

    def told(self, parts: Parts, request: Request, heard: list[Tensor] | None = None) -> Told:
        say = soft.greedy if request.sampling.is_greedy else self.say
        return loop(parts, request, self.step(parts), say, heard)


def row(
    mode: str,
    step: Step | Callable[[Parts], Step],
    *halts: HaltReason,
    needs_parts: bool = False,
    say: Say = soft.greedy,
    request: dict[str, Any] | None = None,
    halt: dict[str, Any] | None = None,
    mixture: dict[str, Any] | None = None,
    switch: dict[str, Any] | None = None,
    **reasoning: Any,
) -> Method:
    """Put the records together; a step that keeps state or needs the model is made for each row."""
    if halt is not None:
        reasoning["halt"] = HaltParams(**halt)
    if mixture is not None:
        reasoning["mixture"] = MixtureParams(**mixture)
    if switch is not None:
        reasoning["switch"] = SwitchParams(**switch)
    settings = {"mode": mode, "reasoning": reasoning, **(request or {})}
    make: Any = step if needs_parts else lambda parts: step
    return Method(settings, make, say, frozenset(halts))


def mixed(step: Step | Callable[[Parts], Step], *halts: HaltReason, **more: Any) -> Method:
    """A `distribution` row without filters, at temperature 1."""
    mixture = FREE | more.pop("mixture")
    return row("distribution", step, *halts, mixture=mixture, **more)


def made(rules: Callable[[], Iterable[latent.Rule]], step: Step, least: int = 0) -> Any:
    """Rules that count, anew for each row."""
    return lambda parts: latent.until(step, *rules(), min_steps=least)


def adapted(name: str, *rules: latent.Rule, least: int = 0) -> Callable[[Parts], Step]:
    return lambda parts: latent.until(latent.adapted(name)(parts), *rules, min_steps=least)


def thinking_draw(at: At) -> int:
    return soft.draw(at, 1.0)


def drawn_thought(at: At) -> int:
    return soft.draw(at, 1.3, 60)


def drawn_answer(at: At) -> int:
    return soft.draw(at, 0.7, 5)


def swi(*hard: int, window: int = 2, budget: int = 99) -> Callable[[Parts], Step]:
    return lambda parts: soft.Swi(window, MARKS, hard, STEPS, budget)


STOP_TOKEN, LEARNED, COLD = HaltReason.STOP_TOKEN, HaltReason.LEARNED, HaltReason.COLD_STOP
CONVERGED, UNCERTAIN = HaltReason.CONVERGED, HaltReason.UNCERTAIN
SWI: dict[str, Any] = {
    "window": 2, "alpha": 0.8,
    "think_token_id": MARKS[0], "end_token_id": MARKS[1], "newline_token_id": MARKS[2],
}  # fmt: skip
KL: dict[str, Any] = {"converge_metric": "kl", "converge_below": 0.6}
LIKELY = {"stop_token_ids": STOPS, "stop_test": "prob", "stop_temperature": 0.9}
TEN = {"top_k": 10}
MULTIPLEX = {"kind": "multiplex", "top_k": 3}

TOKENS: dict[str, Method] = {
    "no-cot": Method({"mode": "none", "steps": 0, "end": ()}, lambda parts: latent.coconut),
    "cot": row("cot", soft.tokens(soft.greedy)),
    "cot-end": row(
        "cot", latent.until(soft.tokens(soft.greedy), latent.said(126, 89, 30)), STOP_TOKEN,
        halt={"stop_token_ids": (126, 89, 30)},
    ),
    "kl-cot": row(
        "cot", made(lambda: [latent.Kl(0.6)], soft.tokens(soft.greedy)), CONVERGED,
        needs_parts=True, halt=KL,
    ),
    "likely-cot": row(
        "cot",
        latent.until(soft.tokens(soft.greedy), latent.likely(STOPS, 0.09), latent.said(*STOPS)),
        STOP_TOKEN, halt=LIKELY | {"stop_prob": 0.09},
    ),
    "apart": row("cot", soft.tokens(drawn_thought), say=drawn_answer, request=APART),
    # No end token: the step that ends the phase says the first token of the answer.
    "apart-kl": row(
        "cot", made(lambda: [latent.Kl(0.6)], soft.tokens(drawn_thought)), CONVERGED,
        needs_parts=True, say=drawn_answer, request={"end": (), **APART}, halt=KL,
    ),
}  # fmt: skip

LATENT: dict[str, Method] = {
    "coconut": row("latent", latent.coconut),
    "coconut-symbolic": row("latent", latent.coconut, request={"end": (37,), "steps": 4}),
    "pause": row("latent", latent.constant(99), source="constant", constant_token_id=99),
    "codi": row("latent", adapted("mlp_ln"), needs_parts=True, adapter="mlp_ln"),
    "codi-soft-weight": row(
        "latent", latent.soft_weight(0.5), needs_parts=True, adapter="mlp_ln", soft_weight=0.5
    ),
    "latent-tts": row("latent", latent.noisy, noise_std=0.3),
    "adaptive": row(
        "latent", adapted("linear_ln", latent.learned(8, 9), least=1), LEARNED,
        needs_parts=True, adapter="linear_ln", end_adds_vector=True, min_steps=1,
        halt={"learned_token_ids": (8, 9), "sample": True},
    ),
    "adaptive-sure": row(
        "latent", latent.until(latent.coconut, latent.learned(5, 6, least=0.9)), LEARNED,
        end_adds_vector=True, halt={"learned_token_ids": (5, 6), "stop_prob": 0.9},
    ),
    "colar": row(
        "latent",
        lambda parts: latent.until(latent.colar(0.8)(parts), latent.drawn(*COMMON), min_steps=1),
        STOP_TOKEN, needs_parts=True, adapter="gaussian_head", latent_temperature=0.8, min_steps=1,
        halt={"stop_token_ids": COMMON, "stop_test": "sampled"}, request={"end": (35, 36)},
    ),
    "later": row(
        "latent", adapted("mlp", latent.likeliest(19, 120, 88)), STOP_TOKEN, needs_parts=True,
        adapter="mlp", halt={"stop_token_ids": (19, 120, 88)}, keeps_last=True,
        request={"end": (8, 9)},
    ),
    "later-free": row(
        "latent",
        lambda parts: latent.until(
            latent.realign(parts), latent.likeliest(53), latent.uncertain(4.27), min_steps=1
        ),
        STOP_TOKEN, UNCERTAIN, needs_parts=True, adapter="realign", min_steps=1,
        halt={"stop_token_ids": (53,), "entropy_above": 4.27},
    ),
    "latentmas": row("latent", latent.realign, needs_parts=True, adapter="realign"),
    "switch": row(
        "latent", latent.until(latent.coconut, latent.likeliest(*CLOSES)), STOP_TOKEN,
        halt={"stop_token_ids": CLOSES}, enter_token_id=89, max_blocks=2,
        request={"max_tokens": 12},
    ),
}  # fmt: skip

SOFT: dict[str, Method] = {
    "full": mixed(soft.full, mixture={"kind": "full"}),
    "soft-tokens": row(
        "distribution", soft.soft_tokens, noise_std=0.2,
        mixture={"kind": "full", "temperature": 0.5},
    ),
    "l2": mixed(soft.top_k_by_length, mixture={"top_k": 5, "norm": "l2"}),
    "soft-thinking": row(
        "distribution", made(lambda: [latent.Cold(3.3, 2, 0.6)], soft.soft_thinking), COLD,
        needs_parts=True, halt={"entropy_below": 3.3, "entropy_patience": 2},
    ),
    "soft-thinking-end": row(
        "distribution", latent.until(soft.soft_thinking, latent.said(115, 30)), STOP_TOKEN,
        halt={"stop_token_ids": (115, 30)},
    ),
    "stochastic": row("distribution", soft.stochastic, mixture={"noise": "gumbel", "top_k": 15}),
    "dirichlet": row("distribution", soft.dirichlet, mixture={"noise": "dirichlet"}),
    "soft-grpo": mixed(
        soft.soft_grpo,
        mixture={
            "top_k": 5, "noise": "gumbel", "noise_temperature": 0.1, "noise_clamp": (-1.5, 3.0),
        },
    ),
    "latent-sft": mixed(
        latent.until(soft.latent_sft, latent.said(101, 126, 58)), STOP_TOKEN, mixture=TEN,
        halt={"stop_token_ids": (101, 126, 58)},
    ),
    "moi": mixed(
        soft.moi(soft.greedy, 0.5), mixture={"kind": "moi", "top_k": 20, "moi_beta": 0.5}
    ),
    "moi-drawn": mixed(
        soft.moi(thinking_draw, 1.0, 0.8), request={"thinking": DRAWN},
        mixture={"kind": "moi", "top_k": 20, "temperature": 0.8},
    ),
    "moi-answer": mixed(
        soft.moi(soft.greedy, 0.5),
        mixture={"kind": "moi", "top_k": 20, "moi_beta": 0.5, "in_answer": True},
    ),
    "moi-answer-drawn": mixed(
        soft.moi(thinking_draw, 1.0, 0.8), say=thinking_draw, request={"temperature": 1.0},
        mixture={"kind": "moi", "top_k": 20, "temperature": 0.8, "in_answer": True},
    ),
    "moi-answer-alone": mixed(
        soft.moi(soft.greedy, 1.0), request={"steps": 0, "end": ()},
        mixture={"kind": "moi", "top_k": 20, "in_answer": True},
    ),
    "multiplex": mixed(soft.multiplex, mixture=MULTIPLEX),
    "multiplex-seed": mixed(
        latent.until(soft.multiplex, latent.said(*STOPS)), STOP_TOKEN, mixture=MULTIPLEX,
        request={"thinking": {"seed": 11}}, halt={"stop_token_ids": STOPS},
    ),
    "hrpo": mixed(
        lambda parts: latent.until(soft.hrpo(thinking_draw)(parts), latent.said(*SAID)),
        STOP_TOKEN, needs_parts=True, adapter="gate", request={"thinking": DRAWN},
        mixture={"kind": "gated", "temperature": 0.5}, halt={"stop_token_ids": SAID},
    ),
    "hrpo-answer": mixed(
        soft.hrpo(soft.greedy), needs_parts=True, adapter="gate",
        mixture={"kind": "gated", "temperature": 0.5, "in_answer": True},
    ),
    "kl": mixed(
        made(lambda: [latent.Kl(0.6)], soft.full), CONVERGED, needs_parts=True,
        mixture={"kind": "full"}, halt=KL,
    ),
    "pad": mixed(
        made(lambda: [latent.Kl(0.6)], soft.full), CONVERGED, needs_parts=True,
        mixture={"kind": "full"}, halt=KL, pad_positions=True,
    ),
    "likely": mixed(
        latent.until(soft.full, latent.likely(STOPS, 0.065), latent.said(*STOPS)), STOP_TOKEN,
        mixture={"kind": "full"}, halt=LIKELY | {"stop_prob": 0.065},
    ),
}  # fmt: skip

AUTO: dict[str, Method] = {
    "thinkrouter": row(
        "auto", made(lambda: [latent.Cold(4.15, 2, 1.0)], soft.confidence), COLD,
        needs_parts=True, mixture=FREE | TEN, switch={"rule": "confidence", "p_max": 0.1},
        halt={"entropy_below": 4.15, "entropy_patience": 2},
    ),
    "thinkrouter-full": row(
        "auto", soft.confidence_full, mixture=FREE | {"kind": "full", "norm": "embed_mean"},
        switch={"rule": "confidence", "p_max": 0.1, "soft_when": "uncertain"},
    ),
    "no-switch": row(
        "auto", soft.top_k_by_length, mixture=FREE | {"top_k": 5, "norm": "l2"},
        switch={"rule": "none"},
    ),
    "no-switch-multiplex": row(
        "auto", soft.multiplex_under_sample, mixture=FREE | MULTIPLEX, switch={"rule": "none"}
    ),
    "swi": row("auto", swi(), needs_parts=True, switch=SWI),
    "swi-budget": row(
        "auto", swi(window=0, budget=1), HaltReason.SWITCHES, needs_parts=True,
        switch=SWI | {"window": 0, "max_switches": 1},
    ),
    "swi-final": row(
        "auto", swi(window=0, budget=1), HaltReason.SWITCHES, needs_parts=True,
        switch=SWI | {"window": 0, "max_switches": 1, "final_token_ids": (MARKS[1], 30, 9),
                      "answer_tokens": 2},
    ),
    "swi-hard": row("auto", swi(*HARD), needs_parts=True, switch=SWI | {"hard_token_ids": HARD}),
}  # fmt: skip

METHODS = TOKENS | LATENT | SOFT | AUTO
Key = tuple[str, int]


def prompt(number: int, length: int = 7) -> tuple[int, ...]:
    """So many random ids or more: the same for every method, so they meet in the prefix cache."""
    generator = random.Random(number)
    return tuple(generator.randrange(3, 128) for _ in range(length + number))


def requests(
    names: Iterable[str] = METHODS, rows: int = 3, *, trace: TraceLevel = "vectors", length: int = 7
) -> dict[Key, Request]:
    """Some rows of each method."""
    common: dict[str, Any] = {"steps": STEPS, "end": END, "max_tokens": ANSWER, "seed": SEED}
    asked = {}
    for name in names:
        settings = METHODS[name].settings
        is_fixed = settings["mode"] == "latent" and not METHODS[name].halts
        for number in range(rows):
            request = make_request(f"{name}{number}", prompt(number, length), **(common | settings))
            reasoning = dataclasses.replace(request.reasoning, trace=trace, is_fixed=is_fixed)
            asked[name, number] = dataclasses.replace(request, reasoning=reasoning)
    return asked


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Many small products are slower on more."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def references(parts: Parts, asked: dict[Key, Request]) -> dict[Key, Told]:
    """What each row gives by itself."""
    with one_thread():
        return {key: METHODS[key[0]].told(parts, request) for key, request in asked.items()}


def check(asked: dict[Key, Request], results: list[Result], parts: Parts) -> None:
    """Each step from what was fed before it: tokens, vectors, where phases ended, by which rule."""
    with one_thread():
        for (key, request), result in zip(asked.items(), results, strict=True):
            _check_row(key, request, result, parts)


def _check_row(key: Key, request: Request, result: Result, parts: Parts) -> None:
    heard = []
    for output in result.outputs:
        if output.phase is Phase.THINK:
            assert output.trace is not None
            vector = output.trace.vector if output.is_vector else parts.table[output.token_id]
            heard.append(torch.as_tensor(vector))
    told, steps = METHODS[key[0]].told(parts, request, heard), request.reasoning.steps
    assert (result.thinking_ids, result.token_ids) == (told.texts, told.answer), key
    ended = [o.halt_reason for o in result.outputs if o.halt_reason]
    for halt, length in zip(ended, told.lengths, strict=True):
        caps = {HaltReason.FIXED if request.reasoning.is_fixed else HaltReason.CAP}
        assert halt in (METHODS[key[0]].halts if length < steps else caps), key
    for ours, theirs in zip(heard, told.fed, strict=True):
        torch.testing.assert_close(ours, theirs, atol=ROUNDING, rtol=0, msg=str(key))

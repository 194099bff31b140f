"""SwiReasoning's state machine (arXiv 2510.05069) against tables derived on paper.

Each step is driven through the mode's own `decide` with an entropy H and a drawn token y. The
distribution is even over the first k tokens, so H = ln k and a smaller k is a lower entropy; the
embedding is the identity, so a fed vector can be read: soft is 1/k in the first k places, a token
its own place. The rules, with reference entropy R and C the budget:

- starts soft with R = H; soft to tokens if H < R, tokens to soft if H > R and `window` steps have
  passed since the last switch; at a switch R = H;
- y = </think> locks the row in tokens; a hard y is fed as a token, whatever the state;
- the n-th switch to tokens: for C <= n <= 2C the next step says </think>, which does not lock; for
  n > 2C the next step ends the phase.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from coconut_serve.params import HaltParams, Phase, ReasoningParams, SwitchParams
from coconut_serve.reasoning.adapters import AdapterBank
from coconut_serve.reasoning.embedding import Embedding
from coconut_serve.reasoning.mode import StepContext, settle
from coconut_serve.reasoning.modes.auto import AutoMode
from coconut_serve.reasoning.progress import Progress, RowResult
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.reasoning.settings import Admission
from coconut_serve.reasoning.slots import Slots
from coconut_serve.reasoning.step import ReasoningStep
from coconut_serve.types import FinishReason, HaltReason, RequestOutput
from tests.fakes import make_request
from tests.reasoning.test_modes import start

pytestmark = pytest.mark.torch

VOCAB, STEPS, ALPHA, BETA = 16, 10, 0.8, 0.7
HARD, NEWLINE, END, THINK = 3, 8, 9, 10
EYE = torch.eye(VOCAB)
EMBEDDING = Embedding(lambda ids: EYE[ids], EYE)
Row = tuple[int, int, str, int]  # k, y, what is fed, what is said


def logits_of(k: int) -> Tensor:
    """Even over the first k tokens."""
    return torch.where(torch.arange(VOCAB) < k, 0.0, -1e4)


def fed(kind: str, step: int, k: int, said: int) -> Tensor:
    """What the next input is to be."""
    soft, progress = (torch.arange(VOCAB) < k) / k, step / STEPS
    if kind == "first":
        return 0.9 * soft + 0.1 * EYE[NEWLINE]
    if kind == "to soft":
        share = ALPHA + (1 - ALPHA) * progress
        return share * soft + (1 - share) * EYE[THINK]
    if kind == "to token":
        share = BETA + (1 - BETA) * progress
        return share * EYE[said] + (1 - share) * EYE[END]
    return soft if kind == "soft" else EYE[said]


PLAIN: dict[str, Any] = {"window": 2}
TABLES: dict[str, tuple[dict[str, Any], Sequence[Row]]] = {
    # R = ln 4; 5 is above it, a soft row stays. 2 is below: tokens at once, R = ln 2, stay 0.
    # 3 is above R, but stay is 1 of 2; then 2. R = ln 3 from there, and 2 is below it.
    "entropies alone": (
        PLAIN,
        [
            (4, 1, "first", 1), (5, 1, "soft", 1), (2, 1, "to token", 1), (3, 1, "token", 1),
            (3, 1, "to soft", 1), (3, 1, "soft", 1), (2, 1, "to token", 1),
        ],
    ),
    # As above to the switch; then y = </think> while in tokens. 8 and 16 are above R = ln 2 and the
    # window has passed, but the row is locked.
    "said in tokens": (
        PLAIN,
        [
            (4, 1, "first", 1), (2, 1, "to token", 1), (2, END, "token", END),
            (8, 1, "token", 1), (16, 1, "token", 1), (1, 1, "token", 1), (16, 1, "token", 1),
        ],
    ),
    # 8 is above R = ln 4: by entropy soft, but y = </think> is a token and locks. 2 is below R, and
    # there is no switch left to make: nothing is blended in.
    "said while soft": (
        PLAIN,
        [
            (4, 1, "first", 1), (8, END, "token", END), (2, 1, "token", 1), (16, 1, "token", 1),
            (16, 1, "token", 1),
        ],
    ),
    # The switch and </think> at once: b E[</think>] + (1 - b) E[</think>] is E[</think>].
    "said at the switch": (
        PLAIN,
        [(4, 1, "first", 1), (2, END, "token", END), (8, 1, "token", 1), (8, 1, "token", 1)],
    ),
    # A hard y in a soft stretch is a token for that step, no switch: R stays ln 4, and the next is
    # soft. At the switch to tokens it is blended as any; at that to soft it is a token, while the
    # row is soft from there on.
    "hard tokens": (
        {"window": 1, "hard_token_ids": (HARD,)},
        [
            (4, 1, "first", 1), (4, HARD, "token", HARD), (4, 1, "soft", 1),
            (2, HARD, "to token", HARD), (8, HARD, "token", HARD), (8, 1, "soft", 1),
        ],
    ),
    # C = 1. n = 1 at step 1: step 2 says </think>, whatever y is, and 8 > 2 makes it soft. n = 2 at
    # step 3: step 4 says it, in tokens. It was not drawn: 8 > 2 makes step 5 soft. n = 3 > 2C at
    # step 6, which is still taken; step 7 ends the phase.
    "a budget": (
        {"window": 1, "max_switches": 1},
        [
            (4, 1, "first", 1), (2, 1, "to token", 1), (8, 1, "to soft", END),
            (2, 1, "to token", 1), (2, 1, "token", END), (8, 1, "to soft", 1),
            (2, 1, "to token", 1), (2, 1, "halt", 1),
        ],
    ),
    # C = 2: nothing is said after n = 1; it is after n = 2. Then y = </think> is drawn and locks:
    # n stays 2.
    "a budget and the lock": (
        {"window": 1, "max_switches": 2},
        [
            (4, 1, "first", 1), (2, 1, "to token", 1), (8, 1, "to soft", 1), (2, 1, "to token", 1),
            (2, 1, "token", END), (2, END, "token", END), (8, 1, "token", 1), (1, 1, "token", 1),
        ],
    ),
    # The step that is to say </think> draws it too: that locks.
    "drawn where it is said": (
        {"window": 1, "max_switches": 1},
        [
            (4, 1, "first", 1), (2, 1, "to token", 1), (8, END, "token", END), (8, 1, "token", 1),
        ],
    ),
    # A hard y where </think> is said: what is said counts, so the soft row feeds soft.
    "said over a hard token": (
        {"window": 1, "max_switches": 1, "hard_token_ids": (HARD,)},
        [(4, 1, "first", 1), (2, 1, "to token", 1), (8, HARD, "to soft", END)],
    ),
    # Nothing can be said: n = C ends the phase, one step later. No end token is blended in either.
    "a budget without </think>": (
        {"window": 1, "max_switches": 1, "end_token_id": -1},
        [(4, 1, "first", 1), (2, 1, "token", 1), (2, 1, "halt", 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_entropies_and_drawn_tokens_give_the_table(name: str) -> None:
    settings, table = TABLES[name]
    marks = {"think_token_id": THINK, "end_token_id": END, "newline_token_id": NEWLINE}
    switch = SwitchParams(alpha=ALPHA, beta=BETA, **(marks | settings))
    params = ReasoningParams(mode="auto", steps=STEPS, switch=switch)
    slots = Slots(2, VOCAB, dtype=torch.float32, device=torch.device("cpu"))
    mode = AutoMode(slots)
    slots.admit([Admission(slot=1, reasoning=params)])
    for step, (k, y, kind, said) in enumerate(table):
        logits = logits_of(k).unsqueeze(0)
        ctx = StepContext(
            slots=slots,
            row_slots=torch.tensor([1]),
            host_slots=(1,),
            hidden=torch.zeros(1, VOCAB),
            logits=logits,
            raw_logits=logits,
            sampled=torch.tensor([y]),
            embedding=EMBEDDING,
            adapters=AdapterBank(),
        )
        decision = mode.decide(ctx)
        [vectors] = settle([decision.vector], EMBEDDING.mean)
        slots.num_decisions += 1
        assert decision.halt is not None
        assert vectors is not None
        assert decision.is_vector is not None
        halts = int(decision.halt) == HaltReason.SWITCHES
        assert halts == (kind == "halt"), step
        if halts:
            continue
        vector = vectors[0] if decision.is_vector[0] else EYE[decision.token[0]]
        assert int(decision.token) == said, step
        torch.testing.assert_close(vector, fed(kind, step, k, said), msg=f"step {step}")


def drive(
    ks: Sequence[int], halt: HaltParams, **switch: Any
) -> tuple[list[RowResult], RequestOutput, Progress]:
    """Think and answer through the whole step; the likeliest token is the first, 0.

    Also the last output, and what is left.
    """
    slots = Slots(1, VOCAB, dtype=torch.float32, device=torch.device("cpu"))
    step = ReasoningStep(
        slots, mode_names(), vocab_size=VOCAB, embedding=EMBEDDING, adapters=AdapterBank(),
        project_logits=lambda hidden: hidden,
    )  # fmt: skip
    given = SwitchParams(window=1, max_switches=1, end_token_id=END, **switch)
    reasoning = {"switch": given, "halt": halt}
    request = make_request(mode="auto", steps=STEPS, end=(END,), max_tokens=99, reasoning=reasoning)
    step.admit([Admission.read(0, request)])
    progress, results, outputs = start(request), [], []
    for k in ks:
        row = logits_of(k).unsqueeze(0)
        [result] = step.run([progress.plan(0)], row, row)
        outputs.append(progress.advance(result))
        results.append(result)
    return results, outputs[-1], progress


def test_said_end_of_thought_ends_the_phase_where_that_token_does() -> None:
    """Stage one is unbounded: `answer_tokens` is for what follows the final words."""
    halt = HaltParams(stop_token_ids=(END,))
    results, output, _ = drive([4, 2, 8, 2, 2], halt, final_token_ids=(END, 5, 6), answer_tokens=2)
    assert [r.phase for r in results] == [Phase.THINK] * 2 + [Phase.BOUNDARY] + [Phase.ANSWER] * 2
    assert [r.token_id for r in results] == [0, 0, END, 0, 0]
    assert results[2].halt_reason is HaltReason.STOP_TOKEN
    assert output.finish_reason is None


@pytest.mark.parametrize("final", [(END, 5, 6), ()])
def test_switches_beyond_twice_the_budget_force_the_final_words(final: tuple[int, ...]) -> None:
    """Where no rule ends the phase at </think>; without words of their own the end token serves."""
    ks = [4, 2, 8, 2, 2, 8, 2, *[2] * (len(final or (END,)) + 2)]
    results, output, progress = drive(ks, HaltParams(), final_token_ids=final, answer_tokens=2)
    assert [r.token_id for r in results[:7]] == [0, 0, END, 0, END, 0, 0]
    assert {r.phase for r in results[:7]} == {Phase.THINK}
    forced = [r.token_id for r in results if r.phase is Phase.BOUNDARY]
    assert forced == list(final or (END,))
    assert results[7].halt_reason is HaltReason.SWITCHES
    assert [r.phase for r in results[-2:]] == [Phase.ANSWER] * 2
    assert output.finish_reason is FinishReason.LENGTH
    assert progress.num_forced_left == 0

"""Each rule ends a phase at the step that was made for it (a synthetic output head)."""

from typing import Any

import pytest
import torch

from coconut_serve.params import HaltParams, Phase
from coconut_serve.reasoning.settings import Admission
from coconut_serve.types import HaltReason
from tests.fakes import make_request
from tests.reasoning.test_modes import HIDDEN, TABLE, drive, pointing_at, start

pytestmark = pytest.mark.torch

GO, STOP = 11, 12
END = 5


def steps_until_end(
    halt: HaltParams, hidden: list[torch.Tensor], mode: str = "latent", **reasoning: Any
) -> tuple[int, HaltReason]:
    """How many steps a row thinks, and why it ended."""
    request = make_request(
        mode=mode, steps=len(hidden) - 1, end=(END,), reasoning={"halt": halt, **reasoning}
    )
    results = drive(request, hidden)
    thinking = [r for r in results if r.phase is Phase.THINK]
    ending = next(r for r in results if r.halt_reason is not HaltReason.NONE)
    assert results.index(ending) == len(thinking)
    assert ending.phase is Phase.BOUNDARY
    return len(thinking), ending.halt_reason


def sequence(special: torch.Tensor, at: int, other: torch.Tensor, length: int = 9) -> list[Any]:
    return [special if i == at else other for i in range(length)]


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("test", ["argmax", "sampled"])
def test_stop_token_of_a_step_without_text(at: int, test: str) -> None:
    """At strength 60 another token is drawn with p < 1e-20."""
    halt = HaltParams(stop_token_ids=(30, STOP), stop_test=test)  # type: ignore[arg-type]
    hidden = sequence(pointing_at(STOP, 60), at, pointing_at(GO, 60))
    assert steps_until_end(halt, hidden) == (at, HaltReason.STOP_TOKEN)


@pytest.mark.parametrize("mode", ["latent", "cot", "distribution", "auto"])
def test_stop_tokens_may_be_likely_together(mode: str) -> None:
    """The likeliest token is another; each counts once, however often it is named."""

    def mass(hidden: torch.Tensor) -> float:
        return float((hidden @ TABLE.T / 2).softmax(-1)[[30, STOP]].sum())

    less, more = sorted((pointing_at(GO, 3), pointing_at(8, 3)), key=mass)
    for least, expected in ((0.99 * mass(more), 4), (1.01 * mass(more), 8)):
        halt = HaltParams(
            stop_token_ids=(30, STOP, 30), stop_test="prob", stop_prob=least, stop_temperature=2.0
        )
        assert mass(less) < least
        reason = HaltReason.STOP_TOKEN if expected == 4 else HaltReason.CAP
        assert steps_until_end(halt, sequence(more, 4, less), mode) == (expected, reason)
    sure = HaltParams(stop_token_ids=(STOP,), stop_test="prob", stop_prob=1.0)
    said = (8, HaltReason.CAP) if mode == "latent" else (2, HaltReason.STOP_TOKEN)
    assert steps_until_end(sure, sequence(pointing_at(STOP, 9), 2, less), mode) == said


def test_sampled_stop_comes_as_often_as_its_probability() -> None:
    """4,000 rows with p(stop) near 0.3; off by 5 standard errors: p < 1e-6."""
    from coconut_serve.params import ReasoningParams
    from coconut_serve.reasoning.halting import Controller, View
    from coconut_serve.reasoning.slots import Slots

    num = 4000
    slots = Slots(num, HIDDEN, dtype=torch.float32, device=torch.device("cpu"))
    controller = Controller(slots)
    halt = HaltParams(stop_token_ids=(1, 2), stop_test="sampled", stop_temperature=2.0)
    params = ReasoningParams(mode="latent", steps=3, halt=halt)
    slots.admit([Admission(slot=slot, seed=slot, reasoning=params) for slot in range(num)])
    logits = torch.tensor([[3.0, 1.0, 0.5, 2.0]]).expand(num, -1)
    rows = torch.arange(num)
    view = View(
        slots=slots, row_slots=rows, logits=None, raw_logits=logits, has_text=False, vector=None,
        token=torch.full_like(rows, -1),
    )  # fmt: skip
    halted = controller.check(view, tuple(range(num)))
    assert halted is not None
    p = float((logits[0] / 2.0).softmax(-1)[1:3].sum())
    share = float((halted == int(HaltReason.STOP_TOKEN)).float().mean())
    assert abs(share - p) < 5 * (p * (1 - p) / num) ** 0.5


@pytest.mark.parametrize("at", [1, 3])
def test_learned_rows(at: int) -> None:
    halt = HaltParams(learned_token_ids=(GO, STOP))
    hidden = sequence(pointing_at(STOP, 3), at, pointing_at(GO, 3))
    assert steps_until_end(halt, hidden) == (at, HaltReason.LEARNED)
    drawn = HaltParams(learned_token_ids=(GO, STOP), sample=True, stop_temperature=0.01)
    assert steps_until_end(drawn, hidden) == (at, HaltReason.LEARNED)


def test_min_steps_come_first() -> None:
    halt = HaltParams(learned_token_ids=(GO, STOP))
    hidden = [pointing_at(STOP, 3)] * 6
    assert steps_until_end(halt, hidden) == (0, HaltReason.LEARNED)
    assert steps_until_end(halt, hidden, min_steps=2) == (2, HaltReason.LEARNED)
    assert steps_until_end(halt, hidden, min_steps=5) == (5, HaltReason.CAP)


@pytest.mark.parametrize("mode", ["latent", "distribution", "cot"])
def test_entropy_on_both_sides(mode: str) -> None:
    sure, unsure = pointing_at(3, 40), torch.zeros(HIDDEN)
    cold = HaltParams(entropy_below=0.1, entropy_patience=2)
    hidden = [unsure, sure, unsure, sure, sure, unsure, unsure]
    assert steps_until_end(cold, hidden, mode) == (4, HaltReason.COLD_STOP)
    warm = HaltParams(entropy_above=0.9, entropy_unit="normalized")
    assert steps_until_end(warm, sequence(unsure, 3, sure), mode) == (3, HaltReason.UNCERTAIN)


@pytest.mark.parametrize(
    ("metric", "below"), [("cosine", 1e-3), ("rel_l2", 1e-2), ("kl", 1e-3), ("argmax_stable", 0.0)]
)
def test_convergence(metric: str, below: float) -> None:
    halt = HaltParams(converge_metric=metric, converge_below=below, converge_patience=2)  # type: ignore[arg-type]
    moving = [pointing_at(i, 5) for i in (3, 9, 14)]
    still = [pointing_at(20, 5)] * 6
    assert steps_until_end(halt, [*moving, *still]) == (5, HaltReason.CONVERGED)


def test_divergence_is_of_the_distribution_before_from_the_one_now() -> None:
    """KL(p | q) and KL(q | p) are far apart here; the bound lies between."""
    old, new = pointing_at(3, 9), pointing_at(4, 4)
    p, q = ((hidden @ TABLE.T).log_softmax(-1) for hidden in (old, new))
    forth, back = (float((a.exp() * (a - b)).sum()) for a, b in ((p, q), (q, p)))
    for below, expected in (((forth + back) / 2, forth < back), (forth + 1e-3, True)):
        halt = HaltParams(converge_metric="kl", converge_below=below)
        reason = HaltReason.CONVERGED if expected else HaltReason.CAP
        assert steps_until_end(halt, [old, new, new])[1] == reason


def test_steps_of_another_block_do_not_count() -> None:
    """A row's second block starts like its first: nothing to compare with, no step counted."""
    from coconut_serve.params import ReasoningParams
    from coconut_serve.reasoning.halting import Controller, View
    from coconut_serve.reasoning.slots import Slots

    slots = Slots(1, HIDDEN, dtype=torch.float32, device=torch.device("cpu"))
    controller = Controller(slots)
    halt = HaltParams(converge_metric="kl", converge_below=1e-3, converge_patience=2)
    params = ReasoningParams(mode="latent", steps=9, enter_token_id=1, max_blocks=2, halt=halt)
    slots.admit([Admission(slot=0, reasoning=params)])
    row, logits = torch.tensor([0]), torch.randn(1, 4)
    view = View(
        slots=slots, row_slots=row, logits=logits, raw_logits=logits, token=row, has_text=False,
        vector=None,
    )  # fmt: skip
    for _ in range(2):
        slots.open_blocks(row, torch.tensor([True]))
        halts = []
        for _ in range(3):
            halts.append(controller.check(view, (0,)))
            slots.steps_left -= 1
        assert [int(halt) for halt in halts if halt is not None] == [0, 0, HaltReason.CONVERGED]


def test_first_rule_wins_and_rows_without_rules_go_on() -> None:
    halt = HaltParams(stop_token_ids=(STOP,), entropy_below=10.0, entropy_patience=1)
    assert steps_until_end(halt, [pointing_at(STOP, 9)] * 3) == (0, HaltReason.STOP_TOKEN)
    assert steps_until_end(HaltParams(), [pointing_at(STOP, 9)] * 3) == (2, HaltReason.CAP)


def test_end_token_may_come_on_top_of_the_last_latent() -> None:
    from tests.reasoning.test_modes import make_step

    adds: dict[str, Any] = {"end_adds_vector": True}
    request = make_request(mode="latent", steps=2, end=(END, 6), reasoning=adds)
    step, slots = make_step()
    step.admit([Admission.read(2, request)])
    progress, fed, flags = start(request), [], []
    hidden = [torch.randn(HIDDEN) for _ in range(4)]
    for row in hidden:
        [result] = step.run([progress.plan(2)], row[None], row[None])
        progress.advance(result)
        flags.append((result.phase, result.is_vector))
        fed.append(slots.embed(lambda ids: TABLE[ids], torch.tensor([2]))[0])
    assert flags[2:] == [(Phase.BOUNDARY, True), (Phase.BOUNDARY, False)]
    torch.testing.assert_close(fed[2], hidden[2] + TABLE[END])
    torch.testing.assert_close(fed[3], TABLE[6])


def test_constant_source_feeds_one_embedding() -> None:
    request = make_request(
        mode="latent", steps=2, reasoning={"source": "constant", "constant_token_id": 9,
                                           "trace": "vectors"},
    )  # fmt: skip
    results = drive(request, [torch.randn(HIDDEN) for _ in range(2)])
    for result in results:
        assert result.trace is not None
        assert result.trace.vector == pytest.approx(TABLE[9].tolist())


def test_noise_and_soft_weight_change_the_vector_as_they_say() -> None:
    hidden = torch.randn(HIDDEN)

    def vector(**reasoning: Any) -> torch.Tensor:
        request = make_request(
            mode="latent", steps=1, reasoning={"trace": "vectors", **reasoning}, seed=4
        )
        [result] = drive(request, [hidden])
        assert result.trace is not None
        return torch.tensor(result.trace.vector)

    soft = (hidden @ TABLE.T).softmax(-1) @ TABLE
    torch.testing.assert_close(vector(soft_weight=0.3), hidden + 0.3 * soft)
    one, two = vector(noise_std=0.1) - hidden, vector(noise_std=0.2) - hidden
    torch.testing.assert_close(2 * one, two, atol=1e-5, rtol=1e-4)
    assert 0.02 < float(one.norm()) < 1.0

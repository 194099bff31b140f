import pytest

pytest.importorskip("torch")
import torch

from coconut_serve.params import MAX_LOGPROBS, Phase
from coconut_serve.reasoning import report
from coconut_serve.reasoning.plan import RowPlan, Wanted
from coconut_serve.reasoning.rows import StepRows
from coconut_serve.reasoning.slots import Slots
from coconut_serve.types import HaltReason

pytestmark = pytest.mark.torch

VOCAB, HIDDEN = 50, 8
KINDS = (
    Wanted(),
    Wanted(num_logprobs=3),
    Wanted(trace_top_k=0),
    Wanted(trace_top_k=5),
    Wanted(num_logprobs=0, trace_top_k=MAX_LOGPROBS, wants_vector=True),
)


def decided(wanted: list[Wanted], *, thinks: bool, vocab: int = VOCAB) -> StepRows:
    """A step whose rows all hold the same, whatever is wanted of them."""
    slots = Slots(8, HIDDEN, dtype=torch.float32, device=torch.device("cpu"))
    rows = [
        RowPlan(
            slot=i, mode="distribution", may_think=thinks, asks_mode=thinks, needs_logits=True,
            needs_sampled=True, wanted=each,
        )
        for i, each in enumerate(wanted)
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, vocab, generator=generator).repeat(len(rows), 1)
    step = StepRows(rows, torch.zeros(len(rows), HIDDEN), slots)
    step.set_logits(list(range(len(rows))), logits, logits)
    step.token = torch.full((len(rows),), 7)
    step.thinks[:] = thinks
    step.is_vector[:] = thinks
    step.vector = torch.randn(1, HIDDEN, generator=generator).repeat(len(rows), 1)
    return step


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("wanted", KINDS)
def test_row_reads_the_same_from_a_wider_matrix(wanted: Wanted, thinks: bool) -> None:
    inputs = torch.ones(len(KINDS), HIDDEN)
    alone = report.pack(decided([wanted], thinks=thinks), inputs[:1])[0].tolist()
    mixed = report.pack(decided([*KINDS], thinks=thinks), inputs)[KINDS.index(wanted)].tolist()
    width = report.width(wanted, HIDDEN)
    assert len(mixed) >= width
    assert report.read(wanted, mixed[:width]) == report.read(wanted, alone)


def test_report_holds_what_was_decided() -> None:
    wanted = KINDS[-1]
    step = decided([wanted], thinks=True)
    result = report.read(wanted, report.pack(step, torch.ones(1, HIDDEN))[0].tolist())
    log_probs = step.logits_of([0]).log_softmax(-1)[0]
    assert (result.phase, result.token_id, result.is_vector) == (Phase.THINK, 7, True)
    assert result.trace is not None
    assert result.trace.top[0][0] == int(log_probs.argmax())
    assert result.trace.top[0][1] == result.trace.max_prob
    assert result.trace.entropy == pytest.approx(float(-(log_probs.exp() * log_probs).sum()))
    assert result.trace.vector == pytest.approx(step.vector[0].tolist())
    answer = decided([wanted], thinks=False)
    answer.halt[0] = int(HaltReason.CAP)
    result = report.read(wanted, report.pack(answer, torch.ones(1, HIDDEN))[0].tolist())
    assert (result.phase, result.halt_reason) == (Phase.ANSWER, HaltReason.CAP)
    assert result.logprobs is not None
    assert result.logprobs.logprob == pytest.approx(float(log_probs[7]))
    assert result.trace is None


def test_vocabulary_smaller_than_what_is_asked() -> None:
    wanted = Wanted(num_logprobs=MAX_LOGPROBS)
    values = report.pack(decided([wanted], thinks=False, vocab=9), torch.ones(1, HIDDEN))
    result = report.read(wanted, values[0].tolist())
    assert result.logprobs is not None
    assert len(result.logprobs.top) == 9

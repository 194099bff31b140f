"""A mode is one file and one line: what the registry promises, and the step's rules."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coconut_serve.params import HaltParams, MixtureParams, Phase
from coconut_serve.reasoning.adapters import AdapterBank
from coconut_serve.reasoning.embedding import Embedding
from coconut_serve.reasoning.mode import load_mode, needs_of
from coconut_serve.reasoning.progress import Progress, RowResult
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.reasoning.settings import Admission
from coconut_serve.reasoning.slots import Slots
from coconut_serve.reasoning.step import ReasoningStep
from coconut_serve.types import HaltReason, Request
from tests.fakes import make_request

pytestmark = pytest.mark.torch

VOCAB, HIDDEN = 64, 8
TABLE = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
TABLE /= TABLE.norm(dim=1, keepdim=True)  # so that each row is its own likeliest token


def make_step(num_slots: int = 8) -> tuple[ReasoningStep, Slots]:
    slots = Slots(num_slots, HIDDEN, dtype=torch.float32, device=torch.device("cpu"))
    step = ReasoningStep(
        slots,
        mode_names(),
        vocab_size=VOCAB,
        embedding=Embedding(lambda ids: TABLE[ids], TABLE),
        adapters=AdapterBank(),
        project_logits=lambda hidden: hidden @ TABLE.T,
    )
    return step, slots


def start(request: Request) -> Progress:
    """The host's side of a sequence that has not begun."""
    return Progress(request, needs_of(request.reasoning))


def drive(request: Request, hidden: list[torch.Tensor]) -> list[RowResult]:
    """Run one row through given hidden states."""
    step, _ = make_step()
    step.admit([Admission.read(3, request)])
    progress = start(request)
    results = []
    for row in hidden:
        plan = progress.plan(3)
        [result] = step.run([plan], row.unsqueeze(0), row.unsqueeze(0))
        progress.advance(result)
        results.append(result)
    return results


def pointing_at(token: int, strength: float = 20.0) -> torch.Tensor:
    """A hidden state whose logits clearly favour a token."""
    return TABLE[token] * strength


@pytest.mark.parametrize("name", mode_names())
def test_registered_mode_is_importable_under_its_name(name: str) -> None:
    assert load_mode(name).name == name


def test_modes_never_wait_for_the_device() -> None:
    """No .item(), .cpu(), .tolist() in the modes' own code."""
    folder = Path(__file__).parents[2] / "coconut_serve" / "reasoning" / "modes"
    for file in folder.glob("*.py"):
        called = {
            node.func.attr
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert not called & {"item", "cpu", "tolist", "numpy"}, file.name


def test_latent_feeds_hidden_then_end_tokens_then_answers() -> None:
    request = make_request(mode="latent", steps=2, end=(5, 6))
    hidden = [torch.randn(HIDDEN) for _ in range(5)] + [pointing_at(9)]
    step, slots = make_step()
    step.admit([Admission.read(1, request)])
    progress = start(request)
    fed = []
    for row in hidden:
        [result] = step.run([progress.plan(1)], row[None], row[None])
        progress.advance(result)
        fed.append((result.phase, slots.embed(lambda ids: TABLE[ids], torch.tensor([1]))[0]))
    assert [phase for phase, _ in fed[:4]] == [Phase.THINK] * 2 + [Phase.BOUNDARY] * 2
    assert torch.equal(fed[0][1], hidden[0])
    assert torch.equal(fed[1][1], hidden[1])
    assert torch.equal(fed[2][1], TABLE[5])
    assert torch.equal(fed[3][1], TABLE[6])
    assert fed[5][0] is Phase.ANSWER
    assert torch.equal(fed[5][1], TABLE[9])


def test_latent_steps_skip_the_output_head() -> None:
    request = make_request(mode="latent", steps=2, end=(5,))
    progress = start(request)
    for left in (2, 1, 0):
        progress.num_steps_left = left
        assert not progress.plan(0).needs_logits
    no_end = make_request(mode="latent", steps=2)
    progress = start(no_end)
    assert not progress.plan(0).needs_logits
    progress.num_steps_left = 0
    assert progress.plan(0).needs_logits, "it answers in this step"


def test_cot_ends_on_its_stop_token() -> None:
    halt = HaltParams(stop_token_ids=(7,))
    request = make_request(mode="cot", steps=10, end=(7,), reasoning={"halt": halt})
    results = drive(request, [pointing_at(3), pointing_at(7), pointing_at(4)])
    assert [r.phase for r in results] == [Phase.THINK, Phase.BOUNDARY, Phase.ANSWER]
    assert [r.token_id for r in results] == [3, 7, 4]
    assert results[1].halt_reason is HaltReason.STOP_TOKEN


def test_distribution_ends_when_the_likeliest_token_is_the_stop_token() -> None:
    halt = HaltParams(stop_token_ids=(7,))
    request = make_request(mode="distribution", steps=10, end=(7,), reasoning={"halt": halt})
    results = drive(request, [pointing_at(3), pointing_at(7), pointing_at(4)])
    assert [r.phase for r in results] == [Phase.THINK, Phase.BOUNDARY, Phase.ANSWER]
    assert [r.is_vector for r in results] == [True, False, False]
    assert results[1].halt_reason is HaltReason.STOP_TOKEN


def test_cold_stop_needs_consecutive_certain_steps() -> None:
    halt = HaltParams(entropy_below=0.5, entropy_patience=3)
    request = make_request(mode="distribution", steps=20, end=(7,), reasoning={"halt": halt})
    cold, warm = pointing_at(3, 30.0), torch.zeros(HIDDEN)
    results = drive(request, [cold, cold, warm, cold, cold, cold, cold])
    assert [r.phase for r in results[:5]] == [Phase.THINK] * 5
    assert results[5].halt_reason is HaltReason.COLD_STOP
    assert results[5].phase is Phase.BOUNDARY
    assert results[6].phase is Phase.ANSWER


def test_cap_ends_a_phase_without_end_tokens_with_an_answer() -> None:
    request = make_request(mode="distribution", steps=1)
    results = drive(request, [pointing_at(3), pointing_at(9)])
    assert [r.phase for r in results] == [Phase.THINK, Phase.ANSWER]
    assert results[1].token_id == 9
    assert results[1].halt_reason is HaltReason.CAP


@pytest.mark.parametrize("noise", ["gumbel", "dirichlet"])
def test_noise_depends_on_the_seed_alone(noise: str) -> None:
    def vectors(seed: int, slot: int, mates: int) -> torch.Tensor:
        step, slots = make_step()
        mixture = MixtureParams(noise=noise, temperature=2.0)  # type: ignore[arg-type]
        request = make_request(
            mode="distribution", steps=4, reasoning={"mixture": mixture}, seed=seed
        )
        rows = []
        hidden = torch.linspace(-1, 1, HIDDEN)
        for i in range(mates):
            step.admit([Admission.read(i, replace(request, request_id=f"{i}"))])
            rows.append(start(request).plan(i))
        step.admit([Admission.read(slot, request)])
        rows.append(start(request).plan(slot))
        batch = hidden.expand(mates + 1, -1)
        step.run(rows, batch, batch)
        step.run(rows, batch, batch)
        return slots.vector[slot].clone()

    alone = vectors(seed=1, slot=5, mates=0)
    # Not bit for bit: this test's own head is a matrix product over the whole batch.
    torch.testing.assert_close(alone, vectors(seed=1, slot=7, mates=3))
    assert not torch.equal(alone, vectors(seed=2, slot=5, mates=0))


def test_trace_reports_what_was_fed() -> None:
    request = make_request(
        mode="latent", steps=1, end=(5,), reasoning={"trace": "vectors", "trace_top_k": 3}
    )
    hidden = pointing_at(9, 2.0)
    [result] = drive(request, [hidden])
    trace = result.trace
    assert trace is not None
    probs = (hidden @ TABLE.T).softmax(-1)
    assert trace.vector == pytest.approx(hidden.tolist())
    assert trace.norm == pytest.approx(float(hidden.norm()), rel=1e-5)
    assert trace.cosine == pytest.approx(1.0)
    assert [i for i, _ in trace.top] == probs.topk(3).indices.tolist()
    assert trace.max_prob == pytest.approx(float(probs.max()), rel=1e-4)
    assert trace.entropy == pytest.approx(float(-(probs * probs.log()).sum()), rel=1e-4)


def test_unknown_mode_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        load_mode("telepathy")

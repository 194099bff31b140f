"""The host's side of a sequence: what it plans, what it makes of results."""

from typing import Any

import pytest

from coconut_serve.params import Phase
from coconut_serve.reasoning.plan import Needs
from coconut_serve.reasoning.progress import Progress, RowResult
from coconut_serve.types import FinishReason, HaltReason
from tests.fakes import make_request

ENTER, END, STOP = 4, 6, 9


def result(phase: Phase, token_id: int | None = 3, **more: Any) -> RowResult:
    given = {"is_vector": token_id is None, "halt_reason": HaltReason.NONE, **more}
    return RowResult(phase=phase, token_id=token_id, **given)


def test_counts_of_a_whole_life() -> None:
    progress = Progress(make_request(mode="latent", steps=2, end=(END,), max_tokens=2))
    outputs = [
        progress.advance(each)
        for each in (
            result(Phase.THINK, None),
            result(Phase.THINK, None, is_switch=True),
            result(Phase.BOUNDARY, END, halt_reason=HaltReason.CAP),
            result(Phase.ANSWER),
            result(Phase.ANSWER),
        )
    ]
    assert [each.finish_reason for each in outputs] == [None] * 4 + [FinishReason.LENGTH]
    assert outputs[2].halt_reason is HaltReason.FIXED, "the number of steps was exact"
    counts = outputs[-1].counts
    assert (counts.num_reasoning_steps, counts.num_vector_steps, counts.num_switches) == (2, 2, 1)
    assert (counts.num_forced_tokens, counts.num_output_tokens) == (1, 2)


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (result(Phase.ANSWER, STOP), STOP),
        (result(Phase.ANSWER, 3, halt_reason=HaltReason.NUMERICAL), "numerical"),
    ],
)
def test_a_stop_is_not_shown_and_not_counted(ending: RowResult, reason: int | str) -> None:
    progress = Progress(make_request(stop_token_ids=(STOP,)))
    progress.advance(result(Phase.ANSWER))
    output = progress.advance(ending, is_last=True)
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, reason)
    assert output.token_id is None
    assert output.counts.num_output_tokens == 1


def test_no_room_for_more_ends_the_sequence() -> None:
    output = Progress(make_request()).advance(result(Phase.ANSWER), is_last=True)
    assert output.finish_reason is FinishReason.LENGTH
    assert output.token_id == 3


def test_token_that_opens_a_block_starts_the_steps_anew() -> None:
    own = {"enter_token_id": ENTER, "max_blocks": 1}
    progress = Progress(make_request(mode="latent", steps=2, end=(END,), reasoning=own))
    thinks = [progress.is_thinking]
    progress.advance(result(Phase.ANSWER, ENTER))
    thinks.append(progress.is_thinking)
    assert (progress.num_steps_left, progress.num_forced_left) == (2, 1)
    progress.advance(result(Phase.BOUNDARY, END))
    progress.advance(result(Phase.ANSWER, ENTER))
    thinks.append(progress.is_thinking)
    assert thinks == [False, True, False], "the one block was spent"


def test_plan_asks_for_logits_only_where_something_reads_them() -> None:
    latent = make_request(mode="latent", steps=1, end=(END,))
    assert not Progress(latent).plan(0).needs_logits
    assert Progress(latent, Needs(logits=True)).plan(0).thinks_on_logits
    assert Progress(latent, Needs(sampled=True)).plan(0).needs_sampled
    answering = Progress(make_request(), Needs(logits=True)).plan(5)
    assert answering.slot == 5
    assert answering.needs_sampled
    assert not answering.asks_mode


def test_trace_is_wanted_of_thinking_steps_alone() -> None:
    own = {"trace": "vectors"}
    request = make_request(mode="latent", steps=1, reasoning=own, num_logprobs=2)
    progress = Progress(request)
    assert progress.plan(0).wanted.wants_vector
    progress.advance(result(Phase.THINK, None))
    progress.advance(result(Phase.ANSWER, halt_reason=HaltReason.CAP))
    wanted = progress.plan(0).wanted
    assert (wanted.wants_vector, wanted.trace_top_k, wanted.num_logprobs) == (False, None, 2)

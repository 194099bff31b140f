"""Deltas become whole choices, in time that grows with their number."""

import time
from collections.abc import AsyncIterator

import pytest

from coconut_serve.service.collect import Collected, collect
from coconut_serve.service.generation import Delta, TokenDelta
from coconut_serve.types import FinishReason, TokenLogprobs


async def replay(deltas: list[Delta]) -> AsyncIterator[Delta]:
    for delta in deltas:
        yield delta


async def test_choices_are_joined_and_their_ends_ordered() -> None:
    ends = {"finish_reason": FinishReason.STOP, "stop_reason": "\n"}
    collected = await collect(
        replay([
            Delta(index=1, reasoning="hm"),
            Delta(index=0, content="a", tokens=(TokenDelta(token_id=1, logprobs=None),)),
            Delta(index=1, content="x", **ends),  # type: ignore[arg-type]
            Delta(index=0, content="b", tokens=(TokenDelta(token_id=2, logprobs=None),)),
            Delta(index=0, finish_reason=FinishReason.LENGTH),
        ]),
        2,
    )  # fmt: skip
    tokens = tuple(TokenDelta(token_id=i, logprobs=None) for i in (1, 2))
    first = Delta(index=0, content="ab", tokens=tokens, finish_reason=FinishReason.LENGTH)
    second = Delta(index=1, content="x", reasoning="hm", **ends)  # type: ignore[arg-type]
    assert collected == Collected(choices=(first, second), ended=(1, 0))


@pytest.mark.parametrize("has_logprobs", [False, True])
async def test_long_answers_cost_linear_time(has_logprobs: bool) -> None:
    """32k tokens took 2.1 s of the event loop, in which every other stream stood still."""
    top = TokenLogprobs(logprob=-1.0, top=((1, -1.0),)) if has_logprobs else None

    async def seconds(num_tokens: int) -> float:
        tokens = (TokenDelta(token_id=7, logprobs=top),)
        deltas = [Delta(index=0, content="ab", tokens=tokens)] * num_tokens
        end = Delta(index=0, finish_reason=FinishReason.LENGTH)
        start = time.process_time()
        collected = await collect(replay([*deltas, end]), 1)
        spent = time.process_time() - start
        assert len(collected.choices[0].tokens) == num_tokens
        return spent

    assert min([await seconds(32_768) for _ in range(3)]) < 0.2

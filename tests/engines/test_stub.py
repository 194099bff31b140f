"""The stub engine keeps the contract, and its script."""

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from coconut_serve.config import StubConfig
from coconut_serve.engines.base import Engine
from coconut_serve.engines.stub import StubEngine
from coconut_serve.errors import EngineDeadError, GenerationError
from coconut_serve.params import HaltParams
from coconut_serve.types import HaltReason, StepStats
from tests.engines.contract import EngineContract
from tests.fakes import make_request, run


@contextlib.asynccontextmanager
async def stub_engine(
    on_step: Callable[[StepStats], None] = lambda _: None, max_num_seqs: int = 16, **stub: Any
) -> AsyncIterator[Engine]:
    engine = StubEngine(
        StubConfig(**stub),
        vocab_size=258,
        max_model_len=100,
        max_num_seqs=max_num_seqs,
        on_step=on_step,
    )
    await engine.start()
    yield engine
    await engine.stop()


class TestStubContract(EngineContract):
    def open(self, on_step: Callable[[StepStats], None] = lambda _: None, **settings: Any) -> Any:
        return stub_engine(on_step, **settings)


async def test_answers_repeat_the_prompt() -> None:
    async with stub_engine() as engine:
        result = await run(engine, make_request(prompt=(1, 2, 3), max_tokens=5))
        assert result.token_ids == [1, 2, 3, 1, 2]


async def test_stop_tokens_of_the_prompt_are_left_out() -> None:
    async with stub_engine() as engine:
        request = make_request(prompt=(1, 2, 3), max_tokens=4, stop_token_ids=(2,))
        assert (await run(engine, request)).token_ids == [1, 3, 1, 3]


async def test_speed_is_what_was_asked() -> None:
    """Sleeps are never shorter than asked, so only the lower bound is certain."""
    async with stub_engine(ttft_seconds=0.05, tokens_per_second=200.0) as engine:
        started = time.perf_counter()
        await run(engine, make_request(max_tokens=11))
        assert time.perf_counter() - started >= 0.05 + 10 * 0.005


async def test_scripted_failures() -> None:
    async with stub_engine(fail_at_token=3) as engine:
        with pytest.raises(GenerationError):
            await run(engine, make_request())
        await engine.check_health()
    async with stub_engine(fail_after_requests=1) as engine:
        await run(engine, make_request())
        with pytest.raises(EngineDeadError):
            await run(engine, make_request())
        with pytest.raises(EngineDeadError):
            await engine.check_health()


async def test_thoughts_in_words_end_by_themselves_where_an_end_token_may_end_them() -> None:
    ends = {"halt": HaltParams(stop_token_ids=(9,))}
    async with stub_engine() as engine:
        for mode, steps, expected, reason in (
            ("cot", 40, 16, HaltReason.STOP_TOKEN),
            ("cot", 5, 5, HaltReason.CAP),
            ("distribution", 40, 16, HaltReason.STOP_TOKEN),
            ("latent", 40, 40, HaltReason.FIXED),
        ):
            request = make_request(mode=mode, steps=steps, end=(9,), max_tokens=2, reasoning=ends)
            result = await run(engine, request)
            assert result.counts.num_reasoning_steps == expected
            assert [o.halt_reason for o in result.outputs if o.halt_reason] == [reason]

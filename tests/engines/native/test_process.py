"""The engine in a process of its own: the same contract, and what can befall a process."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from coconut_serve.errors import EngineDeadError, StartupError
from coconut_serve.types import StepStats
from tests.engines.methods.table import requests
from tests.engines.native import test_engine
from tests.fakes import drift, make_request, native_engine, run, run_all

pytestmark = [pytest.mark.torch, pytest.mark.asyncio(loop_scope="module")]


class Shared:
    """The engine of all tests here that need no settings of their own: a process starts slowly."""

    engine: Any

    def __init__(self) -> None:
        self.on_step: Callable[[StepStats], None] = lambda _: None

    @property
    def is_dead(self) -> bool:
        return self.engine._death is not None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tiny_llama: Path) -> AsyncIterator[Shared]:
    shared = Shared()
    async with native_engine(
        tiny_llama, lambda stats: shared.on_step(stats), has_own_process=True
    ) as shared.engine:
        yield shared


async def test_it_gives_what_a_thread_gives(tiny_llama: Path, shared: Shared) -> None:
    """Tokens, traces and counts, of every method that needs no adapter."""
    asked = [r for r in requests(rows=1).values() if r.reasoning.adapter == "none"]
    assert len(asked) > 30
    async with native_engine(tiny_llama) as engine:
        expected = await run_all(engine, asked)
        assert engine.pid == os.getpid()
    assert shared.engine.pid != os.getpid()
    found = await run_all(shared.engine, asked)
    for request, ours, theirs in zip(asked, found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids, request.request_id
        assert ours.thinking_ids == theirs.thinking_ids
        assert ours.counts.num_reasoning_steps == theirs.counts.num_reasoning_steps
        for step, fed in enumerate(zip(ours.vectors, theirs.vectors, strict=True)):
            assert fed[0] == pytest.approx(fed[1], abs=drift(step))


async def test_killed_process_ends_what_runs_and_is_told(tiny_llama: Path) -> None:
    async with native_engine(tiny_llama, has_own_process=True, max_model_len=250) as engine:
        running = [
            asyncio.ensure_future(run(engine, make_request(f"{i}", max_tokens=200)))
            for i in range(16)
        ]
        await asyncio.sleep(0.2)
        os.kill(engine.pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            for each in running:
                with pytest.raises(EngineDeadError, match="killed by signal 9"):
                    await each
            with pytest.raises(EngineDeadError):
                await engine.check_health()
            with pytest.raises(EngineDeadError):
                await run(engine, make_request())


async def test_signals_to_the_group_are_not_its_own(shared: Shared) -> None:
    """A terminal's Ctrl-C and a service manager's SIGTERM reach it too, while the server drains."""
    running = asyncio.ensure_future(run(shared.engine, make_request(max_tokens=60)))
    await asyncio.sleep(0.05)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(shared.engine.pid, number)
    assert len((await running).token_ids) == 60


async def test_what_keeps_it_from_starting_is_raised_here(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="holds no block") as caught:
        async with native_engine(tiny_llama, has_own_process=True, kv_cache_memory="1"):
            pass
    assert caught.value.param == "--kv-cache-memory"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartupError, match="model"):
        async with native_engine(tmp_path, has_own_process=True):
            pass


class TestProcessContract(test_engine.TestNativeContract):
    @pytest.fixture(autouse=True)
    def _share(self, shared: Shared) -> None:
        self.shared = shared

    def open(self, on_step: Callable[[StepStats], None] = lambda _: None, **settings: Any) -> Any:
        if settings or self.shared.is_dead:
            return super().open(on_step, has_own_process=True, **settings)
        self.shared.on_step = on_step
        return contextlib.nullcontext(self.shared.engine)

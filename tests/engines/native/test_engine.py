"""The native engine keeps the contract; what only it can do."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from coconut_serve.engines.base import Engine
from coconut_serve.errors import EngineDeadError, StartupError
from coconut_serve.types import FinishReason, StepStats
from tests.engines.contract import EngineContract
from tests.fakes import DEVICE, core_of, make_request, native_engine, run, run_all

pytestmark = pytest.mark.torch


class TestNativeContract(EngineContract):
    @pytest.fixture(autouse=True)
    def _use_model(self, tiny_llama: Path) -> None:
        self.model = tiny_llama

    def open(self, on_step: Callable[[StepStats], None] = lambda _: None, **settings: Any) -> Any:
        @contextlib.asynccontextmanager
        async def opened() -> AsyncIterator[Engine]:
            async with native_engine(self.model, on_step, **settings) as engine:
                yield engine

        return opened()


async def test_failed_step_ends_its_requests_and_the_engine_goes_on(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with native_engine(tiny_llama) as engine:
        expected = await run(engine, make_request())
        monkeypatch.setattr(core_of(engine)._runner, "run", lambda _: 1 / 0)
        with pytest.raises(EngineDeadError, match="division"):
            await run(engine, make_request())
        assert engine.num_restarts == 1  # and with it the broken runner is gone
        again = await run(engine, make_request())
        assert again.token_ids == expected.token_ids
        await engine.check_health()


async def test_engine_that_keeps_failing_stays_dead(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with native_engine(tiny_llama) as engine:
        monkeypatch.setattr(core_of(engine), "_one_step", lambda: 1 / 0)
        for _ in range(5):
            with pytest.raises(EngineDeadError):
                await run(engine, make_request())
        with pytest.raises(EngineDeadError):
            await engine.check_health()


async def test_stop_token_ends_the_answer_and_is_not_part_of_it(tiny_llama: Path) -> None:
    async with native_engine(tiny_llama) as engine:
        drawn = {"max_tokens": 12, "temperature": 1.0, "seed": 5}
        whole = (await run(engine, make_request(**drawn))).token_ids  # type: ignore[arg-type]
        stop = next(t for i, t in enumerate(whole) if i >= 3 and t not in whole[:i])
        at = whole.index(stop)
        request = make_request(**drawn, stop_token_ids=frozenset([stop]))  # type: ignore[arg-type]
        result = await run(engine, request)
        assert result.token_ids == whole[:at]
        assert result.finish_reason is FinishReason.STOP
        assert result.stop_reason == stop
        stops = frozenset([stop])
        longer = make_request(**drawn, stop_token_ids=stops, min_tokens=at + 2)  # type: ignore[arg-type]
        result = await run(engine, longer)
        assert len(result.token_ids) >= at + 2
        assert stop not in result.token_ids[: at + 2]


async def test_context_that_is_full_ends_with_length(tiny_llama: Path) -> None:
    async with native_engine(tiny_llama, max_model_len=20) as engine:
        for mode in ("none", "latent", "distribution"):
            request = make_request(mode=mode, steps=5 if mode != "none" else 0, max_tokens=50)
            result = await run(engine, request)
            assert result.finish_reason is FinishReason.LENGTH
            assert 5 + len(result.outputs) == 21, "the last token needs no position"


async def test_cache_too_small_for_the_asked_length_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(StartupError, match="does not fit the KV cache"):
        async with native_engine(tiny_llama, kv_cache_memory="4KiB", max_model_len=100):
            pass
    with pytest.raises(StartupError, match="holds no block"):
        async with native_engine(tiny_llama, kv_cache_memory="1"):
            pass
    with pytest.raises(StartupError, match="more than the model's"):
        async with native_engine(tiny_llama, max_model_len=100_000):
            pass
    async with native_engine(tiny_llama, kv_cache_memory="40KiB", max_model_len=None) as engine:
        assert engine.info.max_model_len == engine.info.kv_cache_positions


async def test_logprobs_are_those_of_the_plain_model(tiny_llama: Path) -> None:
    import torch

    from tests.models import load_plain

    async with native_engine(tiny_llama) as engine:
        request = make_request(num_logprobs=4, max_tokens=6)
        result = await run(engine, request)
    plain = load_plain(tiny_llama)
    ids = [*request.prompt_token_ids, *result.token_ids]
    with torch.inference_mode():
        logits = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
    for i, output in enumerate(result.outputs):
        row = logits[len(request.prompt_token_ids) - 1 + i]
        assert output.logprobs is not None
        assert output.token_id is not None
        assert output.logprobs.logprob == pytest.approx(float(row[output.token_id]), abs=1e-4)
        values, top = row.topk(4)
        assert [t for t, _ in output.logprobs.top] == top.tolist()
        assert [p for _, p in output.logprobs.top] == pytest.approx(values.tolist(), abs=1e-4)


async def test_bfloat16_runs_every_mode(tiny_llama: Path) -> None:
    async with native_engine(tiny_llama, dtype="bfloat16") as engine:
        requests = [
            make_request(f"{i}", mode=mode, steps=0 if mode == "none" else 4)
            for i, mode in enumerate(engine.info.modes)
        ]
        results = await run_all(engine, requests)
        assert all(len(r.token_ids) == 8 for r in results)


async def test_cache_of_cpu_is_what_requests_need_and_at_most_2_gib(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It took 40% of the machine's memory, 9.3 GB for a model of 135M parameters."""
    from coconut_serve.engines.native import core

    async with native_engine(tiny_llama, max_num_seqs=8, max_model_len=100) as engine:
        info = engine.info
        assert info.kv_cache_positions == 8 * 100
        per_position = 4 * (2 * 2 * 2 * 16 + 64)  # two layers of two heads, and the fed vector
        assert info.kv_cache_bytes == 800 * per_position
        assert info.weights_bytes > (tiny_llama / "model.safetensors").stat().st_size - 10_000
    assert not caplog.messages
    assert core._AUTO_CPU_CACHE_BYTES == 2 * 2**30
    monkeypatch.setattr(core, "_AUTO_CPU_CACHE_BYTES", 64 * 1024)
    async with native_engine(tiny_llama, max_model_len=None) as engine:
        assert engine.info.max_model_len == engine.info.kv_cache_positions == 84
    assert (
        "a request may have 84 positions, not the model's 256: the KV cache of 64 KiB holds no "
        "more; raise --kv-cache-memory"
    ) in caplog.messages


@pytest.mark.skipif(DEVICE != "cpu", reason="memory of a GPU is taken at once")
async def test_memory_of_the_cache_is_taken_as_it_is_used(tiny_llama: Path) -> None:
    """It was written at start; and a block freed was the last to be used again."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async with native_engine(tiny_llama, enable_prefix_caching=False):
        pass  # what torch takes once
    before = resident()
    async with native_engine(
        tiny_llama, kv_cache_memory="1GiB", enable_prefix_caching=False
    ) as engine:
        assert resident() - before < 200 * 2**20
        pool = core_of(engine)._scheduler.pool
        used = set()
        for _ in range(3):
            await run(engine, make_request(mode="latent", steps=2))
            used.add(pool._free[0])
        assert used == {1}, "the next request gets the blocks of the last"


async def test_length_beyond_the_model_is_refused_before_weights_are_read(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with pytest.raises(StartupError, match="more than the model's 256"):
        async with native_engine(tiny_llama, max_model_len=257):
            pass
    assert "checking the model's files" in caplog.messages
    assert "loading weights" not in caplog.messages


async def test_adapter_that_does_not_fit_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """It was found by the first request, and ended the engine."""
    from safetensors.torch import load_file, save_file

    from tests.models import with_projection

    model, _ = with_projection(tiny_llama, tmp_path / "m")
    file = model / "latent" / "adapter.safetensors"
    weights = load_file(file)
    for name in weights:
        wrong = {**weights, name: weights[name][..., :-1].clone()}
        save_file(wrong, file)
        with pytest.raises(StartupError, match="'default' does not fit a model of hidden_size 64"):
            async with native_engine(model):
                pass

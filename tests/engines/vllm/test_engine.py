"""What only the vLLM engine does: it survives the death of vLLM, and has vLLM's flags."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from coconut_serve.errors import EngineDeadError, StartupError
from tests.engines import readouts
from tests.engines.vllm.support import Engines
from tests.fakes import free_port, make_request, run
from tests.models import save_tiny

pytestmark = pytest.mark.vllm


async def test_death_of_a_worker_is_answered_and_mended(wide_llama: Path, engines: Engines) -> None:
    async with engines.open(wide_llama) as engine:
        expected = await run(engine, make_request(mode="latent", steps=3))
        stream = engine.generate(make_request(max_tokens=80))
        await anext(stream)
        processes = engine._life.llm.engine_core.resources.engine_manager.processes
        os.kill(processes[0].pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            async for _ in stream:
                pass
        with pytest.raises(EngineDeadError) as caught:
            await engine.check_health()
        assert caught.value.retry_after_seconds
        async with asyncio.timeout(120):
            while engine.num_restarts == 0:
                await asyncio.sleep(0.2)
        await engine.check_health()
        again = await run(engine, make_request(mode="latent", steps=3))
        assert again.token_ids == expected.token_ids


async def test_readouts_of_counted_steps_end_nothing(wide_llama: Path, engines: Engines) -> None:
    """vLLM itself stopped at the token that a soft step stands for."""
    async with engines.open(wide_llama) as engine:
        for mode in readouts.MODES:
            await readouts.check(engine, mode)


async def test_what_cannot_be_served_stops_the_start(wide_llama: Path, engines: Engines) -> None:
    for flags, message in (
        (("-pp", "2"), "does not work with pipeline parallelism"),
        (("--num-gpu-blocks-override", "1"), "vLLM did not start"),
    ):
        with pytest.raises(StartupError, match=message):
            async with engines.open(wide_llama, lambda _: None, *flags):
                pass


async def test_longrope_is_refused_beyond_its_short_factors(
    tmp_path: Path, engines: Engines
) -> None:
    """vLLM computes short rows with the factors of long ones where it could meet such."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
    }  # fmt: skip
    settings = {"rope_parameters": rope, "original_max_position_embeddings": 64, "head_dim": 32}
    model = save_tiny("phi3", tmp_path, hidden_size=128, num_key_value_heads=4, **settings)
    with pytest.raises(StartupError, match="--max-model-len 64"):
        async with engines.open(model, max_model_len=96):
            pass


async def test_missing_weights_are_named_before_vllm_starts(
    wide_llama: Path, engines: Engines, tmp_path: Path
) -> None:
    """vLLM ran with a tensor as it was allocated."""
    from safetensors.torch import load_file, save_file

    for file in wide_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StartupError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        async with engines.open(tmp_path):
            pass


async def test_memory_is_told_and_another_device_refused(
    wide_llama: Path, engines: Engines
) -> None:
    async with engines.open(wide_llama) as engine:
        assert 0.99 < engine.info.kv_cache_bytes / (64 * 2**20) <= 1, "whole blocks"
        assert (engine.info.weights_bytes > 0) is (engine.info.device != "cpu")
    if engine.info.device == "cpu":
        with pytest.raises(StartupError, match="--device cuda"):
            async with engines.open(wide_llama, device="cuda"):
                pass


def test_command_line_serves_and_shows_both_kinds_of_metrics(
    wide_llama: Path, tmp_path: Path
) -> None:
    port = free_port()
    command = [
        sys.executable, "-m", "coconut_serve.cli", "serve", str(wide_llama), "--engine", "vllm",
        "--dtype", "float32", "--block-size", "32", "--max-model-len", "96", "--port", str(port),
        "--kv-cache-memory", "64MiB", "--served-model-name", "m", "--", "--enforce-eager",
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output,
            env={**os.environ, "COCONUT_TEST_KERNELS": "torch"},
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log)
            body: dict[str, Any] = {
                "model": "m:latent", "prompt": [5, 6, 7, 8, 9], "max_tokens": 4, "temperature": 0,
                "return_token_ids": True,
            }  # fmt: skip
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
            assert len(answer["choices"][0]["token_ids"]) == 4
            assert answer["usage"]["reasoning"]["latent_steps"] == 3
            page = httpx.get(f"{url}/metrics", timeout=30).text
            assert 'coconut_latent_steps_total{engine="vllm"' in page
            assert "vllm:generation_tokens_total" in page
            [model, *_] = httpx.get(f"{url}/v1/models", timeout=30).json()["data"]
            assert {"speculative_decoding", "pad_positions"} <= {*model["unsupported_features"]}
            assert httpx.get(f"{url}/version", timeout=30).json()["engine"] == "vllm"
            for wrong, param in (
                ({"prompt": [5] * 200}, "prompt"),
                ({"reasoning": {"pad_positions": True}}, "reasoning.pad_positions"),
            ):
                refused = httpx.post(f"{url}/v1/completions", json=body | wrong, timeout=30)
                assert refused.status_code == 400
                assert refused.json()["error"]["param"] == param
        finally:
            process.terminate()
            assert process.wait(60) == 0, log.read_text()[-2000:]


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise AssertionError(log.read_text()[-3000:])

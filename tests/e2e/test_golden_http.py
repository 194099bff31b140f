"""The authors' own outputs (facebookresearch/coconut) through HTTP, in every situation."""

import asyncio
import base64
import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file

from tests.fakes import GOLDEN, listening, native_app, write_golden

pytestmark = pytest.mark.torch

# What changes around the requests; the answers must not.
SITUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks-of-5": {"max_num_batched_tokens": 5, "max_num_seqs": 5},
    "no-prefix-cache": {"enable_prefix_caching": False},
    "preemption": {"max_model_len": 80, "num_positions": 96},
    "preemption-no-prefix-cache": {
        "max_model_len": 80,
        "num_positions": 96,
        "enable_prefix_caching": False,
    },
    "preemption-chunks-of-7": {
        "max_model_len": 80,
        "num_positions": 120,
        "max_num_batched_tokens": 7,
        "max_num_seqs": 6,
    },
}


def engine_settings(model: str, situation: str) -> dict[str, Any]:
    settings = {"block_size": 4, **SITUATIONS[situation]}
    positions = settings.pop("num_positions", None)
    if positions is not None:  # bytes: layers x (keys + values) + the input vector, in float32
        kv = {"gpt2": 2 * 4 * 16, "llama": 2 * 2 * 16, "qwen3": 2 * 2 * 16}[model]
        settings["kv_cache_memory"] = str(positions * 4 * (3 * kv + 64))
    return settings


async def ask(client: openai.AsyncOpenAI, case: dict[str, Any], expected: torch.Tensor) -> None:
    """Send one case and compare tokens and fed vectors with the reference's."""
    answer = await client.completions.create(
        model="m",
        prompt=case["prompt_token_ids"],
        max_tokens=case["max_new_tokens"],
        temperature=0,
        extra_body={
            "reasoning_mode": "latent",
            "return_token_ids": True,
            "reasoning": {"steps": case["num_latents"], "trace": "vectors"},
        },
    )
    extra = answer.choices[0].model_extra
    assert extra is not None
    assert extra["token_ids"] == case["output_token_ids"]
    data = [base64.b64decode(step["vector"]) for step in extra.get("reasoning_trace", [])]
    fed = torch.tensor([struct.unpack(f"<{len(each) // 4}f", each) for each in data])
    if case["num_latents"]:
        torch.testing.assert_close(fed, expected, atol=1e-4, rtol=0)
    else:
        assert fed.numel() == 0
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.reasoning_tokens == case["num_latents"]
    # Answer, thinking and the one forced end token.
    total = len(case["output_token_ids"]) + case["num_latents"] + 1
    assert answer.usage.completion_tokens == total


@pytest.mark.parametrize("situation", SITUATIONS)
async def test_golden_cases_all_at_once(golden_model: Path, situation: str) -> None:
    name = golden_model.name
    data = json.loads((GOLDEN / name / "cases.json").read_text())
    latents = load_file(GOLDEN / name / "latents.safetensors")
    app = native_app(
        golden_model, config={"max_trace": "vectors"}, **engine_settings(name, situation)
    )
    async with listening(app) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
        jobs = [
            ask(client, case, latents.get(f"case{i}.latents", torch.empty(0)))
            for i, case in enumerate(data["cases"])
        ]
        await asyncio.gather(*jobs)
        metrics = app.state.metrics
        preemptions = metrics.preemptions.labels("m", "stub")._value.get()
        assert (preemptions > 0) == situation.startswith("preemption")
        used = metrics.kv_blocks.labels("m", "stub", "used")._value.get()
        assert used == 0, "all blocks came back"
        await client.close()


async def test_golden_cases_one_after_another(golden_model: Path) -> None:
    name = golden_model.name
    data = json.loads((GOLDEN / name / "cases.json").read_text())
    latents = load_file(GOLDEN / name / "latents.safetensors")
    app = native_app(golden_model, config={"max_trace": "vectors"}, block_size=4)
    async with listening(app) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
        for i, case in enumerate(data["cases"]):
            await ask(client, case, latents.get(f"case{i}.latents", torch.empty(0)))
        await client.close()


async def test_all_48_cases_of_three_models_concurrently(tmp_path: Path) -> None:
    """Three servers side by side in one process: nothing is shared between engines."""
    jobs = []
    async with contextlib.AsyncExitStack() as stack:
        for name in ("gpt2", "llama", "qwen3"):
            directory = tmp_path / name
            directory.mkdir()
            app = native_app(write_golden(name, directory), config={"max_trace": "vectors"})
            url = await stack.enter_async_context(listening(app))
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
            await stack.enter_async_context(client)
            data = json.loads((GOLDEN / name / "cases.json").read_text())
            latents = load_file(GOLDEN / name / "latents.safetensors")
            jobs += [
                ask(client, case, latents.get(f"case{i}.latents", torch.empty(0)))
                for i, case in enumerate(data["cases"])
            ]
        assert len(jobs) == 48
        await asyncio.gather(*jobs)

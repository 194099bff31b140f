"""The authors' own outputs through HTTP and vLLM, in every situation."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from coconut_serve.config import ServeConfig
from coconut_serve.server.app import create_app
from coconut_serve.service.service import Service
from tests.engines.vllm.support import Borrowed, Engines
from tests.fakes import GOLDEN, listening, make_metrics

pytestmark = pytest.mark.vllm

SITUATIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": ((), {}),
    "interpreted-no-prefix-cache": ((), {"kernels": "triton", "enable_prefix_caching": False}),
    "preemption": (("--num-gpu-blocks-override", "7"), {}),
    "preemption-no-prefix-cache-chunks-of-16": (
        ("--num-gpu-blocks-override", "7"),
        {"enable_prefix_caching": False, "max_num_batched_tokens": 16},
    ),
}


def vllm_app(engine: Any, model: Path) -> Any:
    """An app over a shared engine and a directory without a tokenizer."""
    from coconut_serve.checkpoint.manifest import load_manifest
    from coconut_serve.checkpoint.tokenizer import read_eos_token_ids

    metrics = make_metrics()
    config = ServeConfig(served_model_name="m", max_trace="vectors")

    async def load(_: Any) -> Service:
        return Service.build(
            config,
            engine=Borrowed(engine),
            tokenizer=None,
            manifest=load_manifest(model),
            eos_token_ids=read_eos_token_ids(model),
            metrics=metrics,
        )

    return create_app(config, load=load, metrics=metrics)


async def ask_all(url: str, name: str, *, together: bool) -> None:
    import openai
    import torch
    from safetensors.torch import load_file

    from tests.e2e.test_golden_http import ask

    data = json.loads((GOLDEN / name / "cases.json").read_text())
    latents = load_file(GOLDEN / name / "latents.safetensors")
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
    jobs = [
        ask(client, case, latents.get(f"case{i}.latents", torch.empty(0)))
        for i, case in enumerate(data["cases"])
    ]
    if together:
        await asyncio.gather(*jobs)
    else:
        for job in jobs:
            await job
    await client.close()


@pytest.mark.parametrize(
    ("name", "situation"),
    [
        *(("llama", situation) for situation in SITUATIONS),
        ("qwen3", "plain"),
        ("qwen3", "preemption-no-prefix-cache-chunks-of-16"),
    ],
)
async def test_golden_cases(
    name: str, situation: str, engines: Engines, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(f"wide_{name}")
    flags, settings = SITUATIONS[situation]
    preemptions: list[int] = []
    async with (
        engines.open(
            model, lambda s: preemptions.append(s.num_preemptions), *flags, **settings
        ) as engine,
        listening(vllm_app(engine, model)) as url,
    ):
        await ask_all(url, name, together=True)
        assert (sum(preemptions) > 0) == situation.startswith("preemption")
        if situation == "plain":
            await ask_all(url, name, together=False)

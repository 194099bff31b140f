"""Branches through HTTP inside vLLM: those of the native engine, noise and pick alike."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engines.vllm.support import Engines
from tests.engines.vllm.test_golden import vllm_app
from tests.fakes import listening, native_app

pytestmark = pytest.mark.vllm

KINDS: dict[str, dict[str, Any]] = {
    "latent": {"steps": 4, "latent_noise_std": 0.6},
    "distribution": {"steps": 4, "mixture": {"noise": "gumbel"}},
}


async def ask(url: str, mode: str, select: str) -> tuple[Any, ...]:
    body = {
        "model": "m", "prompt": list(range(5, 45)), "max_tokens": 2, "temperature": 0, "seed": 3,
        "n": 2, "return_token_ids": True, "reasoning_mode": mode,
        "reasoning": {**KINDS[mode], "branches": 5, "select": select},
    }  # fmt: skip
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        answer = (await client.post("/v1/completions", json=body)).json()
    usage = answer["usage"]
    usage.pop("prompt_tokens_details")  # what was cached differs
    for name in ("forward_passes", "latent_ms"):  # vLLM does not tell of chunks; times differ
        usage["reasoning"].pop(name)
    choices = [(c["index"], c["token_ids"], c["finish_reason"]) for c in answer["choices"]]
    return choices, usage, [choice["logprobs"] for choice in answer["choices"]]


async def test_branches_are_those_of_native(wide_llama: Path, engines: Engines) -> None:
    asked = [(mode, select) for mode in KINDS for select in ("all", "vote", "logprob")]
    async with listening(native_app(wide_llama)) as url:
        expected = [await ask(url, *each) for each in asked]
    for (mode, select), (choices, _, logprobs) in zip(asked, expected, strict=True):
        assert len(choices) == (10 if select == "all" else 2)
        assert len({tuple(ids) for _, ids, _ in choices}) > (select == "all"), mode
        assert not any(logprobs), "nobody asked for them"
    async with engines.open(wide_llama) as engine, listening(vllm_app(engine, wide_llama)) as url:
        assert [await ask(url, *each) for each in asked] == expected

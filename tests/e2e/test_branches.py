"""Branches through HTTP on a real model."""

from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes import listening, native_app, write_golden

pytestmark = pytest.mark.torch


async def test_branches_share_the_prompt_and_are_picked(tmp_path: Path) -> None:
    model = write_golden("llama", tmp_path)
    body: dict[str, Any] = {
        "model": "m", "prompt": list(range(5, 45)), "max_tokens": 2, "temperature": 0, "seed": 3,
        "return_token_ids": True, "reasoning_mode": "latent",
        "reasoning": {"steps": 4, "branches": 6, "latent_noise_std": 0.6, "select": "all"},
    }  # fmt: skip
    async with listening(native_app(model)) as url, httpx.AsyncClient(base_url=url) as client:

        async def ask(**reasoning: Any) -> Any:
            sent = body | {"reasoning": body["reasoning"] | reasoning}
            return (await client.post("/v1/completions", json=sent, timeout=60)).json()

        everyone = await ask()
        texts = [tuple(choice["token_ids"]) for choice in everyone["choices"]]
        assert [choice["index"] for choice in everyone["choices"]] == list(range(6))
        assert len(set(texts)) > 1, "each branch has noise of its own"
        assert everyone["usage"]["prompt_tokens"] == 41, "the prompt counts once, with its start"
        details = everyone["usage"]["completion_tokens_details"]
        assert details["latent_steps"] == 24
        again = await ask()
        assert [tuple(choice["token_ids"]) for choice in again["choices"]] == texts
        for select in ("first", "logprob"):
            [choice] = (await ask(select=select))["choices"]
            assert tuple(choice["token_ids"]) in texts
            assert choice["logprobs"] is None, "nobody asked for them"
        voted = await ask(select="vote")
        [choice] = voted["choices"]
        assert choice["index"] == 0
        assert Counter(texts)[tuple(choice["token_ids"])] == max(Counter(texts).values())
        assert voted["usage"]["completion_tokens_details"]["latent_steps"] == 24

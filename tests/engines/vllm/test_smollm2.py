"""A real chat model on both engines, in float32."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from coconut_serve.params import HaltParams, MixtureParams
from coconut_serve.types import Request
from tests.engines.vllm.support import Engines
from tests.engines.vllm.test_exactness import late, summary
from tests.fakes import make_request, native_engine

pytestmark = [pytest.mark.vllm, pytest.mark.model, pytest.mark.slow]

QUESTIONS = (
    "What is the capital of France?", "Name three colours.", "Is 17 a prime number?",
    "Write a sentence about a dog.", "What is 12 times 4?", "Who wrote Hamlet?",
)  # fmt: skip


def asked(tokenizer: Any) -> list[Request]:
    """24 requests: six of each mode, with noise, halting, penalties, end tokens."""
    requests = []
    for i in range(24):
        mode = ("none", "cot", "latent", "distribution")[i % 4]
        text = tokenizer.render_chat([{"role": "user", "content": QUESTIONS[i // 4]}])
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        more: dict[str, Any] = {}
        if mode == "distribution":
            more["reasoning"] = {
                "mixture": MixtureParams(noise=("none", "gumbel", "dirichlet")[i // 4 % 3]),
                "halt": HaltParams(entropy_below=0.5 if i % 8 == 3 else 0.0, entropy_patience=2),
            }
        if i % 5 == 2:
            more |= {"frequency_penalty": 0.4, "repetition_penalty": 1.1}
        steps = 0 if mode == "none" else 2 + i % 5
        end = (28,) if mode in ("latent", "cot") and i % 8 < 4 else ()
        requests.append(
            make_request(
                f"{i}", ids, mode, steps, end, max_tokens=8 + i % 7, seed=i,
                stop_token_ids=frozenset([2]), **more,
            )
        )  # fmt: skip
    return requests


async def test_24_requests_of_all_modes_are_those_of_native(
    engines: Engines, smollm2: Path
) -> None:
    from coconut_serve.checkpoint.tokenizer import load_tokenizer

    requests = asked(load_tokenizer(smollm2))
    order = random.Random(5).sample(range(24), 24)

    async def ask(engine: Any, seconds: float) -> list[Any]:
        jobs = [late(engine, r, seconds * order[i]) for i, r in enumerate(requests)]
        return [summary(r) for r in await asyncio.gather(*jobs)]

    async with native_engine(smollm2, block_size=16, max_model_len=128, max_num_seqs=24) as native:
        expected = await ask(native, 0.05)
    settings: dict[str, Any] = {"max_num_seqs": 24, "max_model_len": 128, "kv_cache_memory": "1GiB"}
    async with engines.open(smollm2, lambda _: None, **settings) as engine:
        assert await ask(engine, 0.1) == expected
    assert {len(result[0]) for result in expected} != {0}

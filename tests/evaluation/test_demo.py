"""The demo through the server says, question by question, what a plain loop says."""

import asyncio
import json
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from coconut_serve.checkpoint.weights import resolve_model
from tests.fakes import listening, native_app
from tests.models import load_plain
from tests.training.reference import answer

pytestmark = [pytest.mark.torch, pytest.mark.slow]

DEMO = resolve_model("demo")
QUESTIONS: list[str] = [
    item["question"] for item in json.loads((DEMO / "test.json").read_text())[::6]
]


async def words(client: openai.AsyncOpenAI, mode: str, question: str) -> list[str]:
    reply = await client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=20,
        extra_body={"reasoning_mode": mode},
    )  # fmt: skip
    message: Any = reply.choices[0].message
    thought = (message.model_extra or {}).get("reasoning") or "" if mode == "cot" else ""
    return f"{thought} {message.content}".split()


async def test_200_questions_in_all_modes_equal_the_plain_loop() -> None:
    """800 requests, all at once in one batch of mixed modes."""
    assert len(QUESTIONS) == 200
    modes = ("none", "cot", "latent", "distribution")
    asked = [(mode, question) for question in QUESTIONS for mode in modes]
    gate = asyncio.Semaphore(64)
    async with (
        listening(native_app(DEMO)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=9) as client,
    ):

        async def one(mode: str, question: str) -> list[str]:
            async with gate:
                return await words(client, mode, question)

        served = await asyncio.gather(*(one(*each) for each in asked))
    model, tokenizer = load_plain(DEMO), AutoTokenizer.from_pretrained(DEMO)
    for (mode, question), got in zip(asked, served, strict=True):
        tokens = answer(model, tokenizer(question).input_ids, mode)
        expected = tokenizer.decode(tokens, skip_special_tokens=True).split()
        assert got == expected, (mode, question)

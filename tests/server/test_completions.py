"""Text completions: the forms of prompt, echo, logprobs, streams."""

from typing import Any

import openai
import pytest


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("abc", ["abca"]),
        (["abc", "xy"], ["abca", "xyxy"]),
        ([97, 98], ["abab"]),
        ([[97], [98, 99]], ["aaaa", "bcbc"]),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_forms_of_prompt(
    client: openai.AsyncOpenAI, prompt: Any, expected: list[str], is_streamed: bool
) -> None:
    common: dict[str, Any] = {"model": "m", "prompt": prompt, "max_tokens": 4}
    texts = [""] * len(expected)
    if is_streamed:
        stream = await client.completions.create(stream=True, **common)
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        answer = await client.completions.create(**common)
        for choice in answer.choices:
            texts[choice.index] = choice.text
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4 * len(expected)
    assert texts == expected


async def test_n_choices_of_each_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="m", prompt=["ab", "c"], n=2, max_tokens=2)
    assert [c.text for c in answer.choices] == ["ab", "ab", "cc", "cc"]
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3, "a prompt counts once"


async def test_missing_max_tokens_means_16(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="m", prompt="ab")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


async def test_echo_repeats_the_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="m", prompt=["ab", "cd"], echo=True, max_tokens=1
    )
    assert [c.text for c in answer.choices] == ["aba", "cdc"]
    stream = await client.completions.create(
        model="m", prompt=[97, 98], echo=True, max_tokens=1, stream=True
    )
    assert "".join([c.choices[0].text async for c in stream]) == "aba"


async def test_legacy_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="m", prompt="abc", max_tokens=3, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b", "c"]
    assert logprobs.token_logprobs == [0.0, 0.0, 0.0]
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs == [{"a": 0.0}, {"b": 0.0}, {"c": 0.0}]


async def test_offsets_count_characters_not_their_parts(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="m", prompt="é€x", max_tokens=6, logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "é€x"
    assert logprobs is not None
    assert logprobs.text_offset == [0, 0, 1, 1, 1, 2]


async def test_last_chunk_has_the_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="m", prompt="abc", max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 6
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None, None, "length"]


async def test_stream_carries_prompt_ids_in_each_choices_first_chunk(
    client: openai.AsyncOpenAI,
) -> None:
    stream = await client.completions.create(
        model="m", prompt=["ab", "c"], max_tokens=1, stream=True,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    first: dict[int, Any] = {}
    async for chunk in stream:
        choice = chunk.choices[0]
        first.setdefault(choice.index, (choice.model_extra or {}).get("prompt_token_ids"))
    assert first == {0: [97, 98], 1: [99]}

"""Chat completions through the stock openai client."""

from typing import Any

import openai
import pytest

from coconut_serve.reasoning.registry import mode_names

MESSAGES: Any = [{"role": "user", "content": "hé!"}]
RENDERED = "user: hé!\nassistant: "


async def test_answer_has_openai_shape(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=5)
    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint
    assert choice.message.role == "assistant"
    assert choice.message.content == "user:"
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(RENDERED.encode())
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer._request_id


@pytest.mark.parametrize("mode", mode_names())
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_every_mode_by_every_way_in(
    client: openai.AsyncOpenAI, mode: str, is_streamed: bool
) -> None:
    ways: list[dict[str, Any]] = [
        {"model": "m", "extra_body": {"reasoning_mode": mode, "reasoning": {"steps": 3}}},
        {"model": "m", "extra_body": {"reasoning": {"mode": mode, "steps": 3}}},
        {"model": f"m:{mode}", "extra_body": {"reasoning": {"steps": 3}}},
        {
            "model": "m",
            "extra_headers": {"X-Reasoning-Mode": mode},
            "extra_body": {"reasoning": {"steps": 3}},
        },
    ]
    seen = []
    for way in ways:
        common: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 4, **way}
        if is_streamed:
            common["stream_options"] = {"include_usage": True}
            stream = await client.chat.completions.create(stream=True, **common)
            chunks = [chunk async for chunk in stream]
            content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            thought = "".join(
                (c.choices[0].delta.model_extra or {}).get("reasoning", "")
                for c in chunks
                if c.choices
            )
            usage, info = chunks[-1].usage, chunks[-1].model_extra
        else:
            answer = await client.chat.completions.create(**common)
            content = answer.choices[0].message.content or ""
            thought = (answer.choices[0].message.model_extra or {}).get("reasoning", "")
            usage, info = answer.usage, answer.model_extra
        assert usage is not None
        assert info is not None
        assert info["reasoning_info"]["mode"] == mode
        details = usage.completion_tokens_details
        assert details is not None
        seen.append((content, thought, details.reasoning_tokens, usage.completion_tokens))
    assert len(set(seen)) == 1
    content, thought, num_reasoning, num_completion = seen[0]
    assert content == "user"
    is_soft = mode in ("distribution", "auto")
    assert thought == ("use" if is_soft else ""), "latent steps have no text"
    thinks = mode in ("latent", "distribution", "auto")
    assert num_reasoning == (3 if thinks else 0)
    assert num_completion == 4 + (3 if thinks else 0)


async def test_thinking_text_comes_under_both_names(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="m",
        messages=MESSAGES,
        max_tokens=1,
        extra_body={"reasoning_mode": "distribution", "reasoning": {"steps": 2}},
    )
    extra = answer.choices[0].message.model_extra
    assert extra == {"reasoning": "us", "reasoning_content": "us"}
    hidden = await client.chat.completions.create(
        model="m",
        messages=MESSAGES,
        max_tokens=1,
        extra_body={"reasoning_mode": "distribution", "include_reasoning": False},
    )
    assert not hidden.choices[0].message.model_extra


async def test_stream_has_role_first_then_text_then_reason_then_usage(
    client: openai.AsyncOpenAI,
) -> None:
    stream = await client.chat.completions.create(
        model="m",
        messages=MESSAGES,
        max_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
        n=2,
    )
    chunks = [chunk async for chunk in stream]
    assert [c.choices[0].delta.role for c in chunks[:2]] == ["assistant", "assistant"]
    assert [c.choices[0].delta.content for c in chunks[:2]] == ["", ""]
    assert len({c.id for c in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 14
    for index in range(2):
        own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert "".join(c.delta.content or "" for c in own) == "user: h"
        assert [c.finish_reason for c in own if c.finish_reason] == ["length"]
        assert own[-1].finish_reason == "length"


async def test_stop_string_ends_text_and_names_itself(client: openai.AsyncOpenAI) -> None:
    for is_streamed in (False, True):
        common: dict[str, Any] = {
            "model": "m",
            "messages": MESSAGES,
            "max_tokens": 30,
            "stop": ["zzz", "é!"],
        }
        if is_streamed:
            stream = await client.chat.completions.create(stream=True, **common)
            chunks = [c.choices[0] async for c in stream]
            text = "".join(c.delta.content or "" for c in chunks)
            last: Any = chunks[-1]
        else:
            answer = await client.chat.completions.create(**common)
            last = answer.choices[0]
            text = last.message.content or ""
        assert text == "user: h"
        assert last.finish_reason == "stop"
        assert last.model_extra["stop_reason"] == "é!"


async def test_logprobs_token_ids_and_trace(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="m",
        messages=MESSAGES,
        max_tokens=3,
        logprobs=True,
        top_logprobs=1,
        extra_body={
            "return_token_ids": True,
            "reasoning_mode": "latent",
            "reasoning": {"steps": 2, "trace": "summary"},
        },
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert [item.token for item in content] == list("use")
    assert [item.bytes for item in content] == [[117], [115], [101]]
    assert len(content[0].top_logprobs) == 1
    extra = choice.model_extra
    assert extra is not None
    assert extra["token_ids"] == list(b"use")
    assert [(s["step"], s["kind"]) for s in extra["reasoning_trace"]] == [
        (0, "latent"),
        (1, "latent"),
    ]
    assert answer.model_extra is not None
    assert answer.model_extra["prompt_token_ids"] == list(RENDERED.encode())


async def test_text_parts_are_joined_and_developer_is_system(client: openai.AsyncOpenAI) -> None:
    parts: Any = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    answer = await client.chat.completions.create(model="m", messages=parts, max_tokens=17)
    assert answer.choices[0].message.content == "system: d\nuser: a"


async def test_ignored_fields_are_named_in_a_header(client: openai.AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model="m",
        messages=MESSAGES,
        max_tokens=1,
        user="u",
        metadata={"a": "b"},
        extra_body={"frobnicate": 3},
    )
    assert raw.headers["x-coconut-ignored-params"] == "frobnicate"
    assert raw.headers["x-reasoning-mode"] == "cot"


async def test_reasoning_object_reports_sources_and_warnings(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="m",
        messages=MESSAGES,
        max_tokens=1,
        extra_body={
            "reasoning_mode": "distribution",
            "reasoning": {"mixture": {"top_k": 4}, "explain": True},
        },
    )
    assert answer.usage is not None
    assert answer.usage.model_extra is not None
    reasoning = answer.usage.model_extra["reasoning"]
    assert reasoning["resolved"]["mixture.top_k"] == {"value": 4, "source": "request"}
    assert reasoning["halt_reason"] == "cap"
    assert reasoning["forward_passes"] == 17


async def test_settings_of_phase_and_answer_come_back(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {
        "mode": "distribution", "seed": 7, "max_total_steps": 9, "pad_positions": True,
        "explain": True,
        "after": {"temperature": 0.5, "top_k": -1},
        "halt": {"converge_metric": "kl", "converge_below": 0.1},
    }  # fmt: skip
    answer = await client.chat.completions.create(
        model="m", messages=MESSAGES, max_tokens=4, extra_body={"reasoning": asked}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9
    reasoning: Any = (answer.usage.model_extra or {})["reasoning"]
    assert all("no answer tokens" in warning for warning in reasoning["warnings"])
    flat = {**asked, "after.temperature": 0.5, "after.top_k": 0, "halt.converge_metric": "kl"}
    for name in ("seed", "max_total_steps", "pad_positions", *list(flat)[-3:]):
        expected = {"value": flat[name], "source": "request"}
        assert reasoning["resolved"][name] == expected


async def test_fixed_count_of_soft_steps_says_so(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {
        "mode": "distribution", "steps": 3, "explain": True,
        "halt": {"rule": "fixed", "entropy_below": 1},
    }  # fmt: skip
    for rule, reason in (("fixed", "fixed"), (["cold_stop"], "cap")):
        asked["halt"]["rule"] = rule
        answer = await client.chat.completions.create(
            model="m", messages=MESSAGES, max_tokens=4, extra_body={"reasoning": asked}
        )
        assert answer.usage is not None
        reasoning: Any = (answer.usage.model_extra or {})["reasoning"]
        assert (reasoning["reasoning_steps"], reasoning["halt_reason"]) == (3, reason)
        assert reasoning["resolved"]["halt.rule"] == {"value": rule, "source": "request"}


async def test_greedy_and_seeded_requests_repeat(client: openai.AsyncOpenAI) -> None:
    texts = set()
    for _ in range(2):
        answer = await client.chat.completions.create(
            model="m", messages=MESSAGES, max_tokens=9, seed=4, reasoning_effort="low"
        )
        texts.add(answer.choices[0].message.content)
    assert len(texts) == 1


async def test_bytes_of_split_characters_join_to_the_text(client: openai.AsyncOpenAI) -> None:
    """Parts of a character once all came back as U+FFFD."""
    messages: Any = [{"role": "user", "content": "\U0001f389"}]
    answer = await client.chat.completions.create(
        model="m", messages=messages, max_tokens=10, logprobs=True
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    joined = bytes(byte for item in logprobs.content for byte in item.bytes or [])
    assert joined.decode() == answer.choices[0].message.content == "user: \U0001f389"
    assert logprobs.content[6].token == "bytes:\\xf0"


async def test_request_id_of_the_body_is_the_ids_everywhere(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="m", messages=MESSAGES, max_tokens=1, extra_body={"request_id": "mine"}
    )
    assert (answer.id, answer._request_id) == ("chatcmpl-mine", "mine")

"""/v1/responses through the stock client: shapes, events, inputs, limits."""

import typing
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseOutputMessage, ResponseReasoningItem
from openai.types.responses import response_create_params as params

from coconut_serve.config import StubConfig
from coconut_serve.loading import stub_manifest
from coconut_serve.reasoning.registry import mode_names, properties_of
from coconut_serve.server import fields, schemas
from tests.fakes import listening, stub_app


def connect(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def reasoning_of(response: Response) -> ResponseReasoningItem:
    [item] = [each for each in response.output if each.type == "reasoning"]
    assert isinstance(item, ResponseReasoningItem)
    return item


def test_every_openai_field_is_sorted() -> None:
    names = {*typing.get_type_hints(params.ResponseCreateParamsStreaming)}
    own = {*schemas.ResponsesRequest.model_fields}
    others = schemas.OTHERS[schemas.ResponsesRequest]
    assert not names - own - fields.ACCEPTED - {*fields.REJECTED} - others


async def test_answer_has_openais_shape() -> None:
    async with listening(stub_app()) as url, connect(url) as client:
        response = await client.responses.create(
            model="m",
            input="hello",
            instructions="be brief",
            max_output_tokens=40,
            metadata={"a": "b"},
            reasoning={"mode": "latent"},
            extra_body={"reasoning": {"mode": "latent", "steps": 3}},
        )
    Response.model_validate(response.model_dump(), strict=False)
    assert (response.object, response.status, response.error) == ("response", "incomplete", None)
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.metadata == {"a": "b"}
    assert response.reasoning is not None
    assert response.reasoning.mode == "latent"
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output_text
    usage = response.usage
    assert usage is not None
    assert usage.output_tokens == 40, "thinking and answer together"
    assert usage.output_tokens_details.reasoning_tokens == 3
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert response.reasoning_info["mode"] == "latent"  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", mode_names())
async def test_events_build_up_what_a_whole_answer_is(mode: str) -> None:
    """The SDK's accumulator refuses events out of order."""
    own: dict[str, Any] = {"steps": 3} if mode != "none" else {}
    asked: dict[str, Any] = {
        "model": "m",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
        "max_output_tokens": 12,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
        "extra_body": {"reasoning": {"mode": mode, "trace": "summary", **own}},
    }
    app = stub_app(manifest=stub_manifest())
    async with listening(app) as url, connect(url) as client:
        whole = await client.responses.create(**asked)
        async with client.responses.stream(**asked) as stream:
            events = [event async for event in stream]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    ending = events[-1]
    assert ending.type == "response.incomplete"
    final = ending.response
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done")
    texts = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(texts) == final.output_text == whole.output_text != ""
    thoughts = "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
    if mode == "none":
        assert "reasoning" not in [item.type for item in whole.output]
        return
    streamed, item = reasoning_of(final), reasoning_of(whole)
    assert streamed.content == item.content
    assert thoughts == "".join(part.text for part in item.content or ())
    assert bool(thoughts) == properties_of(mode).has_text
    steps = item.reasoning_trace  # type: ignore[attr-defined]
    assert len(steps) == 3
    assert streamed.reasoning_trace == steps  # type: ignore[attr-defined]
    [message] = [each for each in whole.output if isinstance(each, ResponseOutputMessage)]
    part = message.content[0]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert len(part.logprobs) == len(part.text), "the stub's tokens are bytes"


async def test_earlier_turns_come_back_as_input() -> None:
    async with listening(stub_app()) as url, connect(url) as client:
        first = await client.responses.create(
            model="m", input="hello", max_output_tokens=8, reasoning={"mode": "cot"},
            extra_body={"reasoning": {"mode": "cot", "steps": 2}},
        )  # fmt: skip
        turns: Any = [{"role": "user", "content": "hello"}, *first.output]
        turns.append({"type": "message", "role": "developer", "content": "short"})
        second = await client.responses.create(
            model="m", input=turns, instructions="be brief", max_output_tokens=4, store=False,
            include=["reasoning.encrypted_content"], truncation="disabled", tools=[],
        )  # fmt: skip
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": 3}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"type": "function_call_output"}]}, "input.0.type"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "conversation": "c"}, "conversation"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "truncation": "auto"}, "truncation"),
        ({"input": "a", "include": ["everything"]}, "include"),
        ({"input": "a", "text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "a", "max_tokens": 3}, "max_tokens"),
        ({"input": "a", "messages": ["a"]}, "messages"),
        ({"input": "a", "n": 2}, "n"),
        ({"input": "a", "reasoning": {"mode": "telepathy"}}, "reasoning.mode"),
        ({"input": "a", "reasoning": {"branches": 2, "select": "all"}}, "reasoning.select"),
        ({"input": "a" * 2000}, "input"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    async with listening(stub_app()) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.post("/v1/responses", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


async def test_error_after_the_first_byte_fails_the_response() -> None:
    async with listening(stub_app(stub=StubConfig(fail_at_token=5))) as url, connect(url) as client:
        stream = await client.responses.create(
            model="m", input="hello", stream=True, reasoning={"mode": "none"}
        )
        events = [event async for event in stream]
        with pytest.raises(openai.InternalServerError):
            await client.responses.create(model="m", input="hello", reasoning={"mode": "none"})
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    failed = events[-1]
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"
    assert failed.response.error is not None
    assert failed.response.output_text, "what came before is not lost"


async def test_streams_have_named_events_and_no_end_mark() -> None:
    async with listening(stub_app()) as url, httpx.AsyncClient(base_url=url) as client:
        body = {"input": "hello", "max_output_tokens": 2, "stream": True}
        answer = await client.post("/v1/responses", json=body)
    frames = answer.text.strip().split("\n\n")
    assert all(frame.startswith("event: response.") for frame in frames)
    assert "[DONE]" not in answer.text


async def test_best_branch_is_the_answer() -> None:
    body = {
        "input": "hello", "max_output_tokens": 8, "temperature": 1,
        "reasoning": {"mode": "distribution", "steps": 2, "branches": 3,
                      "mixture": {"noise": "gumbel"}},
    }  # fmt: skip
    async with listening(stub_app()) as url, httpx.AsyncClient(base_url=url) as client:
        answer = (await client.post("/v1/responses", json=body)).json()
        page = (await client.get("/metrics")).text
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
    assert 'coconut_requests_total{endpoint="responses",' in page

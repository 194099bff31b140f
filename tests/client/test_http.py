"""Our clients against a server, and against a handler that notes what they send."""

import asyncio
import base64
import importlib
import json
import struct
from collections.abc import Callable
from typing import Any, get_args

import openai
import pytest
from openai.types import CompletionChoice
from pydantic import BaseModel

from coconut_serve.client import AsyncOpenAI, OpenAI, ReasoningMode, reasoning_info, reasoning_trace
from coconut_serve.params import ASKED

ASK: Any = {
    "model": "m",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 3,
    "temperature": 0,
}
ENDING: Any = {**ASK, "max_tokens": 30, "stop": ["e"]}  # parse and stream refuse what is cut off
TEXT: Any = {"model": "m", "prompt": "hello", "max_tokens": 3, "temperature": 0}


class Answer(BaseModel):
    """A structured answer."""

    value: int


@pytest.mark.parametrize("mode", get_args(ReasoningMode))
async def test_mode_of_a_chat_is_what_was_asked(client: AsyncOpenAI, mode: ReasoningMode) -> None:
    settings: Any = {} if mode == "none" else {"steps": 3}
    answer = await client.chat.completions.create(**ASK, reasoning_mode=mode, reasoning=settings)
    info = reasoning_info(answer)
    assert info is not None
    assert info.mode == mode
    assert info.reasoning_steps == (0 if mode == "none" else 3)
    assert info.latent_steps == (3 if mode == "latent" else 0)
    assert info.to_dict() == answer.model_extra["reasoning_info"]


async def test_sync_client_thinks_alike(url: str) -> None:
    def ask() -> tuple[Any, ...]:
        with OpenAI(base_url=url, api_key="-", max_retries=0) as client:
            chat = client.chat.completions.create(**ASK, reasoning_mode="latent")
            text = client.completions.create(**TEXT, reasoning={"mode": "latent", "steps": 2})
            parsed = client.chat.completions.parse(**ENDING, reasoning_mode="distribution")
            with client.chat.completions.stream(**ENDING, reasoning_mode="latent") as stream:
                streamed = stream.get_final_completion()
            parts = client.chat.completions.create(**ASK, reasoning_mode="cot", stream=True)
            return chat, text, parsed, streamed, list(parts)

    *answers, parts = await asyncio.to_thread(ask)
    infos = [reasoning_info(answer) for answer in answers]
    modes = [info and info.mode for info in infos]
    assert modes == ["latent", "latent", "distribution", None], (
        "a stream tells no usage unless asked"
    )
    assert infos[1] is not None
    assert infos[1].latent_steps == 2
    assert parts[-1].choices[0].finish_reason == "length"


async def test_last_chunk_of_a_stream_tells_how_it_thought(client: AsyncOpenAI) -> None:
    parts = await client.chat.completions.create(
        **ASK,
        stream=True,
        stream_options={"include_usage": True},
        reasoning_mode="latent",
        reasoning={"steps": 2, "trace": "summary"},
    )
    infos, steps = [], []
    async for part in parts:
        infos.append(reasoning_info(part))
        steps += [step for choice in part.choices for step in reasoning_trace(choice)]
    assert infos[-1] is not None
    assert infos[-1].latent_steps == 2
    assert infos[:-1] == [None] * (len(infos) - 1)
    assert [(step.step, step.kind) for step in steps] == [(0, "latent"), (1, "latent")]


async def test_stream_helper_collects_the_same(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(
        **ENDING, stream_options={"include_usage": True}, reasoning_mode="latent"
    ) as stream:
        answer = await stream.get_final_completion()
    parsed = await client.beta.chat.completions.parse(**ENDING, reasoning_mode="latent")
    for each in (answer, parsed):
        info = reasoning_info(each)
        assert info is not None
        assert info.mode == "latent"


def test_vectors_of_a_trace_are_numbers() -> None:
    vector = base64.b64encode(struct.pack("<2f", 0.5, -2.0)).decode()
    told = {"step": 0, "kind": "latent", "token_id": None, "entropy": 0.1, "max_prob": 0.9}
    told |= {"norm": 1.0, "cosine": 0.2, "retained_mass": 1.0, "vector": vector}
    told["top"] = [{"token_id": 7, "token": "a", "prob": 0.9}]
    choice = CompletionChoice.construct(reasoning_trace=[told])
    [step] = reasoning_trace(choice)
    assert step.floats == (0.5, -2.0)
    assert step.top is not None
    assert (step.entropy, step.top[0].token) == (0.1, "a")
    assert step.to_dict() == told, "which reasoning.replay takes"


def test_answers_without_news_tell_nothing() -> None:
    choice = CompletionChoice.construct()
    assert (reasoning_info(choice), reasoning_trace(choice)) == (None, [])


async def test_every_setting_reaches_the_server(client: AsyncOpenAI) -> None:
    """A value of a wrong type does: the error names the setting."""
    for name in ASKED:
        part, _, own = name.rpartition(".")
        wrong: Any = {"wrong": [[]]}
        settings: Any = {part: {own: wrong}} if part else {own: wrong}
        with pytest.raises(openai.BadRequestError) as error:
            await client.chat.completions.create(**ASK, reasoning=settings)
        assert str(error.value.param).startswith(f"reasoning.{name}")


async def test_errors_are_those_of_openai(client: AsyncOpenAI) -> None:
    wrong: Any = "latnt"
    with pytest.raises(openai.BadRequestError, match="did you mean 'latent'") as error:
        await client.chat.completions.create(**ASK, reasoning_mode=wrong)
    assert error.value.code == "invalid_reasoning_mode"
    with pytest.raises(openai.BadRequestError, match=r"reasoning\.steps"):
        await client.completions.create(**TEXT, reasoning={"steps": -1})
    create: Any = client.chat.completions.create
    with pytest.raises(TypeError, match="unexpected keyword argument 'reasoning_mod'"):
        await create(**ASK, reasoning_mod="latent")
    with pytest.raises(TypeError, match="Missing required arguments"):
        await create(model="m", reasoning_mode="latent")


async def test_raw_and_streaming_responses_think_too(client: AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(**ASK, reasoning_mode="latent")
    assert raw.headers["x-reasoning-mode"] == "latent"
    assert raw.parse().usage.reasoning["mode"] == "latent"
    whole: Any = client.with_raw_response
    raw = await whole.completions.create(**TEXT, reasoning_mode="latent")
    assert raw.headers["x-reasoning-mode"] == "latent"
    streaming = client.chat.completions.with_streaming_response
    async with streaming.create(**ASK, reasoning_mode="latent") as response:
        assert response.headers["x-reasoning-mode"] == "latent"


async def test_client_of_a_mode_thinks_in_it_unless_told(client: AsyncOpenAI) -> None:
    latent = client.with_reasoning_mode("latent", steps=2, trace="summary")

    async def told(own: AsyncOpenAI, **fields: Any) -> tuple[str, int, int]:
        answer = await own.chat.completions.create(**ASK, **fields)
        info = reasoning_info(answer)
        assert info is not None
        return info.mode, info.reasoning_steps, len(reasoning_trace(answer.choices[0]))

    assert await told(latent) == ("latent", 2, 2)
    assert await told(latent.with_options(timeout=30)) == ("latent", 2, 2)
    assert await told(latent.copy(), reasoning={"steps": 1}) == ("latent", 1, 1)
    assert await told(latent, extra_body={"reasoning": {"steps": 3}}) == ("latent", 3, 3)
    assert await told(latent, reasoning_mode="none") == ("none", 0, 0)
    assert await told(latent, reasoning={"mode": "distribution", "steps": 1}) == (
        "distribution",
        1,
        0,
    )
    assert await told(latent.with_reasoning_mode("auto", steps=4)) == ("auto", 4, 0)
    assert (await told(client))[2] == 0, "the first client is as it was"
    raw = await latent.completions.with_raw_response.create(**TEXT)
    assert raw.headers["x-reasoning-mode"] == "latent"
    old = await latent.beta.chat.completions.create(**ASK)
    assert reasoning_trace(old.choices[0])[1].kind == "latent"


RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "m",
    "status": "completed",
    "output": [
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": '{"value": 7}', "annotations": []}],
        }
    ],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "usage": {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2},
}


def noting(bodies: list[Any], **options: Any) -> OpenAI:
    """A client of a handler that notes bodies and answers as /v1/responses does."""
    web: Any = importlib.import_module("httpx2" if openai.__version__ >= "3" else "httpx")

    def answer(request: Any) -> Any:
        bodies.append(json.loads(request.content))
        if not bodies[-1].get("stream"):
            return web.Response(200, json=RESPONSE)
        ends: list[Any] = [
            {"type": "response.created", "response": {**RESPONSE, "output": []}},
            {"type": "response.completed", "response": RESPONSE},
        ]
        lines = [
            f"event: {each['type']}\ndata: {json.dumps({**each, 'sequence_number': i})}\n\n"
            for i, each in enumerate(ends)
        ]
        headers = {"content-type": "text/event-stream"}
        return web.Response(200, content="".join(lines).encode(), headers=headers)

    http = web.Client(transport=web.MockTransport(answer))
    return OpenAI(base_url="http://none/v1", api_key="-", http_client=http, **options)


def test_responses_have_mode_and_settings_in_reasoning() -> None:
    bodies: list[Any] = []
    with noting(bodies) as client:
        ask: Any = {"model": "m", "input": "hello"}
        client.responses.create(**ask, reasoning={"mode": "latent", "effort": "low", "steps": 2})
        client.responses.create(**ask, reasoning_mode="latent", reasoning={"steps": 2})
        latent = client.with_reasoning_mode("latent", steps=4)
        parsed = latent.responses.parse(**ask, text_format=Answer, reasoning={"steps": 5})
        with latent.responses.stream(**ask, reasoning={"summary": "auto"}) as stream:
            kinds = [event.type for event in stream]
        latent.responses.create(**ask, reasoning={"mode": "cot"})
        getattr(latent.beta, "responses", latent.responses).create(**ask)  # openai 1 has it not
        client.responses.create(**ask)
        with pytest.raises(TypeError, match=r"reasoning\.mode is given twice"):
            client.responses.create(**ask, reasoning_mode="cot", reasoning={"mode": "latent"})
    assert [body.get("reasoning") for body in bodies] == [
        {"mode": "latent", "effort": "low", "steps": 2},
        {"mode": "latent", "steps": 2},
        {"mode": "latent", "steps": 5},
        {"mode": "latent", "steps": 4, "summary": "auto"},
        {"mode": "cot"},
        {"mode": "latent", "steps": 4},
        None,
    ]
    assert all("reasoning_mode" not in body for body in bodies)
    assert parsed.output_parsed == Answer(value=7)
    assert kinds[-1] == "response.completed"


def test_extra_body_is_merged_deeply_and_wins_nothing_silently() -> None:
    bodies: list[Any] = []
    with noting(bodies) as client:
        create: Callable[..., Any] = client.completions.create
        ask = {"model": "m", "prompt": "hello"}
        own = {"top_k": 4, "reasoning": {"halt": {"stop_prob": 0.5}, "steps": 2}}
        asked = {"steps": 2, "halt": {"rule": "fixed"}}
        create(**ask, reasoning_mode="latent", reasoning=asked, extra_body=own)
        create(**ask, reasoning_mode=None, reasoning=openai.NOT_GIVEN)
        for fields, name in (
            ({"reasoning": {"halt": {"stop_prob": 0.1}}}, r"reasoning\.halt\.stop_prob"),
            ({"reasoning_mode": "latent"}, "reasoning_mode"),
        ):
            body = {"reasoning_mode": "cot", **own}
            with pytest.raises(TypeError, match=f"^{name} is given twice"):
                create(**ask, **fields, extra_body=body)
    assert own == {"top_k": 4, "reasoning": {"halt": {"stop_prob": 0.5}, "steps": 2}}, "untouched"
    merged = {"steps": 2, "halt": {"rule": "fixed", "stop_prob": 0.5}}
    assert bodies == [{**ask, "top_k": 4, "reasoning_mode": "latent", "reasoning": merged}, ask]


async def test_responses_of_the_server_tell_how_they_were_thought(client: AsyncOpenAI) -> None:
    own = client.with_reasoning_mode("latent", steps=3, trace="summary")
    response = await own.responses.create(model="m", input="hello", max_output_tokens=9)
    info = reasoning_info(response)
    assert info is not None
    assert (info.mode, info.latent_steps) == ("latent", 3)
    assert [step.kind for step in reasoning_trace(response)] == ["latent"] * 3
    async with client.responses.stream(
        model="m", input="hello", reasoning={"mode": "none"}, max_output_tokens=4
    ) as stream:
        events = [event async for event in stream]
    assert events[-1].type == "response.incomplete"
    assert reasoning_info(events[-1].response) is not None

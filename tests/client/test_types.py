"""mypy reads this: calls have OpenAI's types, and ours are checked."""

from typing import Any, assert_type

from openai import AsyncStream, Stream
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ParsedChatCompletion
from openai.types.responses import ParsedResponse, Response
from pydantic import BaseModel

from coconut_serve.client import (
    AsyncOpenAI,
    OpenAI,
    ReasoningInfo,
    TraceStep,
    reasoning_info,
    reasoning_trace,
)


class Answer(BaseModel):
    """A structured answer."""

    value: int


def calls(client: OpenAI) -> None:
    chat, text = client.chat.completions, client.completions
    halt: Any = {"rule": "fixed"}
    answer = chat.create(
        model="m",
        messages=[{"role": "user", "content": "hello"}],
        reasoning_mode="latent",
        reasoning={"steps": 2, "halt": halt, "mixture": {"kind": "moi"}},
    )
    assert_type(answer, ChatCompletion)
    assert_type(reasoning_info(answer), ReasoningInfo | None)
    assert_type(reasoning_trace(answer.choices[0]), list[TraceStep])
    assert_type(chat.create(model="m", messages=[], stream=True), Stream[ChatCompletionChunk])
    parsed = chat.parse(model="m", messages=[], response_format=Answer, reasoning_mode="cot")
    assert_type(parsed, ParsedChatCompletion[Answer])
    is_stream = bool(halt)
    either = text.create(model="m", prompt="hello", stream=is_stream, reasoning_mode="cot")
    assert_type(either, Completion | Stream[Completion])
    text.create(model="m", prompt="", reasoning_mode="latnt")  # type: ignore[call-overload]  # no mode
    text.create(model="m", prompt="", reasoning={"step": 2})  # type: ignore[call-overload]  # no setting
    text.create(model="m", prompt="", reasoning_mod="cot")  # type: ignore[call-overload]  # no field
    response = client.responses.create(model="m", input="", reasoning={"mode": "cot", "steps": 2})
    assert_type(response, Response)
    structured = client.responses.parse(model="m", input="", text_format=Answer)
    assert_type(structured, ParsedResponse[Answer])
    assert_type(client.with_options(timeout=1), OpenAI)
    assert_type(client.with_reasoning_mode("latent", steps=2, halt={"sample": True}), OpenAI)
    client.with_reasoning_mode("latent", step=2)  # type: ignore[call-arg]  # no setting


async def async_calls(client: AsyncOpenAI) -> None:
    chat = client.with_reasoning_mode("latent").chat.completions
    assert_type(await chat.create(model="m", messages=[]), ChatCompletion)
    parts = await chat.create(model="m", messages=[], stream=True, reasoning_mode="cot")
    assert_type(parts, AsyncStream[ChatCompletionChunk])
    async with chat.stream(model="m", messages=[], reasoning_mode="cot") as stream:
        assert_type(await stream.get_final_completion(), ParsedChatCompletion[None])

"""What type checkers see of the clients: OpenAI's, whose calls take two fields more."""

# What calls take is OpenAI's TypedDicts, which leave out NOT_GIVEN.
# mypy: disable-error-code="assignment, override, misc"

from collections.abc import Coroutine, Mapping
from typing import Any, Generic, Protocol, TypedDict, Unpack, overload

import openai
from openai import AsyncStream, Omit, Stream, Timeout, resources
from openai.lib.streaming.chat import AsyncChatCompletionStreamManager, ChatCompletionStreamManager
from openai.lib.streaming.responses import AsyncResponseStreamManager, ResponseStreamManager
from openai.types import Completion
from openai.types import completion_create_params as texts
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ParsedChatCompletion
from openai.types.chat import completion_create_params as chats
from openai.types.responses import ParsedResponse, Response, ResponseStreamEvent
from openai.types.responses import response_create_params as responses
from openai.types.shared_params import Reasoning as OpenAIReasoning
from typing_extensions import TypeVar

from coconut_serve.client.settings import Reasoning, ReasoningMode

Whole = TypeVar("Whole", covariant=True)
Parts = TypeVar("Parts", covariant=True)
Result = TypeVar("Result")
F = TypeVar("F", default=None)
Async = Coroutine[Any, Any, Result]

class _Call(TypedDict, total=False):
    reasoning_mode: ReasoningMode | None
    reasoning: Reasoning | None
    extra_headers: Mapping[str, str | Omit] | None
    extra_query: Mapping[str, object] | None
    extra_body: object
    timeout: float | Timeout | None

class _Chat(chats.CompletionCreateParamsNonStreaming, _Call): ...
class _ChatParts(chats.CompletionCreateParamsStreaming, _Call): ...
class _ChatEither(chats.CompletionCreateParamsBase, _Call): ...

class _ChatParsed(_ChatEither, Generic[F], total=False):
    response_format: type[F]

class _Text(texts.CompletionCreateParamsNonStreaming, _Call): ...
class _TextParts(texts.CompletionCreateParamsStreaming, _Call): ...
class _TextEither(texts.CompletionCreateParamsBase, _Call): ...

class _ResponseCall(_Call, total=False):
    reasoning: Reasoning | OpenAIReasoning | None

class _Response(_ResponseCall, responses.ResponseCreateParamsNonStreaming): ...
class _ResponseParts(_ResponseCall, responses.ResponseCreateParamsStreaming): ...
class _ResponseEither(_ResponseCall, responses.ResponseCreateParamsBase): ...

class _ResponseParsed(_ResponseEither, Generic[F], total=False):
    text_format: type[F]

class _CreateChat(Protocol[Whole, Parts]):
    @overload
    def __call__(self, **options: Unpack[_Chat]) -> Whole: ...
    @overload
    def __call__(self, **options: Unpack[_ChatParts]) -> Parts: ...
    @overload
    def __call__(self, *, stream: bool, **options: Unpack[_ChatEither]) -> Whole | Parts: ...

class _CreateText(Protocol[Whole, Parts]):
    @overload
    def __call__(self, **options: Unpack[_Text]) -> Whole: ...
    @overload
    def __call__(self, **options: Unpack[_TextParts]) -> Parts: ...
    @overload
    def __call__(self, *, stream: bool, **options: Unpack[_TextEither]) -> Whole | Parts: ...

class _CreateResponse(Protocol[Whole, Parts]):
    @overload
    def __call__(self, **options: Unpack[_Response]) -> Whole: ...
    @overload
    def __call__(self, **options: Unpack[_ResponseParts]) -> Parts: ...
    @overload
    def __call__(self, *, stream: bool, **options: Unpack[_ResponseEither]) -> Whole | Parts: ...

class _Raw:
    with_raw_response: Any
    with_streaming_response: Any

class ChatCompletions(_Raw, resources.chat.Completions):
    create: _CreateChat[ChatCompletion, Stream[ChatCompletionChunk]]
    def stream(self, **options: Unpack[_ChatParsed[F]]) -> ChatCompletionStreamManager[F]: ...
    def parse(self, **options: Unpack[_ChatParsed[F]]) -> ParsedChatCompletion[F]: ...

class AsyncChatCompletions(_Raw, resources.chat.AsyncCompletions):
    create: _CreateChat[Async[ChatCompletion], Async[AsyncStream[ChatCompletionChunk]]]
    def stream(self, **options: Unpack[_ChatParsed[F]]) -> AsyncChatCompletionStreamManager[F]: ...
    async def parse(self, **options: Unpack[_ChatParsed[F]]) -> ParsedChatCompletion[F]: ...

class Completions(_Raw, resources.Completions):
    create: _CreateText[Completion, Stream[Completion]]

class AsyncCompletions(_Raw, resources.AsyncCompletions):
    create: _CreateText[Async[Completion], Async[AsyncStream[Completion]]]

class Responses(_Raw, resources.responses.Responses):
    create: _CreateResponse[Response, Stream[ResponseStreamEvent]]
    def stream(self, **options: Unpack[_ResponseParsed[F]]) -> ResponseStreamManager[F]: ...
    def parse(self, **options: Unpack[_ResponseParsed[F]]) -> ParsedResponse[F]: ...

class AsyncResponses(_Raw, resources.responses.AsyncResponses):
    create: _CreateResponse[Async[Response], Async[AsyncStream[ResponseStreamEvent]]]
    def stream(self, **options: Unpack[_ResponseParsed[F]]) -> AsyncResponseStreamManager[F]: ...
    async def parse(self, **options: Unpack[_ResponseParsed[F]]) -> ParsedResponse[F]: ...

class Chat(resources.Chat):
    completions: ChatCompletions

class AsyncChat(resources.AsyncChat):
    completions: AsyncChatCompletions

class Beta(resources.Beta):
    chat: Chat

class AsyncBeta(resources.AsyncBeta):
    chat: AsyncChat

class OpenAI(openai.OpenAI):
    chat: Chat
    completions: Completions
    responses: Responses
    beta: Beta

class AsyncOpenAI(openai.AsyncOpenAI):
    chat: AsyncChat
    completions: AsyncCompletions
    responses: AsyncResponses
    beta: AsyncBeta

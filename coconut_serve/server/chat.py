"""POST /v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from starlette.requests import Request
from starlette.responses import Response

from coconut_serve.errors import InvalidRequestError
from coconut_serve.server.answer import read_ask, respond
from coconut_serve.server.openapi import GENERATION_ERRORS, answers, takes_generation
from coconut_serve.server.parse import read_body
from coconut_serve.server.render import ChunkRenderer
from coconut_serve.server.schemas import ChatRequest, check_text_format
from coconut_serve.server.state import get_service
from coconut_serve.server.usage import chat_logprob
from coconut_serve.service.generation import Delta

router = APIRouter()

_ROLES = ("developer", "system", "user", "assistant", "tool")


@router.post(
    "/v1/chat/completions",
    openapi_extra=takes_generation(ChatRequest),
    responses=answers(ChatCompletion, *GENERATION_ERRORS, events=ChatCompletionChunk),
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a chat, whole or streamed."""
    service = get_service(request)
    body, ignored = await read_body(request, ChatRequest, service.config)
    own = chat_fields(body)
    request_id = f"chatcmpl-{body.request_id or request.state.request_id}"
    ask = read_ask(request, body, service, request_id=request_id, **own)
    generation = await service.generate(ask)
    return await respond(request, _ChatRenderer(service, generation, body), ignored)


def chat_fields(body: ChatRequest) -> dict[str, Any]:
    """What `generate_call` takes of this endpoint alone.

    Raises:
        InvalidRequestError: A message or a combination of fields is wrong.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    check_text_format(body.response_format, "response_format")
    max_tokens = ("max_tokens", body.max_tokens)
    if body.max_completion_tokens is not None:
        max_tokens = ("max_completion_tokens", body.max_completion_tokens)
    return {
        "endpoint": "chat",
        "messages": [clean_message(m, i) for i, m in enumerate(body.messages)],
        "chat_template_options": body.template_options(),
        "n": body.n or 1,
        "max_tokens": max_tokens,
        "num_logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }


def clean_message(message: dict[str, Any], index: int) -> dict[str, Any]:
    """Check a message and join its text parts.

    Raises:
        InvalidRequestError: The role is unknown or the content is not text.
    """
    where = f"messages.{index}"
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        roles = ", ".join(_ROLES)
        raise InvalidRequestError(f"{where}.role must be one of {roles}", param=f"{where}.role")
    if isinstance(content, list):
        is_text = all(isinstance(p, dict) and p.get("type") == "text" for p in content)
        texts = [p.get("text") for p in content] if is_text else [None]
        content = "".join(map(str, texts)) if all(isinstance(t, str) for t in texts) else None
    elif content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise InvalidRequestError(
            f"{where}.content must be a string or text parts", param=f"{where}.content"
        )
    return {**message, "role": "system" if role == "developer" else role, "content": content}


class _ChatRenderer(ChunkRenderer[ChunkChoice]):
    """chat.completion and chat.completion.chunk objects."""

    def opening_parts(self) -> list[ChunkChoice]:
        opening = ChoiceDelta(role="assistant", content="")
        choices = []
        for index in range(len(self.generation.choices)):
            choice = ChunkChoice(index=index, delta=opening, finish_reason=None)
            if self.body.return_token_ids:
                choice.prompt_token_ids = self.prompt_ids(index)  # type: ignore[attr-defined]  # extra field
            choices.append(choice)
        return choices

    def part(self, delta: Delta, extra: dict[str, Any]) -> ChunkChoice:
        text = self.thinking(delta.reasoning)
        if delta.content:
            text["content"] = delta.content
        added: Any = ChoiceDelta(**text)  # type: ignore[arg-type]  # extra fields
        return ChunkChoice(index=delta.index, delta=added, finish_reason=_reason(delta), **extra)

    def chunk(self, parts: list[ChunkChoice], extra: dict[str, Any]) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            object="chat.completion.chunk", choices=parts, **self.common(), **extra
        )

    def whole(self, choices: Sequence[Delta]) -> str:
        ids: dict[str, Any] = {}
        if self.body.return_token_ids:
            ids["prompt_token_ids"] = self.prompt_ids(0)
        answer = ChatCompletion(
            object="chat.completion",
            choices=[self._choice(each) for each in choices],
            **self.common(),
            **self.cost(),
            **ids,
        )
        return answer.model_dump_json(exclude_unset=True)

    def _choice(self, choice: Delta) -> Choice:
        text: Any = self.thinking(choice.reasoning)
        message = ChatCompletionMessage(role="assistant", content=choice.content, **text)
        extra = self.whole_extra(choice)
        return Choice(index=choice.index, message=message, finish_reason=_reason(choice), **extra)

    def logprobs(self, delta: Delta) -> dict[str, Any]:
        tokenizer = self.service.tokenizer
        items = [chat_logprob(token, tokenizer) for token in delta.tokens]
        return {"content": items, "refusal": None}


def _reason(delta: Delta) -> Any:
    return delta.finish_reason.value if delta.finish_reason else None

"""POST /v1/responses: stateless, whole or as OpenAI's typed events."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from coconut_serve.errors import CoconutError, InvalidRequestError
from coconut_serve.server.answer import read_ask, respond
from coconut_serve.server.openapi import (
    GENERATION_ERRORS,
    ResponseEvent,
    ResponseObject,
    answers,
    takes_generation,
)
from coconut_serve.server.parse import read_body
from coconut_serve.server.render import Renderer
from coconut_serve.server.schemas import ResponsesRequest, check_text_format
from coconut_serve.server.sse import Event
from coconut_serve.server.state import get_service
from coconut_serve.server.usage import chat_logprob, usage
from coconut_serve.service.generation import Delta, Generation
from coconut_serve.service.service import Service
from coconut_serve.types import FinishReason

router = APIRouter()

_ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = frozenset({  # others are of tools and inputs that this server does not have
    _LOGPROBS, "reasoning.encrypted_content", "code_interpreter_call.outputs",
    "computer_call_output.output.image_url", "file_search_call.results",
    "message.input_image.image_url", "web_search_call.action.sources", "web_search_call.results",
})  # fmt: skip


@router.post(
    "/v1/responses",
    openapi_extra=takes_generation(ResponsesRequest),
    responses=answers(ResponseObject, *GENERATION_ERRORS, events=ResponseEvent),
)
async def create_response(request: Request) -> Response:
    """Answer an input, whole or streamed. Nothing is stored."""
    service = get_service(request)
    body, ignored = await read_body(request, ResponsesRequest, service.config)
    _check(body)
    has_logprobs = body.top_logprobs is not None or _LOGPROBS in (body.include or ())
    ask = read_ask(
        request,
        body,
        service,
        request_id=f"resp_{body.request_id or request.state.request_id}",
        endpoint="responses",
        messages=read_messages(body),
        max_tokens=("max_output_tokens", body.max_output_tokens),
        max_positions=body.max_output_tokens,
        num_logprobs=(body.top_logprobs or 0) if has_logprobs else None,
    )
    if ask.reasoning.get("select") == "all":
        what = "reasoning.select must not be 'all' here: a response has one answer"
        raise InvalidRequestError(what, param="reasoning.select")
    generation = await service.generate(ask)
    return await respond(request, ResponseRenderer(service, generation, body), ignored)


def _check(body: ResponsesRequest) -> None:
    """Refuse what this server cannot do."""
    check_text_format(body.text.format if body.text else None, "text.format")
    if body.truncation not in (None, "disabled"):
        raise InvalidRequestError(
            "truncation must be 'disabled': no part of the input is left out", param="truncation"
        )
    for name in body.include or ():
        if name not in _INCLUDABLE:
            known = ", ".join(sorted(_INCLUDABLE))
            raise InvalidRequestError(f"include: {name!r} is not one of {known}", param="include")


def read_messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The input as messages; reasoning items of earlier turns are left out, as by OpenAI.

    Raises:
        InvalidRequestError: An item is of another kind, or there is no message.
    """
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    num_read = 0
    for index, item in enumerate(items):
        where, kind = f"input.{index}", item.get("type", "message")
        if kind == "reasoning":
            continue
        if kind != "message":
            hint = "; nothing is stored: send the item" if kind == "item_reference" else ""
            raise InvalidRequestError(
                f"{where}.type {kind!r} is not supported: send messages{hint}",
                param=f"{where}.type",
                code="unsupported_parameter",
            )
        message = _read_message(item, where)
        if message["role"] == "system" and [each["role"] for each in messages] == ["system"]:
            # One system message, since many templates take no more.
            message["content"] = f"{messages.pop()['content']}\n\n{message['content']}"
        messages.append(message)
        num_read += 1
    if num_read == 0:
        raise InvalidRequestError("input must hold a message", param="input")
    return messages


def _read_message(item: dict[str, Any], where: str) -> dict[str, Any]:
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        what = f"{where}.role must be one of {', '.join(_ROLES)}"
        raise InvalidRequestError(what, param=f"{where}.role")
    if isinstance(content, list):
        content = "".join(
            _read_part(part, f"{where}.content.{number}") for number, part in enumerate(content)
        )
    if not isinstance(content, str):
        what = f"{where}.content must be a string or text parts"
        raise InvalidRequestError(what, param=f"{where}.content")
    return {"role": "system" if role == "developer" else role, "content": content}


def _read_part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(_TEXT_PARTS[kind]) if kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        what = f"{where} must be a text part: input_text or output_text"
        raise InvalidRequestError(what, param=where)
    return text


class ResponseRenderer(Renderer):
    """A response object, and the events that build it up item by item."""

    has_end_mark: ClassVar[bool] = False
    body: ResponsesRequest

    def __init__(self, service: Service, generation: Generation, body: ResponsesRequest) -> None:
        super().__init__(service, generation, body)
        self._num_events = 0
        self._output: list[dict[str, Any]] = []  # items, the last of which may be open
        self._is_open = False
        self._ending = Delta(index=0)

    def whole(self, choices: Sequence[Delta]) -> str:
        [choice] = choices
        self._ending, extra = choice, self.extra(choice)
        if self._thinks or choice.reasoning or choice.trace:
            item = self._item("reasoning")
            self._add_thoughts(item, choice, extra)
        if choice.content or not self._output:
            item = self._item("message")
            item["content"].append(_text_part(choice.content, extra.get("logprobs", [])))
        for item in self._output:
            item["status"] = self._status
        return json.dumps(self._response(self._status))

    def opening(self) -> Iterator[Event]:
        response = self._response("in_progress")
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        if self._thinks:
            yield from self._open("reasoning")

    def events(self, delta: Delta) -> Iterator[Event]:
        extra, text = self.extra(delta), self._thought(delta)
        if text or delta.trace:
            yield from self._open("reasoning")
            yield from self._think(text, delta, extra)
        if delta.content:
            yield from self._open("message")
            logprobs = extra.get("logprobs", [])
            part = self._output[-1]["content"][0]
            part["text"] += delta.content
            part["logprobs"] += logprobs
            yield self._part_event("response.output_text.delta", delta=delta.content,
                                   logprobs=logprobs)  # fmt: skip
        if delta.finish_reason is not None:
            self._ending = delta

    def closing(self) -> Iterator[Event]:
        if not self._output:
            yield from self._open("message")
        yield from self._close(self._status)
        yield self._event(f"response.{self._status}", response=self._response(self._status))

    def failure(self, error: CoconutError) -> Iterator[Event]:
        told = {"code": error.code, "message": error.message}
        yield self._event("error", **told, param=error.param)
        response = self._response("failed") | {"error": {**told, "code": "server_error"}}
        yield self._event("response.failed", response=response)

    def logprobs(self, delta: Delta) -> Any:
        tokenizer = self.service.tokenizer
        return [chat_logprob(token, tokenizer).model_dump() for token in delta.tokens]

    @property
    def _thinks(self) -> bool:
        """Whether the answer begins with a reasoning item."""
        params = self.generation.prepared.resolved.params
        return params.steps > 0 and params.enter_token_id is None

    @property
    def _status(self) -> str:
        is_cut = self._ending.finish_reason is FinishReason.LENGTH
        return "incomplete" if is_cut else "completed"

    def _thought(self, delta: Delta) -> str:
        return delta.reasoning if self.body.include_reasoning else ""

    def _item(self, kind: str) -> dict[str, Any]:
        """Begin an item of the output."""
        number = len(self._output)
        own: dict[str, Any] = {"type": kind, "status": "in_progress", "content": []}
        own["summary" if kind == "reasoning" else "role"] = (
            [] if kind == "reasoning" else "assistant"
        )
        prefix = {"reasoning": "rs", "message": "msg"}[kind]
        request_id = self.generation.prepared.ask.request_id.removeprefix("resp_")
        self._output.append({"id": f"{prefix}_{request_id}_{number}", **own})
        return self._output[-1]

    def _add_thoughts(self, item: dict[str, Any], delta: Delta, extra: dict[str, Any]) -> None:
        """Add text and traced steps to a reasoning item."""
        text = self._thought(delta)
        if text and not item["content"]:
            item["content"].append({"type": "reasoning_text", "text": ""})
        if text:
            item["content"][0]["text"] += text
        if delta.trace:
            item.setdefault("reasoning_trace", []).extend(extra["reasoning_trace"])

    def _think(self, text: str, delta: Delta, extra: dict[str, Any]) -> Iterator[Event]:
        item = self._output[-1]
        is_first = bool(text) and not item["content"]
        self._add_thoughts(item, delta, extra)
        if is_first:
            empty = {"type": "reasoning_text", "text": ""}
            yield self._part_event("response.content_part.added", part=empty)
        if text:
            yield self._part_event("response.reasoning_text.delta", delta=text)

    def _open(self, kind: str) -> Iterator[Event]:
        """Make an item of this kind the last one."""
        if self._is_open and self._output[-1]["type"] == kind:
            return
        yield from self._close("completed")
        item = self._item(kind)
        self._is_open = True
        yield self._event("response.output_item.added", output_index=len(self._output) - 1,
                          item=_copy(item))  # fmt: skip
        if kind == "message":
            item["content"].append(_text_part("", []))
            yield self._part_event("response.content_part.added", part=_text_part("", []))

    def _close(self, status: str) -> Iterator[Event]:
        """End the last item."""
        if not self._is_open:
            return
        item = self._output[-1]
        item["status"], self._is_open = status, False
        for part in item["content"]:
            done = "output_text" if item["type"] == "message" else "reasoning_text"
            logprobs = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._part_event(f"response.{done}.done", text=part["text"], **logprobs)
            yield self._part_event("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1,
                          item=item)  # fmt: skip

    def _part_event(self, kind: str, **fields: Any) -> Event:
        """An event about the one part of the last item."""
        at = {"output_index": len(self._output) - 1, "content_index": 0}
        return self._event(kind, item_id=self._output[-1]["id"], **at, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._num_events = self._num_events, self._num_events + 1
        return Event(json.dumps({"type": kind, "sequence_number": number, **fields}), name=kind)

    def _response(self, status: str) -> dict[str, Any]:
        """The response object, as it is now."""
        prepared, body = self.generation.prepared, self.body
        sampling, common = prepared.requests[0].sampling, self.common()
        has_ended = status in ("completed", "incomplete")
        reasoning = {"mode": prepared.mode, "effort": prepared.ask.effort, "summary": None}
        response = {
            "id": common["id"],
            "object": "response",
            "created_at": common["created"],
            "model": common["model"],
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": (body.model_extra or {}).get("metadata") or {},
            "output": self._output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": reasoning,
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": self._usage() if has_ended else None,
            "system_fingerprint": common["system_fingerprint"],
        }
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if has_ended:
            response["reasoning_info"] = response["usage"]["reasoning"]
        return response

    def _usage(self) -> dict[str, Any]:
        """The same figures as the other endpoints tell, by this one's names."""
        told = usage(self.generation).model_dump(exclude_none=True)
        details = told["prompt_tokens_details"]
        return {
            "input_tokens": told["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": details["cached_tokens"], "cache_write_tokens": 0,
            },
            "output_tokens": told["completion_tokens"],
            "output_tokens_details": told["completion_tokens_details"],
            "total_tokens": told["total_tokens"],
            "reasoning": told["reasoning"],
        }  # fmt: skip


def _text_part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "content": list(item["content"])}

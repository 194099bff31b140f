"""What both generation endpoints share: run a generation, answer whole or as a stream."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from coconut_serve.errors import InvalidRequestError
from coconut_serve.server import usage as costs
from coconut_serve.server.errors import count_error
from coconut_serve.server.parse import read_reasoning, sampling_ask
from coconut_serve.server.schemas import GenerationBody, check_text_format
from coconut_serve.server.sse import EventStream
from coconut_serve.server.state import Service, ignored_header
from coconut_serve.service.ask import GenerationAsk
from coconut_serve.service.branches import Branch, choose
from coconut_serve.service.generation import Delta, Generation

T = TypeVar("T")
Reply = Completion | ChatCompletion | ChatCompletionChunk


class Answer(ABC):
    """Builds the response objects of one call.

    A whole choice and a chunk's choice are made from the same record: a Delta, merged or not.
    """

    def __init__(self, service: Service, generation: Generation, body: GenerationBody) -> None:
        self.service = service
        self.generation = generation
        self.body = body
        self._created = int(time.time())
        self._num_steps = [0] * len(generation.choices)

    @abstractmethod
    def choice(self, delta: Delta, extra: dict[str, Any], *, is_whole: bool) -> Any:
        """Make a choice of the endpoint's type."""

    @abstractmethod
    def reply(self, choices: list[Any], extra: dict[str, Any], *, is_whole: bool) -> Reply:
        """Make a response or chunk of the endpoint's type."""

    @abstractmethod
    def logprobs(self, delta: Delta) -> Any:
        """Make the endpoint's logprobs object of the delta's tokens."""

    def openings(self) -> list[Any]:
        """Choices of the chunks to send before anything is generated."""
        return []

    def common(self) -> dict[str, Any]:
        """Fields of every response and chunk."""
        return {
            "id": self.generation.prepared.ask.request_id,
            "created": self._created,
            "model": self.service.config.served_model_name,
            "system_fingerprint": self.service.fingerprint,
        }

    def thinking(self, text: str) -> dict[str, Any]:
        """Thinking text under the names that clients know."""
        if not text or not self.body.include_reasoning:
            return {}
        field = self.service.config.reasoning_field
        return dict.fromkeys(
            ("reasoning", "reasoning_content") if field == "both" else [field], text
        )

    def prompt_ids(self, index: int) -> list[int]:
        """Ids of the prompt that choice `index` answers."""
        prepared = self.generation.prepared
        return list(prepared.prompt_token_ids[index // prepared.num_choices])

    def _extra(self, delta: Delta) -> dict[str, Any]:
        """Fields beyond OpenAI's, and logprobs, of a choice."""
        extra: dict[str, Any] = {}
        if self.body.return_token_ids and delta.tokens:
            extra["token_ids"] = [token.token_id for token in delta.tokens]
        if delta.trace:
            first = self._num_steps[delta.index]
            self._num_steps[delta.index] += len(delta.trace)
            extra["reasoning_trace"] = [
                costs.trace_json(step, number, self.service.tokenizer)
                for number, step in enumerate(delta.trace, first)
            ]
        has_asked = self.generation.prepared.ask.sampling.num_logprobs is not None
        if has_asked and any(token.logprobs for token in delta.tokens):
            extra["logprobs"] = self.logprobs(delta)
        if delta.finish_reason is not None:
            extra["stop_reason"] = delta.stop_reason
        return extra

    def _cost(self) -> dict[str, Any]:
        info = costs.reasoning_info(self.generation)
        return {"usage": costs.usage(self.generation), "reasoning_info": info}

    async def whole(self) -> str:
        """Run to the end; the answer in one piece."""
        merged = [Delta(index=index) for index in range(len(self.generation.choices))]
        ended: list[int] = []
        async with self.generation as deltas:
            async for delta in deltas:
                merged[delta.index] = merged[delta.index].merge(delta)
                ended += [delta.index] if delta.finish_reason is not None else []
        choices = []
        for delta in self._select(merged, ended):
            extra = {"logprobs": None, **self._extra(delta)}
            if self.body.return_token_ids:
                extra.setdefault("token_ids", [])
            choices.append(self.choice(delta, extra, is_whole=True))
        return self.reply(choices, self._cost(), is_whole=True).model_dump_json(exclude_unset=True)

    def _select(self, merged: list[Delta], ended: list[int]) -> list[Delta]:
        """Keep the branches that the request's `select` picks, numbered anew."""
        resolved = self.generation.prepared.resolved
        if resolved.branches == 1:
            return merged
        kept: list[Delta] = []
        for start in range(0, len(merged), resolved.branches):
            group = merged[start : start + resolved.branches]
            branches = [
                Branch(
                    text=delta.content or str([token.token_id for token in delta.tokens]),
                    logprobs=[token.logprobs.logprob for token in delta.tokens if token.logprobs],
                    place=ended.index(delta.index),
                )
                for delta in group
            ]
            kept += [group[i] for i in choose(branches, resolved.select)]
        self.generation.shown = kept[0].index
        return [replace(delta, index=index) for index, delta in enumerate(kept)]

    async def stream(self) -> AsyncIterator[str]:
        """Run; the answer as chunks, usage last if asked."""
        options = self.body.stream_options
        for choice in self.openings():
            yield self._chunk([choice], {})
        async with self.generation as deltas:
            async for delta in deltas:
                extra = self._extra(delta)
                if not extra and not delta.content and not self.thinking(delta.reasoning):
                    continue
                has_usage = options is not None and options.continuous_usage_stats
                usage = {"usage": costs.usage(self.generation)} if has_usage else {}
                yield self._chunk([self.choice(delta, extra, is_whole=False)], usage)
        if options is not None and options.include_usage:
            yield self._chunk([], self._cost())

    def _chunk(self, choices: list[Any], extra: dict[str, Any]) -> str:
        chunk = self.reply(choices, extra, is_whole=False)
        return chunk.model_dump_json(exclude_unset=True, warnings=False)


def read_ask(
    request: Request,
    body: GenerationBody,
    service: Service,
    *,
    max_tokens: int | None,
    num_logprobs: int | None,
    **own: Any,
) -> GenerationAsk:
    """Build the part of a GenerationAsk that both endpoints have; `own` is the rest."""
    if body.request_id is not None:
        request.state.request_id = body.request_id  # for the header and the log too
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
    check_text_format(body)
    asked = read_reasoning(request, body, service.config)
    request.state.reasoning_mode = asked.mode  # for the metrics, should it be refused
    is_picked = asked.settings.get("branches", 1) > 1 and asked.settings.get("select") != "all"
    if body.stream and is_picked:
        raise InvalidRequestError(
            "reasoning.select must be 'all' in a stream: a pick is known at the end alone",
            param="reasoning.select",
        )
    return GenerationAsk(
        mode=asked.mode,
        effort=asked.effort,
        explains=asked.explains,
        reasoning=asked.settings,
        replay=asked.replay,
        n=body.n or 1,
        arrival=request.state.arrival,
        add_special_tokens=body.add_special_tokens,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        sampling=sampling_ask(body, max_tokens=max_tokens, num_logprobs=num_logprobs),
        **own,
    )


async def respond(request: Request, answer: Answer, ignored: list[str]) -> Response:
    """Run the answer's generation and send it the way the client asked."""
    service, generation = answer.service, answer.generation
    request.state.is_accepted = True  # an error from here on ends a sequence
    headers = {"X-Reasoning-Mode": generation.prepared.mode, **ignored_header(service, ignored)}
    if answer.body.stream:
        return EventStream(
            answer.stream(),
            close=generation.close,
            on_slow=lambda: service.metrics.add(service.metrics.slow_drops, 1),
            on_error=lambda error: count_error(request, error),
            max_send_seconds=service.config.max_send_seconds,
            keep_alive_seconds=service.config.keep_alive_seconds,
            headers=headers,
        )
    text = await _until_disconnect(request, answer.whole(), generation)
    return Response(text, media_type="application/json", headers=headers)


async def _until_disconnect(
    request: Request, work: Coroutine[None, None, T], generation: Generation
) -> T:
    """Run `work`; cancel it, and wait until it is cancelled, when the client disconnects.

    Raises:
        ClientDisconnect: The client went away; there is nobody to answer.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, listener = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, listener}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        listener.cancel()
        task.cancel()
        await asyncio.gather(listener, task, return_exceptions=True)
        await generation.close()  # also when `work` never got to start it

"""How a generation is shown: events of a stream, or one object."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from coconut_serve.server import usage as costs
from coconut_serve.server.schemas import GenerationBody
from coconut_serve.server.sse import Event
from coconut_serve.service.generation import Delta, Generation
from coconut_serve.service.service import Service

PartT = TypeVar("PartT", bound=BaseModel)  # what a chunk says of one choice


class Renderer(ABC, Generic[PartT]):
    """Makes the response objects of one call: those of an endpoint are a subclass.

    Args:
        service: For its tokenizer and settings.
        generation: What is shown; the renderer reads its counts.
        body: What the client asked for.
    """

    def __init__(self, service: Service, generation: Generation, body: GenerationBody) -> None:
        self.service = service
        self.generation = generation
        self.body = body
        self._created = int(time.time())
        self._num_steps = [0] * len(generation.choices)

    @abstractmethod
    def whole(self, choices: Sequence[Delta]) -> BaseModel:
        """Make the response of choices that have ended."""

    @abstractmethod
    def part(self, delta: Delta, extra: dict[str, Any]) -> PartT:
        """Make what a chunk says of one choice."""

    @abstractmethod
    def chunk(self, parts: list[PartT], extra: dict[str, Any]) -> BaseModel:
        """Make a chunk."""

    @abstractmethod
    def logprobs(self, delta: Delta) -> Any:
        """Make the endpoint's object of the log-probabilities of the delta's tokens."""

    def opening_parts(self) -> list[PartT]:
        """What is sent before anything is generated, a chunk each."""
        return []

    def opening(self) -> Iterator[Event]:
        """The events before the first delta."""
        return (self._event([part], {}) for part in self.opening_parts())

    def events(self, delta: Delta) -> Iterator[Event]:
        """The events of a delta: none if it shows nothing."""
        extra = self.extra(delta)
        if extra or delta.content or self.thinking(delta.reasoning):
            options = self.body.stream_options
            has_usage = options is not None and options.continuous_usage_stats
            usage = {"usage": costs.usage(self.generation)} if has_usage else {}
            yield self._event([self.part(delta, extra)], usage)

    def closing(self) -> Iterator[Event]:
        """The events behind the last delta."""
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield self._event([], self.cost())

    def _event(self, parts: list[PartT], extra: dict[str, Any]) -> Event:
        chunk = self.chunk(parts, extra)
        return Event(chunk.model_dump_json(exclude_unset=True, warnings=False))

    def common(self) -> dict[str, Any]:
        """Fields of every response and chunk."""
        return {
            "id": self.generation.prepared.ask.request_id,
            "created": self._created,
            "model": self.service.config.served_model_name,
            "system_fingerprint": self.service.fingerprint,
        }

    def cost(self) -> dict[str, Any]:
        """What the call took; `reasoning_info` repeats `usage.reasoning`."""
        usage = costs.usage(self.generation)
        return {"usage": usage, "reasoning_info": usage.reasoning}  # type: ignore[attr-defined]  # extra field

    def thinking(self, text: str) -> dict[str, str]:
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

    def extra(self, delta: Delta) -> dict[str, Any]:
        """Fields beyond OpenAI's, and logprobs, of what a choice gained."""
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

    def whole_extra(self, choice: Delta) -> dict[str, Any]:
        """The same of a choice that has ended, whose fields are all there."""
        extra = {"logprobs": None, **self.extra(choice)}
        if self.body.return_token_ids:
            extra.setdefault("token_ids", [])
        return extra

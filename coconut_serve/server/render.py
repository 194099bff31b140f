"""Renders a generation as events of a stream or as one object."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

from coconut_serve.errors import CoconutError
from coconut_serve.server.errors import error_body
from coconut_serve.server.schemas import GenerationBody
from coconut_serve.server.sse import Event
from coconut_serve.server.usage import trace_json, usage
from coconut_serve.service.generation import Delta, Generation
from coconut_serve.service.service import Service

PartT = TypeVar("PartT", bound=BaseModel)  # a choice in a chunk


class Renderer(ABC):
    """Makes the response objects of one call; each endpoint has a subclass.

    Args:
        service: For its tokenizer and settings.
        generation: What to render; the renderer reads its counts.
        body: What the client asked for.
    """

    def __init__(self, service: Service, generation: Generation, body: GenerationBody) -> None:
        self.service = service
        self.generation = generation
        self.body = body
        self._created = int(time.time())
        self._num_steps = [0] * len(generation.choices)

    has_end_mark: ClassVar[bool] = True  # streams end with [DONE]

    @abstractmethod
    def whole(self, choices: Sequence[Delta]) -> str:
        """Make the response from finished choices, as JSON."""

    @abstractmethod
    def opening(self) -> Iterator[Event]:
        """The events before the first delta."""

    @abstractmethod
    def events(self, delta: Delta) -> Iterator[Event]:
        """The events of a delta: none if it shows nothing."""

    @abstractmethod
    def closing(self) -> Iterator[Event]:
        """The events after the last delta."""

    @abstractmethod
    def logprobs(self, delta: Delta) -> Any:
        """Make the endpoint's log-probability object for the delta's tokens."""

    def failure(self, error: CoconutError) -> Iterator[Event]:
        """The events of an error after the first byte."""
        yield Event(json.dumps(error_body(error)))

    def common(self) -> dict[str, Any]:
        """Fields of every response and chunk."""
        return {
            "id": self.generation.prepared.ask.request_id,
            "created": self._created,
            "model": self.service.config.served_model_name,
            "system_fingerprint": self.service.fingerprint,
        }

    def cost(self) -> dict[str, Any]:
        """The usage fields; `reasoning_info` repeats `usage.reasoning`."""
        total = usage(self.generation)
        return {"usage": total, "reasoning_info": total.reasoning}  # type: ignore[attr-defined]  # extra field

    def thinking(self, text: str) -> dict[str, str]:
        """Thinking text, by the configured field names."""
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
        """Fields beyond OpenAI's, and logprobs, of a delta."""
        extra: dict[str, Any] = {}
        if self.body.return_token_ids and delta.tokens:
            extra["token_ids"] = [token.token_id for token in delta.tokens]
        if delta.trace:
            first = self._num_steps[delta.index]
            self._num_steps[delta.index] += len(delta.trace)
            extra["reasoning_trace"] = [
                trace_json(step, number, self.service.tokenizer)
                for number, step in enumerate(delta.trace, first)
            ]
        has_asked = self.generation.prepared.ask.sampling.num_logprobs is not None
        if has_asked and any(token.logprobs for token in delta.tokens):
            extra["logprobs"] = self.logprobs(delta)
        if delta.finish_reason is not None:
            extra["stop_reason"] = delta.stop_reason
        return extra

    def whole_extra(self, choice: Delta) -> dict[str, Any]:
        """The same for a finished choice, with every field present."""
        extra = {"logprobs": None, **self.extra(choice)}
        if self.body.return_token_ids:
            extra.setdefault("token_ids", [])
        return extra


class ChunkRenderer(Renderer, Generic[PartT]):
    """Streams chunks of choices, as chat and completions do."""

    @abstractmethod
    def part(self, delta: Delta, extra: dict[str, Any]) -> PartT:
        """Make the choice of a chunk."""

    @abstractmethod
    def chunk(self, parts: list[PartT], extra: dict[str, Any]) -> BaseModel:
        """Make a chunk."""

    def opening_parts(self) -> list[PartT]:
        """Choices to send before generation starts, one chunk each."""
        return []

    def opening(self) -> Iterator[Event]:
        return (self._event([part], {}) for part in self.opening_parts())

    def events(self, delta: Delta) -> Iterator[Event]:
        extra = self.extra(delta)
        if extra or delta.content or self.thinking(delta.reasoning):
            options = self.body.stream_options
            has_usage = options is not None and options.continuous_usage_stats
            so_far = {"usage": usage(self.generation)} if has_usage else {}
            yield self._event([self.part(delta, extra)], so_far)

    def closing(self) -> Iterator[Event]:
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield self._event([], self.cost())

    def _event(self, parts: list[PartT], extra: dict[str, Any]) -> Event:
        chunk = self.chunk(parts, extra)
        return Event(chunk.model_dump_json(exclude_unset=True, warnings=False))

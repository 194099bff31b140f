"""An API request, normalised by its endpoint; nothing is resolved yet."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coconut_serve.checkpoint.generation_config import SAMPLING_KEYS
from coconut_serve.params import SamplingParams
from coconut_serve.service.replay import ReplayInput
from coconut_serve.service.tokenizer import ChatMessage
from coconut_serve.types import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFields:
    """Sampling fields of a request; None = not given."""

    max_tokens: int | None = None
    max_tokens_field: str = "max_tokens"  # what the client called it
    params: Mapping[str, Any] = field(default_factory=dict)  # SamplingParams fields as given
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None

    def with_defaults(self, defaults: Mapping[str, Any]) -> "SamplingFields":
        """Fill in the model's own defaults, except max_tokens."""
        usual = {name: value for name, value in defaults.items() if name != "max_tokens"}
        return replace(self, params=usual | dict(self.params))

    def report(self, sampling: SamplingParams, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Report the settings of `sampling` by name, each with its value and source."""
        asked = {*self.params} | ({"max_tokens"} if self.max_tokens else set())

        def sourced(name: str) -> dict[str, Any]:
            value = getattr(sampling, name)
            usual = "generation_config" if defaults.get(name) == value else "default"
            return {"value": value, "source": "request" if name in asked else usual}

        return {name: sourced(name) for name in SAMPLING_KEYS.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """One API call, whatever its endpoint."""

    request_id: str
    endpoint: str
    mode: str | None  # explicit mode; None: the model's default
    messages: Sequence[ChatMessage] | None = None  # chat
    chat_template_options: Mapping[str, object] = field(default_factory=dict)
    prompts: Sequence[str | tuple[int, ...]] = ()  # completions
    add_special_tokens: bool | None = None  # to text prompts; None: the model's default
    truncate_prompt_tokens: int | None = None  # last ids to keep; -1: as many as fit
    n: int = 1
    sampling: SamplingFields = field(default_factory=SamplingFields)
    reasoning: Mapping[str, Any] = field(default_factory=dict)  # explicit settings, dotted names
    explains: bool = False  # report every resolved setting
    replay: ReplayInput | None = None
    effort: str | None = None
    has_default_max_tokens: bool = False  # completions: 16 when max_tokens is missing
    arrival: float = field(default_factory=time.monotonic)  # of the HTTP request

    @property
    def is_continued(self) -> bool:
        """Whether the model continues a text instead of answering a chat."""
        options = self.chat_template_options
        return self.messages is None or options.get("add_generation_prompt") is False

    def text_context(self, request: Request) -> tuple[int, ...]:
        """Ids of the text that the answer continues; (): the answer is a new text."""
        return request.prompt_token_ids if self.is_continued else ()

    @property
    def text_field(self) -> str:
        """The request field that holds the text."""
        fields = {"completions": "prompt", "responses": "input"}
        return fields.get(self.endpoint, "messages")

    @property
    def num_characters(self) -> int:
        """Approximate number of characters to tokenise."""
        texts = [str(m.get("content")) for m in self.messages or ()]
        texts += [*self.sampling.bad_words, *(p for p in self.prompts if isinstance(p, str))]
        return sum(map(len, texts))

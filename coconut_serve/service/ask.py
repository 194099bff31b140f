"""A request as the endpoints hand it on: normalised, with nothing decided yet."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coconut_serve.checkpoint.generation_config import SAMPLING_KEYS
from coconut_serve.params import SamplingParams
from coconut_serve.service.replay import ReplayAsk
from coconut_serve.service.tokenizer import ChatMessage
from coconut_serve.types import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingAsk:
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

    def with_defaults(self, defaults: Mapping[str, Any]) -> "SamplingAsk":
        """Let a model's own defaults stand where nothing is given; max_tokens is not among them."""
        usual = {name: value for name, value in defaults.items() if name != "max_tokens"}
        return replace(self, params=usual | dict(self.params))

    def told(self, sampling: SamplingParams, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """What an answer is drawn with, by name: the value, and whether it came from here."""
        asked = {*self.params} | ({"max_tokens"} if self.max_tokens else set())

        def tell(name: str) -> dict[str, Any]:
            value = getattr(sampling, name)
            usual = "generation_config" if defaults.get(name) == value else "default"
            return {"value": value, "source": "request" if name in asked else usual}

        return {name: tell(name) for name in SAMPLING_KEYS.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationAsk:
    """One API call, whatever its endpoint."""

    request_id: str
    endpoint: str
    mode: str | None  # explicit mode; None: the model's default
    messages: Sequence[ChatMessage] | None = None  # chat
    chat_template_options: Mapping[str, object] = field(default_factory=dict)
    prompts: Sequence[str | tuple[int, ...]] = ()  # completions
    add_special_tokens: bool | None = None  # to the text of a prompt; None: as the model says
    truncate_prompt_tokens: int | None = None  # last ids to keep; -1: what fits
    n: int = 1
    sampling: SamplingAsk = field(default_factory=SamplingAsk)
    reasoning: Mapping[str, Any] = field(default_factory=dict)  # explicit settings, dotted names
    explains: bool = False  # every resolved setting is told
    replay: ReplayAsk | None = None
    effort: str | None = None
    has_default_max_tokens: bool = False  # completions: 16 when max_tokens is missing
    arrival: float = field(default_factory=time.monotonic)  # of the HTTP request

    @property
    def is_continued(self) -> bool:
        """Whether the model goes on with a text, in place of answering a chat."""
        options = self.chat_template_options
        return self.messages is None or options.get("add_generation_prompt") is False

    def text_context(self, request: Request) -> tuple[int, ...]:
        """Ids of the text that an answer goes on with; (): it is a text of its own."""
        return request.prompt_token_ids if self.is_continued else ()

    @property
    def text_field(self) -> str:
        """The field that holds the text."""
        return "prompt" if self.messages is None else "messages"

    @property
    def num_characters(self) -> int:
        """About how much text there is to tokenise."""
        texts = [str(m.get("content")) for m in self.messages or ()]
        texts += [*self.sampling.bad_words, *(p for p in self.prompts if isinstance(p, str))]
        return sum(map(len, texts))

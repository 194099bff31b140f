"""Reads the arguments of an LLM's methods as the server reads a body: through JSON."""

import base64
import contextlib
import json
import logging
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coconut_serve.config import ServeConfig
from coconut_serve.errors import CoconutError, InvalidRequestError, require
from coconut_serve.server.chat import chat_fields
from coconut_serve.server.completions import completion_fields
from coconut_serve.server.parse import generate_call, parse_body, read_reasoning
from coconut_serve.server.schemas import ChatRequest, CompletionRequest, GenerationBody
from coconut_serve.service.ask import GenerateCall

logger = logging.getLogger(__name__)

Fields = Mapping[str, object]
Prompt = str | Sequence[int] | Mapping[str, Any]  # {"prompt": ...} or {"prompt_token_ids": ...}
Conversation = Sequence[Mapping[str, Any]]


class SamplingParams(dict[str, Any]):
    """Fields of a request by keyword; a dict is as good. They are checked when they are used."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)

    def __repr__(self) -> str:
        return f"SamplingParams({', '.join(f'{name}={value!r}' for name, value in self.items())})"


def text_bodies(prompts: Prompt | Sequence[Prompt]) -> list[Fields]:
    """Make a body of each prompt: a text, token ids, or a list of either."""
    given: Any = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    is_one = isinstance(given, str | Mapping) or (len(given) and isinstance(given[0], int))
    bodies: list[Fields] = []
    for prompt in [given] if is_one else given:
        own = prompt
        if isinstance(prompt, Mapping):
            is_known = [*prompt] in (["prompt"], ["prompt_token_ids"])
            require(is_known, "prompt", "must have one key: prompt or prompt_token_ids")
            [own] = prompt.values()
        bodies.append({"prompt": own})
    return bodies


def chat_bodies(messages: Conversation | Sequence[Conversation]) -> list[Fields]:
    """Make a body of each conversation."""
    is_one = len(messages) > 0 and isinstance(messages[0], Mapping)
    return [{"messages": each} for each in ([messages] if is_one else messages)]


def spread(name: str, given: Any, count: int) -> list[Any]:
    """A value for each of `count` prompts: the same one, or those of a list.

    Raises:
        InvalidRequestError: The list has another length.
    """
    values = [given] * count if given is None or isinstance(given, str | Mapping) else list(given)
    require(len(values) == count, name, f"has {len(values)} values for {count} prompts")
    return values


@contextlib.contextmanager
def numbered(index: int) -> Iterator[None]:
    """Say in errors of a list which prompt they are of."""
    try:
        yield
    except CoconutError as error:
        error.add_note(f"prompt {index} of the list, counted from 0")
        raise


@dataclass(frozen=True, slots=True)
class Call:
    """A checked call, with its body for what outputs show."""

    ask: GenerateCall
    body: GenerationBody


def read_call(
    config: ServeConfig,
    request_id: str,
    own: Fields,
    sampling: Fields | None,
    reasoning_mode: str | None,
    reasoning: Fields | None,
    *,
    is_stream: bool = False,
) -> Call:
    """Check a request's fields: what the method gives (`own`), then keywords, then `sampling`.

    Raises:
        InvalidRequestError: As over HTTP.
    """
    fields = dict(sampling or {})
    if "messages" in own and type(fields.get("logprobs")) is int:  # completions' form, as in vLLM
        fields |= {"logprobs": True, "top_logprobs": fields["logprobs"]}
    named = {"reasoning_mode": reasoning_mode, "reasoning": reasoning}
    fields |= {name: value for name, value in named.items() if value is not None}
    try:
        text = json.dumps({**fields, **own, "stream": is_stream}, default=_as_json)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"not a request: {error}", code="invalid_json") from None
    kind: Any = ChatRequest if "messages" in own else CompletionRequest
    body, ignored = parse_body(text, kind, config)
    if ignored:
        logger.warning("ignoring unknown fields: %s", ", ".join(ignored))
    if isinstance(body, ChatRequest):
        more = chat_fields(body)
    else:
        more = completion_fields(body)
        require(len(more["prompts"]) == 1, "prompt", "must be a text or a list of token ids")
        require(not body.echo, "echo", "is not supported here: outputs have their prompt")
    asked = read_reasoning(body, config)
    ask = generate_call(body, asked, request_id=body.request_id or request_id, **more)
    return Call(ask, body)


def _as_json(value: Any) -> Any:
    """Write arrays and tensors as requests do: ids as a list, vectors (of replay) in base64."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"{type(value).__name__} is not JSON")
    data = value.tolist()
    if not isinstance(data, list) or not data or not isinstance(data[0], float):
        return data
    return base64.b64encode(struct.pack(f"<{len(data)}f", *data)).decode()

"""Request bodies: strict types, ranges, and an error or a note for every unknown field.

Responses are `openai.types` classes with our extra fields; requests are these models, because
openai's own request types drop unknown keys and check no ranges.
"""

import difflib
from typing import Annotated, Any

from pydantic import Field

from coconut_serve.errors import InvalidRequestError
from coconut_serve.params import MAX_ALLOWED_TOKENS, MAX_BAD_WORDS, SAMPLED
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.server.body import Body, Items, Number, Values, body_of, say
from coconut_serve.server.reasoning_body import ReasoningBody
from coconut_serve.service.presets import EFFORTS, NO_EFFORT

MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_PROMPTS = 128
MAX_MESSAGES = 1024

_LENGTH = "max_tokens"  # answers to other names in some endpoints
_Sampled: Any = body_of(
    "_Sampled",
    "Settings of how tokens are drawn.",
    {name: own for name, own in SAMPLED.items() if name != _LENGTH},
)
_Length: Any = body_of("_Length", "The length of an answer.", {_LENGTH: SAMPLED[_LENGTH]})
# Fields that go into SamplingParams under their own name when they are given.
SAMPLING_FIELDS = tuple(name for name in SAMPLED if name not in (_LENGTH, "seed"))

BadWord = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]


class StreamOptions(Body):
    """stream_options."""

    include_usage: bool | None = say("Send the usage in a last chunk.")
    continuous_usage_stats: bool | None = say("Send the usage so far in every chunk.")
    include_obfuscation: bool | None = say("OpenAI's; accepted without effect.")


class ResponseFormat(Body):
    """response_format, and text.format of /v1/responses; text only so far."""

    type: str = Field(description="text; others are refused.")


class NamedBody(Body):
    """A body that names the model it is for."""

    model: str | None = say("The served model, or its name and a mode: NAME:latent.")


class GenerationBody(_Sampled, NamedBody):  # type: ignore[misc]  # made from params.py
    """Fields that all endpoints share."""

    stream: bool | None = say("Send server-sent events.")
    stream_options: StreamOptions | None = say("Of a stream.")
    logit_bias: Values[Number] | None = say("Token id -> what to add to its logit, -100..100.")
    allowed_token_ids: (
        Annotated[Items[int], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None
    ) = say("The only token ids that are drawn or mixed, thinking included.")
    bad_words: Annotated[Items[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = say(
        "Texts whose tokens are never completed, thinking included."
    )
    stop: str | Items[str] | None = say(
        f"Texts that end the answer; {MAX_STOP_STRINGS} of {MAX_STOP_LENGTH} characters at most."
    )
    stop_token_ids: Annotated[Items[int], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = say(
        "Token ids that end the answer."
    )
    ignore_eos: bool = Field(False, description="Go on after the model's end of sequence.")
    include_stop_str_in_output: bool = Field(False, description="Keep the text that ended it.")
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")
    add_special_tokens: bool | None = say(
        "Add BOS and the like to the prompt's text; default: to completions, as the model says."
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = say(
        "Keep so many of the prompt's last tokens; -1: what fits beside thinking and max_tokens."
    )
    return_token_ids: bool = Field(False, description="Tell the ids of prompt and answer.")
    include_reasoning: bool = Field(True, description="Tell the text of thinking.")
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")] | None = say(
        "What the response and the log call the request."
    )
    reasoning_mode: str | None = say("How the model thinks.", examples=[*mode_names()])
    reasoning_effort: str | None = say(
        "Scales the default number of steps; none: mode none.", examples=[NO_EFFORT, *EFFORTS]
    )
    reasoning: ReasoningBody | None = say("How the model thinks, in detail.")

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, checked.

        Raises:
            InvalidRequestError: Too many, too long or empty.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"stop takes at most {MAX_STOP_STRINGS}", param="stop")
        if any(not s or len(s) > MAX_STOP_LENGTH for s in stop):
            raise InvalidRequestError(
                f"stop: each must have 1..{MAX_STOP_LENGTH} characters", param="stop"
            )
        return tuple(stop)

    def bias(self) -> dict[int, float]:
        """logit_bias by token id, checked.

        Raises:
            InvalidRequestError: Keys are not ids, or values are out of range.
        """
        given = self.logit_bias or {}
        if any(not key.isdecimal() or len(key) > 10 for key in given):
            raise InvalidRequestError("logit_bias: keys must be token ids", param="logit_bias")
        if any(not -100 <= value <= 100 for value in given.values()):
            raise InvalidRequestError("logit_bias: values must be in -100..100", param="logit_bias")
        return {int(key): value for key, value in given.items()}


class ChoicesBody(_Length, GenerationBody):  # type: ignore[misc]  # made from params.py
    """Fields that chat and completions share."""

    n: Annotated[int, Field(ge=1)] | None = say("Choices of each prompt; default 1.")
    response_format: ResponseFormat | None = say("What the answer is; text only.")


Messages = Annotated[Items[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatBody(NamedBody):
    """How a chat becomes a prompt."""

    chat_template_kwargs: Values[bool | int | str] | None = say("Variables of the chat template.")
    add_generation_prompt: bool | None = say(
        "End the prompt with what opens an answer; default true, unless a message is continued."
    )
    continue_final_message: bool = Field(
        False, description="Go on with the last message instead of answering it."
    )

    def template_options(self) -> dict[str, Any]:
        """Variables to render the template with.

        Raises:
            InvalidRequestError: The template's own arguments are given, or two that exclude
                each other.
        """
        options = dict(self.chat_template_kwargs or {})
        for name in options:
            if name in _FIXED_OPTIONS or name.startswith("return_"):
                raise InvalidRequestError(
                    f"chat_template_kwargs.{name} cannot be set by a request",
                    param=f"chat_template_kwargs.{name}",
                )
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message needs add_generation_prompt: false",
                param="continue_final_message",
            )
        if self.continue_final_message:
            options |= {"continue_final_message": True, "add_generation_prompt": False}
        elif self.add_generation_prompt is False:
            options["add_generation_prompt"] = False
        return options


# Arguments of the template call itself: a request may set variables of the template, not these.
_FIXED_OPTIONS = frozenset({
    "self", "conversation", "messages", "chat_template", "tools", "documents", "tokenize",
    "add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length",
    "tokenizer_kwargs", "processor_kwargs", "load_audio_from_video",
})  # fmt: skip


class ChatRequest(ChatBody, ChoicesBody):
    """POST /v1/chat/completions."""

    messages: Messages = Field(description="The chat so far: role and content of each message.")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = say("As max_tokens; this one wins.")
    logprobs: bool | None = say("Tell the log-probability of each answer token.")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = say("And of so many rivals.")


class CompletionRequest(ChoicesBody):
    """POST /v1/completions."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]] = Field(
        description=f"Text or token ids, or a list of up to {MAX_PROMPTS} of either."
    )
    echo: bool = Field(False, description="Put the prompt in front of the answer.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = say(
        "Tell log-probabilities of the answer's tokens and so many rivals."
    )


class TextConfig(Body):
    """The `text` object of /v1/responses."""

    format: ResponseFormat | None = say("What the answer is; text only.")
    verbosity: str | None = say("OpenAI's; accepted without effect.")


class ResponsesRequest(GenerationBody):
    """POST /v1/responses."""

    input: str | Annotated[Items[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)] = (
        Field(description="Text, or items: messages, and reasoning of earlier turns.")
    )
    instructions: str | None = say("A system message in front of the input.")
    max_output_tokens: Annotated[int, Field(ge=1)] | None = say(
        "Positions of thinking and answer together, at most."
    )
    text: TextConfig | None = say("How the answer is written.")
    include: Items[str] | None = say("message.output_text.logprobs; others have no effect.")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = say(
        "Tell log-probabilities of the answer's tokens, and so many rivals."
    )
    truncation: str | None = say("disabled; auto is refused: no part of the input is left out.")


class TokenizeRequest(ChatBody):
    """POST /tokenize: a prompt or messages."""

    prompt: str | None = say("Text.")
    messages: Messages | None = say("A chat, rendered as the chat endpoint does.")
    add_special_tokens: bool | None = say("Add BOS and the like; default: to a prompt, not a chat.")
    return_token_strs: bool = Field(False, description="Tell the text of each token too.")


class DetokenizeRequest(NamedBody):
    """POST /detokenize."""

    tokens: Items[Annotated[int, Field(ge=0)]] = Field(description="Token ids.")


_CHAT, _TEXT = frozenset(ChatRequest.model_fields), frozenset(CompletionRequest.model_fields)
OTHERS: dict[type[Body], frozenset[str]] = {  # fields of other endpoints: refused, not ignored
    ChatRequest: _TEXT - _CHAT,
    CompletionRequest: _CHAT - _TEXT,
    ResponsesRequest: (_CHAT | _TEXT) - frozenset(ResponsesRequest.model_fields),
}


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_mode_name(mode: str, param: str) -> str:
    """Return the mode if it exists.

    Raises:
        InvalidRequestError: It does not; the message names those that do.
    """
    names = list(mode_names())
    if mode not in names:
        raise InvalidRequestError(
            f"{param} must be one of {', '.join(names)}{_suggest(mode, names)}",
            param=param,
            code="invalid_reasoning_mode",
        )
    return mode


def check_effort(effort: str | None, param: str) -> str | None:
    """Return the effort if it is one.

    Raises:
        InvalidRequestError: It is not.
    """
    if effort is not None and effort != NO_EFFORT and effort not in EFFORTS:
        names = ", ".join([NO_EFFORT, *EFFORTS])
        raise InvalidRequestError(f"{param} must be one of {names}", param=param)
    return effort


def check_text_format(given: ResponseFormat | None, param: str) -> None:
    """Refuse structured output.

    Raises:
        InvalidRequestError: With code unsupported_parameter.
    """
    kind = given.type if given else "text"
    if kind != "text":
        raise InvalidRequestError(
            f"{param} {kind!r} is not supported", param=param, code="unsupported_parameter"
        )

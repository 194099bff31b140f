"""The tokenizer interface, and a byte tokenizer for tests and the stub engine."""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from coconut_serve.errors import InvalidRequestError

ChatMessage = Mapping[str, Any]


class TextStream(Protocol):
    """Turns ids into text as they come; never splits a character."""

    def push(self, token_id: int) -> str:
        """Add an id and return the text that is now certain."""

    def flush(self) -> str:
        """Return what is still held back, without the beginning of an unfinished character."""


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""

    @property
    def unknown_token_id(self) -> int | None:
        """The id of text outside the vocabulary; None if all text is inside."""

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Turn text into ids."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turn ids into text."""

    def find_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary, None if it is not one."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text; they may be part of a character."""

    def render_chat(self, messages: Sequence[ChatMessage], **options: object) -> str:
        """Render messages with the model's chat template, up to the answer.

        Raises:
            InvalidRequestError: The template refuses them.
        """

    def stream(
        self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> TextStream:
        """Start an incremental decoder of what follows `context`, a prompt's ids."""


def require_tokenizer(
    tokenizer: Tokenizer | None, param: str | None = None, hint: str = "send token ids"
) -> Tokenizer:
    """Return the tokenizer of a model that has one.

    Raises:
        InvalidRequestError: It has none; `param` is the field that needs it.
    """
    if tokenizer is None:
        raise InvalidRequestError(
            f"this model has no tokenizer: {hint}", param=param, code="no_tokenizer"
        )
    return tokenizer


class ByteTokenizer:
    """One id for each byte, and special ids; for tests and the stub engine."""

    EOS = 256
    THINK_START = 257
    THINK_END = 258
    VOCAB_SIZE = 259

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return (self.EOS,)

    @property
    def unknown_token_id(self) -> int | None:
        return None

    @property
    def has_chat_template(self) -> bool:
        return True

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        del add_special_tokens
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        del skip_special_tokens
        return bytes(i for i in token_ids if i < 256).decode(errors="replace")

    def find_id(self, token: str) -> int | None:
        data = token.encode()
        return data[0] if len(data) == 1 else None

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def render_chat(self, messages: Sequence[ChatMessage], **options: object) -> str:
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        if options.get("continue_final_message"):
            return text.removesuffix("\n")
        return text + "assistant: " if options.get("add_generation_prompt", True) else text

    def stream(
        self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> TextStream:
        del skip_special_tokens, context
        return _ByteStream()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id] if token_id < 256 else []))

    def flush(self) -> str:
        return ""

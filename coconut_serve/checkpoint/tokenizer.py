"""A model directory's tokenizer, through transformers."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from coconut_serve.errors import InvalidRequestError, StartupError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def _byte_alphabet() -> dict[str, int]:
    """Map the characters of byte-level BPE vocabularies to bytes (GPT-2's alphabet).

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and following.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {chr(byte): byte for byte in shown}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


class HFTokenizer:
    """Wraps transformers' tokenizer; see service/tokenizer.py for the protocol."""

    def __init__(self, tokenizer: Any, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, from the generation config and the tokenizer."""
        return self._eos_token_ids

    @property
    def has_chat_template(self) -> bool:
        """Whether the model declares one."""
        return self._tokenizer.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Turn text into ids."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turn ids into text."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def find_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary."""
        found: int | None = self._tokenizer.get_vocab().get(token)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, also where they are part of a character."""
        text = self.decode([token_id], skip_special_tokens=False)
        if "\ufffd" not in text:
            return text.encode()
        token: str = self._tokenizer.convert_ids_to_tokens(token_id)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):  # SentencePiece's byte tokens
            return bytes([int(token[3:5], 16)])
        if all(c in _BYTE_OF for c in token):  # byte-level BPE
            return bytes(_BYTE_OF[c] for c in token)
        return text.encode()

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: object) -> str:
        """Render with the model's template, in transformers' sandbox."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=True, **options
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return text

    def stream(self, *, skip_special_tokens: bool = True) -> "_HFStream":
        """Start an incremental decoder."""
        return _HFStream(self, skip_special_tokens)


class _HFStream:
    """tokenizers' own incremental decoder, which fails on some odd sequences: then decode anew."""

    def __init__(self, tokenizer: HFTokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer._tokenizer.backend_tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._sent = ""

    def push(self, token_id: int) -> str:
        """Add an id and return the text that is now certain."""
        self._ids.append(token_id)
        try:
            text = self._stream.step(self._backend, token_id) or ""
        except Exception:  # DecodeStream raises plain Exception ("Invalid prefix encountered")
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            text = self._unsent().removesuffix("\ufffd")
        self._sent += text
        return text

    def flush(self) -> str:
        """Return what is still held back."""
        text = self._unsent()
        self._sent += text
        return text

    def _unsent(self) -> str:
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        return whole[len(self._sent) :] if whole.startswith(self._sent) else ""


def load_tokenizer(directory: Path) -> HFTokenizer | None:
    """Load a directory's tokenizer; None if it has none.

    Raises:
        StartupError: It has one that cannot be read.
    """
    if not any((directory / name).is_file() for name in _FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise StartupError(f"cannot load the tokenizer of {directory}: {error}") from error
    eos = list(read_eos_token_ids(directory))
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in eos:
        eos.append(tokenizer.eos_token_id)
    return HFTokenizer(tokenizer, tuple(eos))


def read_eos_token_ids(directory: Path) -> tuple[int, ...]:
    """Read the ids that end an answer from generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.is_file():
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (value,)
    return ()

"""A model directory's tokenizer, through transformers and tokenizers."""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from coconut_serve.checkpoint.files import one_line
from coconut_serve.errors import InvalidRequestError, StartupError

_FILE = "tokenizer.json"
_FILES = (_FILE, "tokenizer.model", "vocab.json", "tokenizer_config.json")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's
_MAX_PARTS = 4  # bytes of a character
_NUM_CONTEXT = 4  # visible ids before a token on which its text may depend
# Text on which tokenizers are known to differ: leading and double spaces, line breaks, code,
# digits, capitals, contractions, accents, other scripts.
_SAMPLES = (
    "hello world",
    " The  quick brown fox.\n",
    "def fib(n):\n    return n",
    "It's 12,345 o'clock!\t\u00c9t\u00e9 \u4f60\u597d \U0001f999",
)


def _byte_alphabet() -> dict[str, int]:
    """Map the characters of byte-level BPE vocabularies to bytes (GPT-2's alphabet).

    Printable Latin-1 characters map to themselves; U+0100 onwards map to the remaining bytes.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {chr(byte): byte for byte in shown}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


class HFTokenizer:
    """Wraps transformers' tokenizer; service/tokenizer.py documents the protocol."""

    def __init__(self, tokenizer: Any, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        kinds = _decoder_kinds(tokenizer.backend_tokenizer)
        self._is_byte_level = kinds <= {"ByteLevel", "Fuse"} and "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        self.splits_characters = "ByteLevel" in kinds  # perhaps among other decoders
        self._added: dict[int, str] = {}
        self._special_ids: set[int] = set()
        for token_id, token in tokenizer.added_tokens_decoder.items():
            self._added[token_id] = token.content
            if token.special:
                self._special_ids.add(token_id)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._eos_token_ids

    @property
    def unknown_token_id(self) -> int | None:
        """The unknown token; None if it is an end token, as byte-level tokenizers declare."""
        unknown: int | None = self._tokenizer.unk_token_id
        return None if unknown in self._eos_token_ids else unknown

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def find_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.get_vocab().get(token)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token adds to a text, possibly part of a character."""
        if token_id in self._special_ids:
            return self._added[token_id].encode()
        data = self.raw_bytes(token_id)
        if data is not None:
            return data
        return self.text_after(self._anchor, [token_id]).encode()

    def raw_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of a token that stands for bytes; None if it stands for text."""
        if not self._is_byte_level and not self._has_byte_tokens:
            return None
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if self._is_byte_level:
            is_mapped = token_id not in self._added and all(c in _BYTE_OF for c in piece)
            return bytes(_BYTE_OF[c] for c in piece) if is_mapped else piece.encode()
        match = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else None

    def text_after(self, context: Sequence[int], token_ids: Sequence[int]) -> str:
        """Return what ids add to the text of `context`; decoded alone, they may lose a space."""
        before = self.decode(context, skip_special_tokens=False)
        whole = self.decode([*context, *token_ids], skip_special_tokens=False)
        if whole.startswith(before):
            return whole[len(before) :]
        return self.decode(token_ids, skip_special_tokens=False)

    @cached_property
    def _anchor(self) -> list[int]:
        """A word to decode tokens after; empty if the vocabulary has none."""
        vocabulary = self._tokenizer.get_vocab()
        words = [i for token, i in vocabulary.items() if re.fullmatch("\u2581?[A-Za-z]+", token)]
        return [min(words)] if words else []

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: object) -> str:
        """Apply the model's template, in transformers' sandbox."""
        try:
            options = {"add_generation_prompt": True, **options}
            text: str = self._tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, **options
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return text

    def stream(
        self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> "_ByteLevelStream | _PieceStream":
        """Start an incremental decoder."""
        skipped = self._special_ids if skip_special_tokens else set()
        visible = [i for i in context if i not in skipped][-_NUM_CONTEXT:]
        if self._is_byte_level:
            return _ByteLevelStream(self, skipped, visible)
        return _PieceStream(self, skipped, visible)


class _ByteLevelStream:
    """Every token is bytes, decoded together as UTF-8."""

    def __init__(self, tokenizer: HFTokenizer, skipped: set[int], context: list[int]) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in context:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.raw_bytes(token_id) or b"")

    def flush(self) -> str:
        return ""  # only an unfinished character is held back


class _PieceStream:
    """Tokens are pieces of text, except the bytes of characters outside the vocabulary.

    A byte that is not part of a character becomes U+FFFD by itself. Decoding all ids at once also
    turns every byte next to it into U+FFFD, but a stream cannot take back what it has sent.
    """

    def __init__(self, tokenizer: HFTokenizer, skipped: set[int], context: list[int]) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        self._context: list[int] = []
        self._held: list[int] = []  # parts of a character that have no bytes of their own
        self._bytes = b""  # the beginning of a character
        for token_id in context:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        data = self._tokenizer.raw_bytes(token_id)
        if data is not None:
            text, self._bytes = _take_characters(self._bytes + data)
        else:
            self._held.append(token_id)
            text = self._tokenizer.text_after(self._context, self._held)
            is_part = self._tokenizer.splits_characters and text.endswith("\ufffd")
            if is_part and len(self._held) < _MAX_PARTS:
                return ""
            text = "\ufffd" * len(self._bytes) + text
            self._bytes = b""
            self._context = [*self._context, *self._held][-_NUM_CONTEXT:]
            self._held.clear()
            return text
        self._context = [*self._context[1 - _NUM_CONTEXT :], token_id]
        return text

    def flush(self) -> str:
        return ""  # only an unfinished character is held back


def _take_characters(data: bytes) -> tuple[str, bytes]:
    """Decode the complete characters; return them and the start of an incomplete one."""
    text = ""
    while True:
        try:
            return text + data.decode(), b""
        except UnicodeDecodeError as error:
            text += data[: error.start].decode()
            if error.reason == "unexpected end of data":
                return text, data[error.start :]
            text, data = text + "\ufffd", data[error.start + 1 :]


def _decoder_kinds(backend: Tokenizer) -> set[str]:
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {each["type"] for each in state.get("decoders", [state])}


def load_tokenizer(directory: Path) -> HFTokenizer | None:
    """Load a directory's tokenizer; None if it has none.

    tokenizer.json determines how text is read, whatever class tokenizer_config.json names: some
    classes of transformers replace the file's rules with their own.

    Raises:
        StartupError: The tokenizer cannot be read or served.
    """
    if not any((directory / name).is_file() for name in _FILES):
        return None
    file = directory / _FILE
    try:
        if file.is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
            _obey(tokenizer, file)
        else:
            tokenizer = AutoTokenizer.from_pretrained(directory)
    except StartupError:
        raise
    except Exception as error:  # bad contents make transformers raise nearly anything
        raise StartupError(
            f"cannot load the tokenizer of {directory}: {one_line(error)}"
        ) from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        kind = type(tokenizer).__name__
        raise StartupError(f"the tokenizer of {directory} ({kind}) has no tokenizer.json to serve")
    if not tokenizer.encode(_SAMPLES[0], add_special_tokens=False):
        raise StartupError(f"the tokenizer of {directory} has no vocabulary")
    eos = list(read_eos_token_ids(directory))
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in eos:
        eos.append(tokenizer.eos_token_id)
    loaded = HFTokenizer(tokenizer, tuple(eos))
    if loaded.has_chat_template:
        _check_template(loaded, directory)
    return loaded


def _check_template(tokenizer: HFTokenizer, directory: Path) -> None:
    """Refuse a chat template that does not compile; it may still refuse this one message."""
    try:
        tokenizer.render_chat([{"role": "user", "content": "Hello"}])
    except InvalidRequestError as refusal:
        fault = refusal.__cause__
        if isinstance(fault, TemplateSyntaxError):
            raise StartupError(
                f"the chat template of {directory} does not compile: line {fault.lineno}: {fault}"
            ) from fault


def _obey(tokenizer: Any, file: Path) -> None:
    """Restore the rules of tokenizer.json, and check that samples are read by it alone.

    Raises:
        StartupError: A sample is read differently.
    """
    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        own.add_tokens([token])
    tokenizer.clean_up_tokenization_spaces = False
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        setattr(tokenizer.backend_tokenizer, part, getattr(own, part))
    for sample in _SAMPLES:
        ids = own.encode(sample, add_special_tokens=False).ids
        found = tokenizer.encode(sample, add_special_tokens=False)
        if found != ids or tokenizer.decode(ids) != own.decode(ids, skip_special_tokens=False):
            raise StartupError(
                f"{file}: tokenizer_config.json changes how {sample!r} is read: {found}, not {ids}"
            )


def read_eos_token_ids(directory: Path) -> tuple[int, ...]:
    """Read the end-of-sequence ids from generation_config.json, otherwise config.json."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.is_file():
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            if not all(type(each) is int for each in ids):
                raise StartupError(f"{path}: eos_token_id {value!r} is no token id or list of them")
            return tuple(ids)
    return ()

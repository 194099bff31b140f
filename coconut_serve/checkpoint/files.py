"""Checks the files of a model directory before anything loads them. Imports no torch."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from coconut_serve.errors import StartupError

# All that transformers, vLLM or this package read; each holds one JSON object.
_JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json",
    "processor_config.json", "preprocessor_config.json", "adapter_config.json",
    "latent_config.json",
)  # fmt: skip
_TEXT_FILES = ("chat_template.jinja", "merges.txt", "vocab.txt")
_INDEX_SUFFIX = ".index.json"
_T = TypeVar("_T")
_POINTER = b"version https://git-lfs.github.com/spec/"


def one_line(error: BaseException) -> str:
    """Return an error's text without line breaks, or its type if the text is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def check_files(directory: Path, *, needs_weights: bool = True) -> None:
    """Check that the files are readable and complete.

    Raises:
        StartupError: One is damaged, or weights are missing; the text names it and says why.
    """
    for name in _JSON_FILES:
        if (directory / name).is_file():
            _read_object(directory / name)
    for path in directory.glob("*.jinja"):
        _read_text(path)
    for name in _TEXT_FILES:
        if (directory / name).is_file():
            _read_text(directory / name)
    for name in ("tokenizer.model", "spiece.model"):
        if (directory / name).is_file():
            _check_content(directory / name)
    weights = list(_weights(directory)) if needs_weights else []
    if not weights and needs_weights:
        raise StartupError(f"{directory} has no weights (model.safetensors)", param="MODEL")
    for path in (*weights, *sorted(directory.glob("latent/*.safetensors"))):
        _check_content(path)
        if path.suffix == ".safetensors":
            _check_safetensors(path)


def _weights(directory: Path) -> Iterator[Path]:
    """Yield the weight files, in the format that engines prefer."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{stem}{_INDEX_SUFFIX}"
        if (directory / stem).is_file():
            yield directory / stem
            return
        if index.is_file():
            yield from _shards(index)
            return
    yield from sorted(directory.glob("*.safetensors"))  # vLLM takes any name


def _shards(index: Path) -> Iterator[Path]:
    shards = _read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise StartupError(f"{index} has no weight_map", param="MODEL")
    for name in sorted({str(shard) for shard in shards.values()}):
        if not (index.parent / name).is_file():
            raise StartupError(f"{index} names {name}, which is not there", param="MODEL")
        yield index.parent / name


def _read_object(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StartupError(
            f"{path} is not readable JSON: {one_line(error)}", param=path.name
        ) from error
    if not isinstance(data, dict):
        raise StartupError(f"{path} must hold one JSON object", param=path.name)
    return data


def _read_text(path: Path) -> str:
    _check_content(path)
    return _reading(path, lambda: path.read_text(encoding="utf-8"))


def _check_content(path: Path) -> None:
    """Refuse an empty file or a git-lfs pointer."""

    def read() -> bytes:
        with path.open("rb") as stream:
            return stream.read(len(_POINTER))

    start = _reading(path, read)
    if not start and path.suffix != ".txt":
        raise StartupError(f"{path} is empty", param=path.name)
    if start == _POINTER:
        raise StartupError(
            f"{path} is a git-lfs pointer, not the file itself: run git lfs pull", param=path.name
        )


def _check_safetensors(path: Path) -> None:
    """Read the header, which implies the file's length."""

    def read() -> None:
        with safe_open(path, framework="numpy"):
            pass

    _reading(path, read, "truncated or no safetensors file: ")


def _reading(path: Path, read: Callable[[], _T], what: str = "not readable: ") -> _T:
    try:
        return read()
    except (OSError, ValueError, SafetensorError) as error:
        raise StartupError(f"{path} is {what}{one_line(error)}", param=path.name) from error

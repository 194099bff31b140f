"""Reads checkpoints: safetensors, and torch files as plain data, without running their code."""

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # the error only: torch raises it
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coconut_serve.errors import StartupError

_WHOLE = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_TENSOR_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict")  # Lightning's, and many training loops'
# Errors of torch's weights_only reader for a file with more than data.
_CODE = re.compile(r"[^\n]*(unsupported GLOBAL|Unsupported (class|global)|GLOBAL .* was not)[^\n]*")
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint as found on disk."""

    path: Path  # as the user gave it
    directory: Path  # where its config and tokenizer would be
    config: dict[str, Any]  # config.json; empty if missing or 0 bytes
    adapter_config: dict[str, Any]  # PEFT's adapter_config.json; empty if missing
    tensors: dict[str, Tensor]
    files: tuple[Path, ...]  # sources of the tensors
    names: frozenset[str]  # all files in the directory

    @property
    def is_torch_file(self) -> bool:
        """Whether the user named a single file that torch.save wrote."""
        return self.path.is_file() and self.path.suffix != ".safetensors"

    def with_prefix(self, *prefixes: str) -> dict[str, Tensor]:
        """Select the tensors whose names start with one of the prefixes."""
        return {name: t for name, t in self.tensors.items() if name.startswith(prefixes)}

    def has_tokens(self, *texts: str) -> bool:
        """Whether the checkpoint's tokenizer has all of these as added tokens."""
        added = read_json(self.directory / "added_tokens.json")
        entries = read_json(self.directory / "tokenizer.json").get("added_tokens") or []
        return {*texts} <= {*added, *(entry.get("content") for entry in entries)}

    @property
    def unread(self) -> list[str]:
        """Files in the directory that may hold tensors but are not part of this checkpoint."""
        read = {*(file.name for file in self.files), *_NO_WEIGHTS}
        beside = self.names - read if self.path.is_dir() else ()
        return sorted(name for name in beside if _may_hold_tensors(Path(name)))


def read_source(path: Path, param: str = "SRC") -> Source:
    """Read a checkpoint file or directory.

    Args:
        path: As the user gave it.
        param: The argument it came from, for messages.

    Raises:
        StartupError: It is missing, damaged, or contains more than data.
    """
    if not path.exists():
        raise StartupError(f"{param} {path} does not exist", param=param)
    directory = path if path.is_dir() else path.parent
    files = _find_files(path, param) if path.is_dir() else [path]
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = read_tensors(file)
        twice = tensors.keys() & found.keys()
        if twice:
            raise StartupError(f"{file}: {min(twice)} is in another file, too", param=param)
        tensors |= found
    if not tensors:
        raise StartupError(f"{param} {path} holds no tensors", param=param)
    return Source(
        path=path,
        directory=directory,
        config=read_json(directory / "config.json"),
        adapter_config=read_json(directory / "adapter_config.json"),
        tensors=tensors,
        files=tuple(files),
        names=frozenset(file.name for file in directory.iterdir()),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or has 0 bytes (some hub repositories).

    Raises:
        StartupError: The file holds anything else.
    """
    if not path.is_file() or not path.stat().st_size:
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} is not readable JSON: {error}", param="SRC") from error
    if not isinstance(data, dict):
        raise StartupError(f"{path} must hold one JSON object", param="SRC")
    return data


def _find_files(directory: Path, param: str) -> list[Path]:
    """Find a checkpoint's files: a whole model, an adapter and its companions, or one file."""
    for name in _ADAPTER:
        if (directory / name).is_file():
            return [directory / name, *_companions(directory)]
    for name in _WHOLE:
        file = directory / name
        if file.is_file() and name.endswith(".index.json"):
            return _shards(file)
        if file.is_file():
            return [file]
    found = [
        file
        for file in sorted(directory.iterdir())
        if file.is_file() and _may_hold_tensors(file) and file.name not in _NO_WEIGHTS
    ]
    if len(found) != 1:
        what = ", ".join(file.name for file in found) or "no weights"
        raise StartupError(f"{param} {directory} holds {what}: name one file", param=param)
    return found


def _may_hold_tensors(file: Path) -> bool:
    return file.suffix in _TENSOR_SUFFIXES or file.name.startswith("checkpoint_")


def _companions(directory: Path) -> list[Path]:
    """Tensor files beside an adapter, such as CODI's projection."""
    skip = {*_ADAPTER, *_WHOLE, *_NO_WEIGHTS}
    return [
        file
        for file in sorted(directory.iterdir())
        if file.suffix in _TENSOR_SUFFIXES
        and file.name not in skip
        and any(word in file.name for word in ("prj", "proj", "adapter", "latent"))
    ]


def _shards(index: Path) -> list[Path]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise StartupError(f"{index} has no weight_map", param="SRC")
    files = sorted({index.parent / Path(str(name)).name for name in table.values()})
    for file in files:
        if not file.is_file():
            raise StartupError(f"{index} names {file.name}, which is not there", param="SRC")
    return files


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of one file, memory-mapped where its layout allows.

    Raises:
        StartupError: The file is damaged, or holds objects other than tensors.
    """
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    data = _load_torch(file)
    for wrapper in _WRAPPERS:
        if isinstance(data, Mapping) and isinstance(data.get(wrapper), Mapping):
            _refuse_tensors_beside(file, data, wrapper)
            data = data[wrapper]
    if not isinstance(data, Mapping):
        raise StartupError(f"{file} holds a {type(data).__name__}, no state dict", param="SRC")
    for name, value in data.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise StartupError(
                f"{file}: {name!r} is a {type(value).__name__}, not a tensor: no state dict",
                param="SRC",
            )
    return dict(data)


def _refuse_tensors_beside(file: Path, data: Mapping[Any, Any], wrapper: str) -> None:
    """Refuse weights outside the state dict; ignore the other state of a training loop."""

    def is_weights(value: Any) -> bool:
        found = value.values() if isinstance(value, Mapping) else (value,)
        return any(isinstance(t, Tensor) and t.is_floating_point() and t.ndim for t in found)

    beside = [str(name) for name, value in data.items() if name != wrapper and is_weights(value)]
    if beside:
        raise StartupError(
            f"{file}: beside {wrapper} there are tensors in {', '.join(beside)}: save what belongs "
            "to the model as one state dict",
            param="SRC",
        )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError) as error:
        raise StartupError(
            f"{file} is truncated or no safetensors file: {error}", param="SRC"
        ) from error


def _load_torch(file: Path) -> Any:
    """Load a torch.save file as plain data (`weights_only`), so that no code of it runs."""
    try:
        is_zip = zipfile.is_zipfile(file)  # torch's format since 1.6; only this can be mapped
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except UnpicklingError as error:
        told = _CODE.search(str(error))
        if told is None:
            raise StartupError(_damaged(file, error), param="SRC") from error
        raise StartupError(
            f"{file} holds objects besides tensors, and loading them would run code from the file, "
            "which is never done here. If you trust its author, save the tensors alone elsewhere "
            f"(its state_dict) and convert that. torch says: {told.group()}",
            param="SRC",
        ) from error
    except Exception as error:  # a damaged file makes torch's reader raise nearly anything
        raise StartupError(_damaged(file, error), param="SRC") from error


def _damaged(file: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    return f"{file} is truncated or no file of torch.save: {reason}"

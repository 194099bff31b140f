"""Writes the target directory, whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

import coconut_serve
from coconut_serve.checkpoint.manifest import FILE_NAME, Manifest, load_manifest
from coconut_serve.convert.job import ADAPTER, Converted, Job
from coconut_serve.convert.model import Fitted
from coconut_serve.convert.source import Source, read_json
from coconut_serve.errors import StartupError

_ADAPTER_FILE = "latent/adapter.safetensors"
_WEIGHTS_FILE = "model.safetensors"
_REPORT_FILE = "convert_report.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_GENERATION_KEYS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p",
)  # fmt: skip


def check_target(target: Path) -> None:
    """Check that the target is absent or an empty directory, before any work.

    Raises:
        StartupError: It is neither.
    """
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise StartupError(
            f"DST {target} exists and is not empty: nothing is overwritten", param="DST"
        )


def check_manifest(converted: Converted, vocab_size: int) -> Manifest:
    """Validate the format's manifest and that its tokens are in the vocabulary.

    Raises:
        StartupError: It is invalid, or names a token outside the vocabulary.
    """
    try:
        manifest = Manifest.model_validate({"schema": 1, **converted.manifest})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StartupError(f"{FILE_NAME}: {where}: {first['msg']}", param=where) from error
    highest = max(manifest.token_ids, default=0)
    if highest >= vocab_size:
        raise StartupError(
            f"the token id {highest} is outside the vocabulary of {vocab_size}: a tokenizer or "
            "--base of another model?",
            param="--base",
        )
    return manifest


def write(job: Job, converted: Converted, fitted: Fitted) -> None:
    """Write everything into a temporary directory beside the target, then rename it.

    Raises:
        StartupError: Writing failed; nothing is left behind.
    """
    target = job.options.target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise StartupError(f"cannot write beside {target}: {error}", param="DST") from error
    try:
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)  # mkdtemp makes it private to its owner
        _write_all(job, converted, fitted, partial)
        load_manifest(partial)
        os.replace(partial, target)
    except OSError as error:
        raise StartupError(f"cannot write {target}: {error}", param="DST") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_all(job: Job, converted: Converted, fitted: Fitted, into: Path) -> None:
    tensors = _cast(fitted.tensors, job.options.dtype)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        fitted.config.dtype = str(dtypes.pop()).removeprefix("torch.")
    fitted.config.save_pretrained(into)
    save_file(tensors, into / _WEIGHTS_FILE, {"format": "pt"})
    job.report.used |= dict.fromkeys(tensors, _WEIGHTS_FILE)
    if converted.adapter:
        adapter = {f"{ADAPTER}.{name}": t.float() for name, t in converted.adapter.items()}
        (into / _ADAPTER_FILE).parent.mkdir()
        save_file(_own(adapter), into / _ADAPTER_FILE, {"format": "pt"})
        job.report.used |= dict.fromkeys(adapter, _ADAPTER_FILE)
    _write_tokenizer(job, converted, into)
    _write_json(into / "generation_config.json", _generation_config(job, fitted))
    manifest = {"schema": 1, **converted.manifest, "provenance": _provenance(job)}
    _write_json(into / FILE_NAME, manifest)
    _write_json(into / _REPORT_FILE, job.report.as_json())


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _cast(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    if dtype == "auto":
        return _own(tensors)
    wanted: torch.dtype = getattr(torch, dtype)
    return _own({name: t.to(wanted) if t.is_floating_point() else t for name, t in tensors.items()})


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor its own memory, as safetensors requires."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if address in seen else tensor.contiguous()
        seen.add(address)
    return own


def _write_tokenizer(job: Job, converted: Converted, into: Path) -> None:
    """Copy tokenizer files from the first directory that has a tokenizer."""
    for directory in job.directories():
        found = [name for name in _TOKENIZER_FILES if (directory / name).is_file()]
        if {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(found):
            for name in found:
                shutil.copyfile(directory / name, into / name)
            return
    for name, text in converted.files.items():
        (into / name).write_text(text, encoding="utf-8")
    if not converted.files:
        job.report.note("no tokenizer found: the directory serves token ids only")


def _generation_config(job: Job, fitted: Fitted) -> dict[str, Any]:
    """Select keys of the checkpoint's, else the base's file, else the config's token ids."""
    for directory in job.directories():
        found = read_json(directory / "generation_config.json")
        if found:
            return {key: found[key] for key in _GENERATION_KEYS if found.get(key) is not None}
    ids = {key: getattr(fitted.config, key, None) for key in _GENERATION_KEYS[:3]}
    return {key: value for key, value in ids.items() if value is not None}


def _provenance(job: Job) -> dict[str, Any]:
    made: dict[str, Any] = {
        "source": job.source.path.name,
        "format": job.report.format,
        "converter": f"coconut-serve {coconut_serve.__version__}",
        "sha256": _digests(job.source),
    }
    if job.options.base is not None:
        read = job.base_if_read  # None if only its settings were needed
        made["base"] = {"source": job.options.base.name, "sha256": _digests(read) if read else {}}
    return made


def _digests(source: Source) -> dict[str, str]:
    digests = {}
    for file in source.files:
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests

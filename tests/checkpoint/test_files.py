"""Damaged files stop the start with one line that names the file, exit status 2, no traceback."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from coconut_serve.checkpoint.files import check_files
from coconut_serve.checkpoint.weights import DEMO_DIRECTORY
from coconut_serve.cli import main
from coconut_serve.errors import StartupError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "latent_config.json",
    "adapter_config.json", "model.safetensors.index.json",
)  # fmt: skip
DAMAGED_JSON = {
    "empty": b"",
    "cut short": b'{"a": [1, 2',
    "trailing comma": b'{"eos_token_id": [2, 5],}',
    "no object": b"[1, 2]",
    "not UTF-8": b'{"a": "\xff"}',
    "nested too deep": b"[" * 100_000,
    "git-lfs pointer": POINTER.encode(),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with one of everything, whole."""
    for name in JSON_FILES:
        (tmp_path / name).write_text("{}")
    (tmp_path / "merges.txt").write_text("a b\n")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    (tmp_path / "latent").mkdir()
    for name in ("a.safetensors", "b.safetensors", "latent/adapter.safetensors"):
        save_file({name: np.zeros((9, 9), np.float32)}, tmp_path / name)
    table = {"x": "a.safetensors", "y": "b.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    return tmp_path


def refusal(directory: Path) -> str:
    with pytest.raises(StartupError) as caught:
        check_files(directory)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_whole_directory_passes(model: Path) -> None:
    check_files(model)


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_that_cannot_be_read_is_named(name: str, model: Path) -> None:
    for what, content in DAMAGED_JSON.items():
        (model / name).write_bytes(content)
        message = refusal(model)
        assert message.startswith(str(model / name)), what


@pytest.mark.parametrize("name", ["a.safetensors", "latent/adapter.safetensors"])
def test_weights_that_are_not_whole_are_named(name: str, model: Path) -> None:
    whole = (model / name).read_bytes()
    contents = [whole[:length] for length in range(0, len(whole), 7)]
    for content in [*contents, whole + b"x", POINTER.encode(), b"<html>" * 50, bytes(400)]:
        (model / name).write_bytes(content)
        assert refusal(model).startswith(str(model / name)), content[:20]


def test_other_damages_are_named(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    whole = index.read_text()
    tables: list[Any] = [{}, [], None, "a", {"x": "c.safetensors"}, {"x": 5}]
    for table in tables:
        index.write_text(json.dumps({"weight_map": table}))
        told = "which is not there" if isinstance(table, dict) and table else "has no weight_map"
        assert told in refusal(model)
    index.write_text(whole)
    for name, content in (
        ("chat_template.jinja", b"\xff"),
        ("merges.txt", POINTER.encode()),
        ("tokenizer.model", b""),
    ):
        kept = (model / name).read_bytes()
        (model / name).write_bytes(content)
        assert refusal(model).startswith(str(model / name))
        (model / name).write_bytes(kept)
    for name in ("model.safetensors.index.json", "a.safetensors", "b.safetensors"):
        (model / name).unlink()
    assert "has no weights" in refusal(model)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("generation_config.json", DAMAGED_JSON["trailing comma"], "is not readable JSON"),
        ("tokenizer_config.json", DAMAGED_JSON["cut short"], "is not readable JSON"),
        ("config.json", DAMAGED_JSON["no object"], "must hold one JSON object"),
        ("a.safetensors", b"", "is empty"),
        ("b.safetensors", POINTER.encode(), "is a git-lfs pointer"),
        ("a.safetensors", b"x" * 99, "is truncated or no safetensors file"),
        ("latent_config.json", b'{"steps": "6"}', "steps: Input should be a valid integer"),
    ],
)
def test_serve_says_it_in_one_line_with_status_2(
    name: str,
    content: bytes,
    told: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A trailing comma ended in a traceback, after the model had been loaded."""
    caplog.set_level(logging.INFO)
    (model / name).write_bytes(content)
    assert main(["serve", str(model), "--port", "0"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"coconut-serve: {model / name}")
    assert told in line
    told_by = {record.name for record in caplog.records}
    assert "uvicorn.error" not in told_by, '"startup complete" stood there while nothing was'


async def load(directory: Path) -> None:
    """Load what `serve` loads."""
    from coconut_serve.checkpoint.tokenizer import load_tokenizer, read_eos_token_ids
    from tests.fakes import native_engine

    load_tokenizer(directory)
    read_eos_token_ids(directory)
    async with native_engine(directory):
        pass


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("config.json", {"num_hidden_layers": "x"}),
        ("config.json", {"hidden_size": None}),
        ("config.json", {"vocab_size": -1}),
        ("config.json", {"hidden_act": "no_such"}),
        ("config.json", {"rope_parameters": {"rope_type": "no_such"}}),
        ("config.json", {"num_key_value_heads": 3}),
        ("config.json", {"model_type": 5}),
        ("config.json", {"model_type": "no_such", "auto_map": {"AutoConfig": "x.Y"}}),
        ("generation_config.json", {"eos_token_id": "2"}),
        ("generation_config.json", {"eos_token_id": [2, None]}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"chat_template": "{% for m in messages %}"}),
        ("tokenizer_config.json", {"chat_template": "{{ messages | no_such_filter }}"}),
        ("tokenizer.json", {"model": {}}),
        ("tokenizer.json", {"version": 1}),
    ],
)
async def test_wrong_contents_are_one_line(
    name: str, settings: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    demo = DEMO_DIRECTORY
    for directory, names in (
        (tiny_llama, ("config.json", "generation_config.json", "model.safetensors")),
        (demo, ("tokenizer.json", "tokenizer_config.json")),
    ):
        for each in names:
            (tmp_path / each).write_bytes((directory / each).read_bytes())
    whole = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(whole | settings))
    check_files(tmp_path)
    with pytest.raises(StartupError) as caught:
        await load(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert "\n" not in caught.value.message


def test_an_index_of_weights_that_are_not_loaded_is_not_looked_at(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Repositories with safetensors beside pytorch_model.bin shards, which nobody fetches."""
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = {"weight_map": {"lm_head.weight": "pytorch_model-00001-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    check_files(tmp_path)

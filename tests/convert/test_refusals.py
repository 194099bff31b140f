"""What cannot be converted is refused with the reason, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coconut_serve.cli import main
from tests.convert.builders import VOCAB, Case, make_base, write_adapter
from tests.convert.layouts_fixed import coconut, codi, codi_peft
from tests.convert.layouts_halting import BUILDERS, later, switch
from tests.convert.refusal import Capture, refuse
from tests.models import save_tiny

pytestmark = pytest.mark.torch


def test_missing_source(tmp_path: Path, capsys: Capture) -> None:
    case = Case(tmp_path / "nothing", None)
    assert "does not exist" in refuse(case, tmp_path, capsys)


def test_directory_without_weights(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no weights" in refuse(Case(tmp_path / "empty", None), tmp_path, capsys)


def test_target_that_is_not_empty(tmp_path: Path, capsys: Capture) -> None:
    case = coconut(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "exists and is not empty" in refuse(case, tmp_path, capsys)
    (tmp_path / "out" / "mine.txt").unlink()
    assert main([*case.command, str(tmp_path / "out")]) == 0, "an empty one is taken"


@pytest.mark.parametrize("build", [coconut, codi, codi_peft, switch])
def test_base_is_asked_for(build: Callable[[Path], Case], tmp_path: Path, capsys: Capture) -> None:
    """CODI's config.json has 0 bytes: without the base nothing says the architecture."""
    case = build(tmp_path)
    case.base = None
    if build is codi:
        (case.source / "config.json").touch()
    assert "give --base DIR" in refuse(case, tmp_path, capsys)


def test_base_of_another_shape(tmp_path: Path, capsys: Capture) -> None:
    case = codi(tmp_path)
    case.base = save_tiny("gpt2", tmp_path / "small", hidden_size=32)
    message = refuse(case, tmp_path, capsys)
    assert "has shape" in message
    assert "another base model or config.json?" in message
    case.base = save_tiny("gpt2", tmp_path / "deep", num_hidden_layers=3)
    assert "missing in the checkpoint" in refuse(case, tmp_path, capsys)
    case.base = make_base(tmp_path / "other", "llama")
    assert "the base model has no such weight; another base?" in refuse(case, tmp_path, capsys)


@pytest.mark.parametrize("build", [coconut, codi])
def test_base_of_another_vocabulary(
    build: Callable[[Path], Case], tmp_path: Path, capsys: Capture
) -> None:
    case = build(tmp_path)
    case.base = save_tiny("gpt2", tmp_path / "other", vocab_size=100)
    message = refuse(case, tmp_path, capsys)
    assert f"vocabulary of {VOCAB + 3}, the base model of 100" in message


def test_adapter_for_another_base(tmp_path: Path, capsys: Capture) -> None:
    case = switch(tmp_path)
    case.base = save_tiny("qwen3", tmp_path / "small", hidden_size=32)
    assert "another base?" in refuse(case, tmp_path, capsys)
    case.base = save_tiny("gpt2", tmp_path / "gpt2")
    assert "the base model has no such weight" in refuse(case, tmp_path, capsys)


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, dict[str, Any]], None]:
    def edit(source: Path, settings: dict[str, Any]) -> None:
        file = source / "adapter_model.safetensors"
        state = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(state)
        write_adapter(source, state, **settings)

    return edit


_Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"r": 8}, lambda s: None, "has rank 4, not 8"),
        ({"use_dora": True}, lambda s: None, "DoRA cannot be merged"),
        ({"peft_type": "IA3"}, lambda s: None, "IA3 cannot be merged"),
        ({}, lambda s: s.pop(f"{_Q}.lora_B.weight"), "lacks its half A or B"),
        (
            {},
            lambda s: s.update({f"{_Q}.lora_magnitude_vector": torch.ones(3)}),
            "DoRA cannot be merged",
        ),
        (
            {},
            lambda s: s.update({f"{_Q}.lora_A.weight": torch.ones(3, 64)}),
            r"factors [3, 64] and [64, 4] do not match",
        ),
        ({}, lambda s: s.update({f"{_Q}.extra": torch.ones(3)}), "has no place for"),
    ],
)
def test_adapter_that_is_wrong_in_itself(
    settings: dict[str, Any],
    change: Callable[[dict[str, Any]], None],
    message: str,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    case = switch(tmp_path)
    _edit(change)(case.source, settings)
    assert message in refuse(case, tmp_path, capsys)


def test_lora_scale_that_nothing_says(tmp_path: Path, capsys: Capture) -> None:
    case = codi(tmp_path)
    case.flags = ()
    assert "rank is 4, not the published 128" in refuse(case, tmp_path, capsys)


def test_tokens_that_no_tokenizer_has(tmp_path: Path, capsys: Capture) -> None:
    case = later(tmp_path)
    (case.source / "tokenizer.json").unlink()
    (case.source / "tokenizer_config.json").unlink()
    message = refuse(case, tmp_path, capsys)
    assert "no tokenizer here has <latent_think>: give --base DIR or --token" in message
    ids = {"<latent_think>": 1, "</latent_think>": 2, "<think>": 3, "</think>": 999}
    flags = [f"--token={text}={i}" for text, i in ids.items()]
    assert "id 999 is outside the vocabulary of 128" in refuse(case, tmp_path, capsys, *flags)


def test_projector_that_is_announced_but_missing(tmp_path: Path, capsys: Capture) -> None:
    case = BUILDERS["latent-tts-codi"](tmp_path)
    file = case.source / "model.safetensors"
    state = {n: t.clone() for n, t in load_file(file).items() if not n.startswith("projector")}
    save_file(state, file)
    assert "says projector, but its tensors are missing" in refuse(case, tmp_path, capsys)


def test_colar_on_a_base_whose_deviation_is_unknown(tmp_path: Path, capsys: Capture) -> None:
    case = BUILDERS["colar"](tmp_path)
    case.flags = ("--lora-alpha", "8")
    assert "give --emb-std" in refuse(case, tmp_path, capsys)


def test_unknown_layout_names_what_is_known_and_near(tmp_path: Path, capsys: Capture) -> None:
    save_file({"prj.1.bias": torch.ones(2), "wx": torch.ones(2)}, tmp_path / "model.safetensors")
    message = refuse(Case(tmp_path / "model.safetensors", None), tmp_path, capsys)
    assert "unknown layout with tensors prj.1.bias, wx" in message
    assert "Nearest: CODI" in message
    assert "CoLaR (Lightning) (llm., latent_policy.)" in message


def test_ordinary_model_needs_no_conversion(tmp_path: Path, capsys: Capture) -> None:
    message = refuse(Case(make_base(tmp_path, "llama"), None), tmp_path, capsys)
    assert "an ordinary llama model: it is served as it is" in message


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("pccot_args.json", {"num_latent_tokens": 24}, "PCCoT"),
        ("config.json", {"model_type": "pccot-gpt2"}, "use whyNLP/PCCoT"),
        ("config.json", {"model_type": "huginn_raven"}, "Huginn"),
        ("config.json", {"model_type": "ouro"}, "serve it with vLLM and a model plugin"),
        ("tah_config.json", {}, "TaH"),
    ],
)
def test_other_architectures_are_known_and_refused(
    file: str, content: dict[str, Any], message: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / file).write_text(json.dumps(content))
    assert message in refuse(Case(tmp_path / "model", None), tmp_path, capsys)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--steps=0", "--steps must be more than 0"),
        ("--speed=9", "--speed must be 1-5 or auto"),
        ("--token=abc", "must be TEXT=ID"),
    ],
)
def test_flags_are_checked(flag: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    assert message in refuse(Case(tmp_path, None), tmp_path, capsys, flag)


def test_disk_that_fails_leaves_nothing(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = coconut(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coconut_serve.convert.write.save_file", fail)
    assert "No space left on device" in refuse(case, tmp_path, capsys)

"""Damaged files, and files with code in them, are refused; nothing runs and nothing is written."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coconut_serve.convert.source import read_source
from coconut_serve.errors import StartupError
from tests.convert.layouts_fixed import coconut
from tests.convert.layouts_halting import BUILDERS, later
from tests.convert.refusal import Capture, refuse

pytestmark = pytest.mark.torch


def test_safetensors_cut_short(tmp_path: Path, capsys: Capture) -> None:
    case = later(tmp_path)
    file = case.source / "model.safetensors"
    whole = file.read_bytes()
    for length in (4, 500, len(whole) - 10):
        file.write_bytes(whole[:length])
        message = refuse(case, tmp_path, capsys)
        assert "model.safetensors is truncated or no safetensors file" in message


@pytest.mark.parametrize("is_zip", [True, False])
def test_torch_file_cut_short(is_zip: bool, tmp_path: Path, capsys: Capture) -> None:
    case = coconut(tmp_path)
    state = torch.load(case.source, weights_only=True)
    torch.save(state, case.source, _use_new_zipfile_serialization=is_zip)
    whole = case.source.read_bytes()
    for length in (10, 300, len(whole) // 2, len(whole) - 10):
        case.source.write_bytes(whole[:length])
        assert "checkpoint_33 is truncated or no file" in refuse(case, tmp_path, capsys)


@pytest.mark.parametrize("is_zip", [True, False])
def test_torch_file_with_flipped_bytes_never_ends_in_a_traceback(
    is_zip: bool, tmp_path: Path
) -> None:
    """Torch's reader raises nearly anything then; seed 0, 300 files."""
    file, rng = tmp_path / "checkpoint_1", random.Random(0)
    state = {"base_causallm.a": torch.ones(4, 4), "embedding.weight": torch.ones(3)}
    torch.save(state, file, _use_new_zipfile_serialization=is_zip)
    whole = file.read_bytes()
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 5, 20])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            read_source(file)
        except StartupError:
            num_refused += 1
    assert num_refused > 100


def test_weights_that_are_not_finite(tmp_path: Path, capsys: Capture) -> None:
    case = coconut(tmp_path)
    state = torch.load(case.source, weights_only=True)
    state["base_causallm.transformer.h.1.mlp.c_fc.weight"][3, 3] = torch.inf
    torch.save(state, case.source)
    assert "c_fc.weight has values that are not finite" in refuse(case, tmp_path, capsys)


def test_shard_that_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    case = BUILDERS["simcot-codi"](tmp_path)
    (case.source / "model-00002-of-00002.safetensors").unlink()
    message = refuse(case, tmp_path, capsys)
    assert "names model-00002-of-00002.safetensors, which is not there" in message


@pytest.mark.parametrize("name", ["adaptive-linear", "adaptive-mlp", "later", "hrpo", "colar"])
def test_adapter_with_a_tensor_missing(name: str, tmp_path: Path, capsys: Capture) -> None:
    case = BUILDERS[name](tmp_path)
    lost = {
        "adaptive-linear": "recurrent_filter.bias",
        "adaptive-mlp": "recurrent_filter.norm.weight",
        "later": "latent_projector.net.3.weight",
        "hrpo": "base_model.model.model.thinking_residual_Lambda.Lambda",
        "colar": "latent_policy.fc.3.weight",
    }[name]
    if name == "colar":
        data = torch.load(case.source, weights_only=True)
        del data["state_dict"][lost]
        torch.save(data, case.source)
    else:
        [file] = case.source.glob("*.safetensors")
        state = {n: t.clone() for n, t in load_file(file).items() if n != lost}
        save_file(state, file)
    assert "missing in the checkpoint" in refuse(case, tmp_path, capsys)


class Attack:
    """Unpickles to a call."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("layout", ["zip", "legacy", "bare"])
def test_pickled_code_is_refused_and_does_not_run(
    layout: str, tmp_path: Path, capsys: Capture
) -> None:
    case = coconut(tmp_path)
    state = torch.load(case.source, weights_only=True)
    state["base_causallm.extra"] = Attack(tmp_path / "ran")
    if layout == "bare":
        case.source.write_bytes(pickle.dumps({"x": state["base_causallm.extra"]}, protocol=2))
    else:
        torch.save(state, case.source, _use_new_zipfile_serialization=layout == "zip")
    message = refuse(case, tmp_path, capsys)
    assert not (tmp_path / "ran").exists()
    assert "would run code from the file, which is never done here" in message
    assert "mkdir" in message


def test_file_of_other_data(tmp_path: Path, capsys: Capture) -> None:
    case = coconut(tmp_path)
    torch.save({"step": 3, "lr": [0.1]}, case.source)
    assert "'step' is a int, not a tensor" in refuse(case, tmp_path, capsys)
    torch.save([1, 2], case.source)
    assert "holds a list, no state dict" in refuse(case, tmp_path, capsys)

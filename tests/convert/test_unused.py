"""No tensor of a checkpoint is dropped without a word, and what may be two things is asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coconut_serve.cli import main
from tests.convert.builders import RANK, SIZE, VOCAB, Case, cloned, write_tokenizer
from tests.convert.layouts_fixed import coconut, codi, codi_no_norm
from tests.convert.layouts_halting import BUILDERS, later, switch
from tests.convert.layouts_multimode import multimode_coconut, pause_coconut
from tests.convert.refusal import Capture, refuse

pytestmark = pytest.mark.torch


def add(case: Case, more: dict[str, Tensor]) -> None:
    """Add tensors to the checkpoint's first file."""
    file = case.source
    if file.is_dir():
        [file, *_] = [f for kind in ("*.safetensors", "*.bin", "check*") for f in file.glob(kind)]
    if file.suffix == ".safetensors":
        save_file(cloned(load_file(file)) | more, file)
        return
    data: dict[str, Any] = torch.load(file, weights_only=True)
    data.get("state_dict", data).update(more)
    torch.save(data, file)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("coconut", "router.weight"),
        ("coconut", "base_causallm.gate.weight"),
        ("coconut", "transformer.wte.weight"),  # the model has it under its prefix, too
        ("coconut-pause", "pause_embeddings"),
        ("multimode-coconut-gpt2", "embedding.bias"),
        ("superposition", "pause_embedding"),
        ("simcot-coconut", "projector.weight"),
        ("codi", "prj.5.weight"),
        ("codi", "codi.gate.weight"),
        ("codi-peft", "prj.7.weight"),
        ("latent-tts-coconut", "latent_gate.weight"),
        ("latent-tts-codi", "projector.6.weight"),
        ("latent-tts-colar", "lt_head.gate.weight"),
        ("colar", "latent_policy.gate.weight"),
        ("colar", "reward_model.weight"),
        ("adaptive-none", "recurrent_filter.norm.weight"),
        ("adaptive-sre", "recurrent_filter.norm.weight"),
        ("adaptive-mlp", "recurrent_filter.gate.weight"),
        ("adaptive-mlp", "_start_embed.weight"),  # of lora_mode, which is off
        ("later", "latent_projector.scale"),
        ("hrpo", "base_model.model.model.thinking_residual_gate_x.weight"),
        ("switch", "base_model.model.gate.weight"),
        ("latent-sft", "gate.weight"),
        ("coconut-text", "gate.weight"),
    ],
)
def test_tensor_that_a_format_does_not_know_is_refused_by_name(
    name: str, extra: str, tmp_path: Path, capsys: Capture
) -> None:
    """Keys beside those that an adapter takes were left out of model and report."""
    case = BUILDERS[name](tmp_path)
    add(case, {extra: torch.ones(VOCAB + 3, SIZE)})
    message = refuse(case, tmp_path, capsys)
    known = extra.removeprefix("base_causallm.").removeprefix("codi.")
    assert known.removeprefix("base_model.model.") in message


def test_second_lora_of_a_module_is_refused(tmp_path: Path, capsys: Capture) -> None:
    """The last of two adapters was merged, the other forgotten."""
    case, name = codi(tmp_path), "codi.base_model.model.transformer.h.0.attn.c_attn.lora_"
    shapes = {"A": (RANK, SIZE), "B": (3 * SIZE, RANK)}
    add(case, {f"{name}{side}.other.weight": torch.ones(n) for side, n in shapes.items()})
    assert f"{name}A.default.weight" in refuse(case, tmp_path, capsys)


def test_embedding_that_is_no_copy_is_refused(tmp_path: Path, capsys: Capture) -> None:
    """It was dropped as a copy, whatever was in it."""
    case = coconut(tmp_path)
    add(case, {"embedding.weight": torch.ones(VOCAB + 3, SIZE)})
    assert "embedding.weight) that gpt2 has no place for" in refuse(case, tmp_path, capsys)


def test_second_state_dict_of_a_file_is_refused(tmp_path: Path, capsys: Capture) -> None:
    """`model_state_dict` was taken, and a projector beside it forgotten."""
    case = coconut(tmp_path)
    state = torch.load(case.source, weights_only=True)
    training = {"epoch": 3, "rng_state": torch.zeros(9, dtype=torch.uint8), "loss": torch.ones(())}
    training["optimizer_state_dict"] = {"state": {0: {"exp_avg": torch.ones(3)}}}
    torch.save(
        {"model_state_dict": state, **training, "projector": {"w": torch.ones(3)}}, case.source
    )
    message = refuse(case, tmp_path, capsys)
    assert "beside model_state_dict there are tensors in projector" in message
    torch.save({"model_state_dict": state, **training}, case.source)
    assert main([*case.command, str(tmp_path / "out")]) == 0


def test_copies_that_peft_keeps_and_files_beside_are_in_the_report(
    tmp_path: Path, capsys: Capture
) -> None:
    case = switch(tmp_path)
    name = "base_model.model.model.norm"
    kept, trained = f"{name}.original_module.weight", f"{name}.modules_to_save.default.weight"
    add(case, {kept: torch.ones(SIZE), trained: torch.full((SIZE,), 1.5)})
    torch.save({}, case.source / "pytorch_model.bin")
    assert main([*case.command, str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "convert_report.json").read_text())
    assert kept in report["dropped"]
    assert "not read: pytorch_model.bin" in report["notes"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert float(weights["model.norm.weight"][0]) == 1.5


def test_coconut_without_its_copy_of_the_embedding_is_asked_for(
    tmp_path: Path, capsys: Capture
) -> None:
    """Multi-mode checkpoints were taken for plain ones; only this copy tells them apart."""
    case = multimode_coconut(tmp_path, "gpt2")
    case.flags = ()
    assert "--method coconut or --method multimode?" in refuse(case, tmp_path, capsys)
    assert main([*case.command, "--method", "coconut", str(tmp_path / "plain")]) == 0
    write_tokenizer(tmp_path, {"<|bocot|>": VOCAB, "<|eocot|>": VOCAB + 1}, VOCAB + 3)
    assert main([*case.command, str(tmp_path / "out")]) == 0, "the tokenizer beside it tells"
    manifest = json.loads((tmp_path / "out" / "latent_config.json").read_text())
    assert manifest["provenance"]["format"] == "COCONUT, several modes"


def test_llama_without_an_end_of_turn_is_asked_for_it(tmp_path: Path, capsys: Capture) -> None:
    case = multimode_coconut(tmp_path, "llama")
    assert case.base is not None
    write_tokenizer(case.base, {})
    assert "no tokenizer here has <|eot_id|>" in refuse(case, tmp_path, capsys)
    assert main([*case.command, "--token=<|eot_id|>=77", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "latent_config.json").read_text())
    assert manifest["prompt"]["suffix_ids"] == [77, VOCAB]


def test_codi_whose_config_counts_the_added_tokens_is_asked(
    tmp_path: Path, capsys: Capture
) -> None:
    """Three were assumed, so that two became a start and an end of other words."""
    case = codi_no_norm(tmp_path)
    file = case.source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": VOCAB + 3}))
    assert "--method codi" in refuse(case, tmp_path, capsys)
    for method, start in (("codi", VOCAB + 1), ("multimode", VOCAB + 1)):
        target = tmp_path / method
        assert main([*case.command, "--method", method, str(target)]) == 0
        manifest = json.loads((target / "latent_config.json").read_text())
        assert manifest["prompt"]["suffix_ids"] == [start]
        assert manifest["tokens"]["end"]["id"] == VOCAB + 2


def test_method_of_another_format_is_refused(tmp_path: Path, capsys: Capture) -> None:
    """It was ignored."""
    message = refuse(coconut(tmp_path / "a"), tmp_path, capsys, "--method", "soft_grpo")
    assert "layout of COCONUT, which --method soft_grpo is not for (but coconut)" in message
    message = refuse(later(tmp_path / "b"), tmp_path, capsys, "--method", "cot")
    assert "layout of LaTER, which --method cot is not for (but none)" in message
    message = refuse(codi(tmp_path / "c"), tmp_path, capsys, "--method", "multimode")
    assert "CODI adds 2: another base" in message


def test_pause_model_of_an_untied_base_needs_its_head(tmp_path: Path, capsys: Capture) -> None:
    case = pause_coconut(tmp_path)
    assert case.base is not None
    file = case.base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": False}))
    state = torch.load(case.source, weights_only=True)
    del state["base_causallm.lm_head.weight"]
    torch.save(state, case.source)
    assert "lm_head.weight) of gpt2 missing in the checkpoint" in refuse(case, tmp_path, capsys)


def test_pause_vector_of_another_size_is_refused(tmp_path: Path, capsys: Capture) -> None:
    case = pause_coconut(tmp_path)
    add(case, {"pause_embedding": torch.ones(SIZE + 1)})
    assert f"pause_embedding has shape [{SIZE + 1}]" in refuse(case, tmp_path, capsys)

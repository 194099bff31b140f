"""Weights that are not the model's are refused by name, before any is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coconut_serve.checkpoint.fit import check_weights
from coconut_serve.engines.native.model import PagedModel
from coconut_serve.errors import StartupError
from tests.models import save_tiny

pytestmark = pytest.mark.torch

Weights = dict[str, Tensor]


def change(directory: Path, edit: Callable[[Weights], object]) -> Path:
    """Edit a model's weights in place."""
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def prefix(weights: Weights, text: str) -> None:
    for name in list(weights):
        weights[text + name] = weights.pop(name)


def cut(weights: Weights, name: str) -> None:
    weights[name] = weights[name][:-1].clone()


@pytest.mark.parametrize(
    ("family", "edit", "told"),
    [
        (
            "llama",
            lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
            ["missing: model.layers.1.mlp.up_proj.weight"],
        ),
        ("llama", lambda w: w.pop("lm_head.weight"), ["missing: lm_head.weight"]),
        (
            "llama",
            lambda w: cut(w, "model.embed_tokens.weight"),
            ["misshapen: model.embed_tokens.weight [127, 64] for [128, 64]"],
        ),
        (
            "llama",
            lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)}),
            ["unexpected: model.layers.2.mlp.up_proj.weight"],
        ),
        (
            "llama-tied",
            lambda w: prefix(w, "module."),
            ["missing: lm_head.weight, model.embed", "unexpected: module.model.", "more"],
        ),
        (
            "gpt2",
            lambda w: prefix(w, "base_causallm."),
            ["unexpected: base_causallm.transformer.", "coconut-serve convert"],
        ),
        (
            "mixtral",
            lambda w: w.pop("model.layers.0.block_sparse_moe.experts.1.w1.weight"),
            ["parts of model.layers.0.mlp.experts.gate_up_proj do not fit"],
        ),
    ],
)
def test_weights_of_another_model_are_refused_by_name(
    family: str, edit: Callable[[Weights], object], told: list[str], tmp_path: Path
) -> None:
    """They were served as random numbers: answers differed after each restart."""
    directory = change(save_tiny(family, tmp_path), edit)
    with pytest.raises(StartupError) as caught:
        check_weights(directory)
    for text in (str(directory), *told):
        assert text in caught.value.message
    assert "\n" not in caught.value.message


def rename_to_head(weights: Weights) -> None:
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")


def strip(weights: Weights) -> None:
    for name in list(weights):
        weights[name.removeprefix("model.")] = weights.pop(name)


def add_old_buffers(weights: Weights) -> None:
    for name in list(weights):
        if "q_proj" in name:
            weights[name.replace("q_proj.weight", "rotary_emb.inv_freq")] = torch.ones(8)
        if "c_attn.weight" in name:
            weights[name.replace("c_attn.weight", "bias")] = torch.ones(1, 1, 4, 4)
            weights[name.replace("c_attn.weight", "masked_bias")] = torch.tensor(-1e4)


@pytest.mark.parametrize(
    ("family", "edit"),
    [
        ("llama-tied", lambda w: None),
        ("llama-tied", rename_to_head),
        ("llama-tied", strip),
        ("llama", add_old_buffers),
        ("gemma3", add_old_buffers),
        ("gpt2", add_old_buffers),
        ("mixtral", lambda w: None),
    ],
)
def test_what_transformers_derives_or_ignores_is_no_fault(
    family: str, edit: Callable[[Weights], object], tmp_path: Path
) -> None:
    check_weights(change(save_tiny(family, tmp_path), edit))


def test_shards_are_one_model(tmp_path: Path) -> None:
    directory = save_tiny("llama", tmp_path)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, table = sorted(weights), dict[str, str]()
    for part, chosen in (("a", names[::2]), ("b", names[1::2])):
        save_file({n: weights[n] for n in chosen}, directory / f"{part}.safetensors")
        table |= dict.fromkeys(chosen, f"{part}.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    check_weights(directory)


@pytest.mark.parametrize(
    "settings",
    [{"model_type": "of_vllm_alone"}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}],
)
def test_what_transformers_cannot_judge_is_left_to_the_engine(
    settings: dict[str, object], tmp_path: Path
) -> None:
    directory = change(save_tiny("llama", tmp_path), lambda w: prefix(w, "q."))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))
    check_weights(directory)


def test_layers_that_only_draft_are_no_fault(tmp_path: Path) -> None:
    """transformers' own lists name the layer numbers of one published depth alone."""
    settings = {
        "num_nextn_predict_layers": 1, "first_k_dense_replace": 2, "n_routed_experts": 4,
        "moe_intermediate_size": 32, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "head_dim": 64,
    }  # fmt: skip
    model = save_tiny("deepseek_v3", tmp_path, **settings)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.enorm.weight"] = torch.ones(64)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    check_weights(model)
    weights["model.layers.3.enorm.weight"] = torch.ones(64)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(StartupError, match=r"unexpected: model\.layers\.3\.enorm\.weight"):
        check_weights(model)


def test_what_the_loader_misses_stops_the_engine_too(tiny_llama: Path, tmp_path: Path) -> None:
    """Models that are not checked beforehand were served with random numbers."""
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    cpu = torch.device("cpu")
    with pytest.raises(StartupError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        PagedModel.load(tmp_path, dtype=torch.float32, device=cpu)

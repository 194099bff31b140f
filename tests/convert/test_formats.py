"""Each public format: converted, loaded by transformers, and the numbers of the original."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from coconut_serve.checkpoint.fit import FOREIGN_PREFIXES
from coconut_serve.checkpoint.manifest import Manifest, load_manifest
from coconut_serve.cli import main
from coconut_serve.convert.registry import FORMATS
from tests.convert.builders import SIZE, VOCAB, Case, load_converted
from tests.convert.layouts_fixed import coconut, superposition, text_run
from tests.convert.layouts_halting import BUILDERS, adaptive, later, plain
from tests.convert.originals import ThinkingResidual

pytestmark = pytest.mark.torch
HIDDEN = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(2))


def run(case: Case, target: Path, *flags: str) -> Manifest:
    assert main([*case.command, *flags, str(target)]) == 0
    manifest = load_manifest(target)
    assert manifest is not None
    return manifest


def field(manifest: Manifest, dotted: str) -> Any:
    value: Any = manifest.model_dump()
    for part in dotted.split("."):
        value = value[part]
    return value


def layer(part: str, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional.linear(x, weights[f"default.{part}.weight"], weights[f"default.{part}.bias"])


def norm(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    weight, bias = weights["default.norm.weight"], weights["default.norm.bias"]
    return functional.layer_norm(x, weight.shape, weight, bias)


def apply_saved(kind: str, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """What each type of adapter means, from the saved tensors."""
    first = layer("linear_1", weights, x)
    match kind:
        case "linear_ln":
            return norm(weights, first)
        case "linear_rms":
            weight, bias = weights["default.norm.weight"], weights["default.norm.bias"]
            return functional.rms_norm(first, weight.shape, weight) + bias
        case "mlp":
            return layer("linear_2", weights, functional.gelu(first))
        case "mlp_ln":
            return norm(weights, layer("linear_2", weights, functional.gelu(first)))
        case _:
            assert kind == "gaussian_head"
            inner = norm(weights, layer("linear_2", weights, functional.gelu(first)))
            return layer("mean", weights, inner)


def test_server_knows_how_names_of_each_format_begin() -> None:
    """It says `convert` to whoever serves such a checkpoint, and cannot ask the tool above it."""
    marks = {mark for each in FORMATS for mark in each.marks if mark.endswith(".")}
    assert set(FOREIGN_PREFIXES) == marks


@pytest.mark.parametrize("name", BUILDERS)
@torch.inference_mode()
def test_format_converts_with_the_numbers_of_the_original(name: str, tmp_path: Path) -> None:
    """Logits of the unmerged original, adapter outputs of the original's own module, manifest."""
    case = BUILDERS[name](tmp_path)
    manifest = run(case, tmp_path / "out")
    for dotted, expected in case.manifest.items():
        assert field(manifest, dotted) == expected, dotted

    ids = torch.arange(3, 15).unsqueeze(0) % 40
    model = load_converted(tmp_path / "out")
    torch.testing.assert_close(model(ids).logits, case.model(ids).logits, atol=2e-5, rtol=1e-4)

    file = tmp_path / "out" / "latent/adapter.safetensors"
    assert file.exists() == (case.adapter is not None)
    if case.adapter is None or isinstance(case.adapter, ThinkingResidual):
        return
    weights = load_file(file)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    kind = manifest.adapters["default"].type
    expected = case.adapter(HIDDEN)
    torch.testing.assert_close(apply_saved(kind, weights, HIDDEN), expected, atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_hrpo_gate_has_the_numbers_of_the_original(tmp_path: Path) -> None:
    case = BUILDERS["hrpo"](tmp_path)
    run(case, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "latent/adapter.safetensors")
    token, soft = HIDDEN, HIDDEN.flip(0)
    r = layer("gate_r", weights, token).sigmoid()
    i = layer("gate_i", weights, token).sigmoid()
    a = torch.exp(-8 * functional.softplus(-weights["default.lambda"]) * r)
    gated = a * token + (1 - a * a + 1e-8).sqrt() * (i * soft)
    assert case.adapter is not None
    torch.testing.assert_close(gated, case.adapter(token, soft))


@torch.inference_mode()
def test_colar_keeps_the_deviation_head(tmp_path: Path) -> None:
    case = BUILDERS["colar"](tmp_path)
    run(case, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "latent/adapter.safetensors")
    inner = norm(
        weights, layer("linear_2", weights, functional.gelu(layer("linear_1", weights, HIDDEN)))
    )
    policy: Any = case.adapter
    torch.testing.assert_close(layer("log_std", weights, inner), policy.log_std(policy.fc(HIDDEN)))


def test_directory_holds_tokenizer_report_and_provenance(tmp_path: Path) -> None:
    case = coconut(tmp_path)
    manifest = run(case, tmp_path / "out")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {
        "config.json", "model.safetensors", "generation_config.json", "latent_config.json",
        "convert_report.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    report = json.loads((tmp_path / "out" / "convert_report.json").read_text())
    assert "embedding.weight" in report["dropped"]
    assert "lm_head.weight" in report["dropped"]
    assert report["used"]["transformer.wte.weight"] == "model.safetensors"
    made = manifest.provenance
    assert made["source"] == "checkpoint_33"
    assert len(made["sha256"]["checkpoint_33"]) == 64
    assert made["format"] == "COCONUT"
    assert made["base"] == {"source": "gpt2", "sha256": {}}, "of the base, only settings were read"
    assert made["converter"].startswith("coconut-serve ")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == VOCAB + 3
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")], "no partial directory"


def test_report_is_printed_with_what_was_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(BUILDERS["simcot-codi"](tmp_path), tmp_path / "out")
    printed = capsys.readouterr().out
    assert "format: CODI" in printed
    assert "pj_in.weight" in printed
    assert "training decoder" in printed
    assert "model.layers.*.self_attn.q_proj.lora_A" in printed
    assert "6 steps assumed" in printed


def test_published_steps_are_assumed_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = coconut(tmp_path)
    case.flags = ()
    assert run(case, tmp_path / "out").steps == 6
    assert "6 steps assumed (c_thought 2 x stage 3, GSM8K)" in capsys.readouterr().out
    case.flags = ("--steps", "9")
    assert run(case, tmp_path / "out2").steps == 9


def test_superposition_gets_a_tokenizer_of_its_symbols(tmp_path: Path) -> None:
    from coconut_serve.checkpoint.tokenizer import load_tokenizer

    run(superposition(tmp_path), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer is not None
    ids = tokenizer.encode("3 4 | 4 7 [Q] 7 9 [R] 3", add_special_tokens=True)
    assert ids == [38, 3, 4, 34, 4, 7, 35, 7, 9, 36, 3]
    assert tokenizer.eos_token_ids == (38,)
    assert tokenizer.decode([7, 37], skip_special_tokens=False) == "7 [A]"


@torch.inference_mode()
def test_adalr_rows_kept_apart_for_lora_go_back(tmp_path: Path) -> None:
    """lora_mode: the special tokens' rows are modules of their own, and zero in the embedding."""
    case = adaptive(tmp_path, None, lora_mode=True)
    file = case.source / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    rows = state["_base_model.model.embed_tokens.weight"]
    names = {"start": 120, "end": 121, "continue": 122, "stop": 123}
    for name, row in names.items():
        state[f"_{name}_embed.weight"] = rows[row : row + 1].clone()
        rows[row] = 0
    save_file(state, file)
    run(case, tmp_path / "out")
    ids = torch.tensor([[5, 120, 121]])
    logits = load_converted(tmp_path / "out")(ids).logits
    torch.testing.assert_close(logits, case.model(ids).logits)


@torch.inference_mode()
def test_tied_pair_saved_under_the_heads_name_is_read(tmp_path: Path) -> None:
    """Safetensors keeps the first name of a tied pair, which is the head's."""
    case = BUILDERS["codi"](tmp_path)
    state = torch.load(case.source / "pytorch_model.bin", weights_only=True)
    del state["codi.base_model.model.transformer.wte.weight"]
    (case.source / "pytorch_model.bin").unlink()
    save_file(state, case.source / "model.safetensors")
    run(case, tmp_path / "out")
    ids = torch.tensor([[5, VOCAB + 1, VOCAB + 2]])
    logits = load_converted(tmp_path / "out")(ids).logits
    torch.testing.assert_close(logits, case.model(ids).logits, atol=2e-5, rtol=1e-4)


def test_later_file_of_the_older_layout_is_read(tmp_path: Path) -> None:
    case = later(tmp_path)
    file = case.source / "model.safetensors"
    save_file({n.replace("net.3", "net.2"): t.clone() for n, t in load_file(file).items()}, file)
    assert run(case, tmp_path / "out").adapters["default"].type == "mlp"


def test_dtype_is_kept_or_changed(tmp_path: Path) -> None:
    case = plain(tmp_path, "latent_sft", 10)
    run(case, tmp_path / "out", "--dtype", "bfloat16", "--top-k", "7")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    manifest = load_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.distribution.mixture["top_k"] == 7


def test_base_file_without_the_models_prefix_is_understood(tmp_path: Path) -> None:
    """The hub's GPT-2 has `wte.weight`, `h.0.attn.bias`: no prefix, and buffers."""
    case = text_run(tmp_path)
    state = torch.load(case.source, weights_only=True)
    bare = {k.removeprefix("transformer."): v for k, v in state.items() if k != "lm_head.weight"}
    torch.save(bare | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, case.source)
    run(case, tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    logits = load_converted(tmp_path / "out")(ids).logits
    torch.testing.assert_close(logits, case.model(ids).logits)

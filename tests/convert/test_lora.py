"""LoRA's scale and layouts, one by one; whole models are in test_formats.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from coconut_serve.convert.lora import merge, scaling_of, split
from coconut_serve.convert.report import Report
from coconut_serve.convert.source import read_source
from coconut_serve.errors import StartupError

pytestmark = pytest.mark.torch
A = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
B = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def tiny(model_type: str, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))


def tiny_gpt2() -> Any:
    return tiny("gpt2", vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 2, "lora_alpha": 8, "rank_pattern": {"attn.c_proj": 4}}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"h.0.attn.c_proj": 12}}, 3.0),
    ],
)
def test_scale_is_what_the_adapter_config_says(settings: dict[str, Any], expected: float) -> None:
    """Square weights of GPT-2 are transposed, too: no shape tells that."""
    model, module = tiny_gpt2(), "transformer.h.0.attn.c_proj"
    names = f"base_model.model.{module}.lora_"
    adapted = split({f"{names}A.weight": A, f"{names}B.weight": B})
    scaling = scaling_of(settings, adapted, None)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    after = merge(model, before, adapted, scaling, Report())
    delta = after[f"{module}.weight"] - before[f"{module}.weight"]
    torch.testing.assert_close(delta, expected * (B @ A).T, atol=1e-5, rtol=0)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [f"{module}.weight"]


def test_published_scale_needs_the_published_rank() -> None:
    name = "model.layers.0.q_proj.lora_"
    published = {
        f"{name}A.default.weight": A.repeat(32, 1),
        f"{name}B.default.weight": B.repeat(1, 32),
    }
    assert scaling_of({}, split(published), None).of("q_proj", 128) == 0.25
    other = split({f"{name}A.default.weight": A, f"{name}B.default.weight": B})
    with pytest.raises(StartupError, match="give --lora-alpha"):
        scaling_of({}, other, None)
    assert scaling_of({}, other, 8).of("q_proj", 4) == 2.0


def test_embedding_lora_is_merged() -> None:
    """PEFT computes an embedding's delta as (B @ A) transposed."""
    model = tiny_gpt2()
    a = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    name = "base_model.model.transformer.wte.lora_embedding_"
    adapted = split({f"{name}A": a, f"{name}B": B})
    before = dict(model.state_dict())
    after = merge(
        model, before, adapted, scaling_of({"r": 4, "lora_alpha": 4}, adapted, None), Report()
    )
    delta = after["transformer.wte.weight"] - before["transformer.wte.weight"]
    torch.testing.assert_close(delta, (B @ a).T, atol=1e-5, rtol=0)


def test_merging_keeps_the_dtype_and_computes_in_float32() -> None:
    model, module = tiny_gpt2().bfloat16(), "transformer.h.0.attn.c_proj"
    adapted = split(
        {f"{module}.lora_A.weight": A.bfloat16(), f"{module}.lora_B.weight": B.bfloat16()}
    )
    before = dict(model.state_dict())
    after = merge(
        model, before, adapted, scaling_of({"r": 4, "lora_alpha": 4}, adapted, None), Report()
    )
    weight = after[f"{module}.weight"]
    assert weight.dtype == torch.bfloat16
    exact = before[f"{module}.weight"].float() + (B.bfloat16().float() @ A.bfloat16().float()).T
    torch.testing.assert_close(weight, exact.bfloat16())


def test_saved_modules_replace_the_originals() -> None:
    """Both ways in which PEFT has named modules_to_save; the untrained copy is not taken."""
    state = {
        "base_model.model.lm_head.modules_to_save.default.weight": A,
        "base_model.model.lm_head.original_module.weight": B,
        "base_model.model.model.embed_tokens.weight": B,
    }
    adapted = split(state)
    assert adapted.plain.keys() == {"lm_head.weight", "model.embed_tokens.weight"}
    assert adapted.plain["lm_head.weight"] is A
    assert not adapted.factors


def test_empty_and_missing_settings_are_the_same(tmp_path: Path) -> None:
    save_file({"x": A}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("")
    (tmp_path / "config.json").write_text("")
    read = read_source(tmp_path)
    assert read.config == read.adapter_config == {}
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(StartupError, match="must hold one JSON object"):
        read_source(tmp_path)

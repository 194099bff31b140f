"""Checkpoints that end thinking by themselves or feed mixtures, and the table of all layouts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tests.convert.builders import (
    LLAMA_TARGETS,
    SIZE,
    VOCAB,
    Case,
    adapter_state,
    grown,
    lora_on,
    make_base,
    prefixed,
    seeded,
    untied,
    write_adapter,
    write_model,
    write_tokenizer,
)
from tests.convert.layouts_fixed import (
    coconut,
    codi,
    codi_no_norm,
    codi_peft,
    latent_tts_coconut,
    latent_tts_codi,
    simcot_coconut,
    simcot_codi,
    superposition,
    text_run,
    tts_settings,
)
from tests.convert.layouts_multimode import multimode_coconut, multimode_codi, pause_coconut
from tests.convert.originals import (
    FilterLinear,
    FilterLinearLN,
    FilterMLP,
    LatentPolicy,
    LatentProjector,
    ThinkingResidual,
)

_COLAR: dict[str, Any] = {
    "method": "colar", "adapters.default.type": "gaussian_head", "steps": 64, "max_steps": 64,
    "halting.rule": "stop_token", "halting.test": "sampled", "prompt.add_bos": False,
    "prompt.suffix_ids": [], "prompt.speed": 5, "answer.extract": "after:Answer:",
    "prompt.template":
        "Question: {question} Let's think step by step:(Thinking speed: {speed})###",
}  # fmt: skip


def latent_tts_colar(folder: Path) -> Case:
    model = grown(make_base(folder, "llama"), VOCAB)
    head = seeded(LatentPolicy(SIZE, 48, has_std=False))
    extra = prefixed("lt_head.", head.state_dict())
    settings = tts_settings(latent_intermediate_size=48, latent_embedding_std=0.018)
    source = write_model(folder / "latent-tts-colar", model, extra, **settings)
    expected = {
        **_COLAR, "adapters.default.emb_std": 0.018, "halting.token_ids": [126],
        "prompt.end_ids": [126],
    }  # fmt: skip
    return Case(source, model, adapter=head, manifest=expected, emb_std=0.018)


def colar(folder: Path) -> Case:
    base = make_base(folder, "llama")
    write_tokenizer(base, {"###": 90})
    model = lora_on(base, ("q_proj", "v_proj"))
    head = seeded(LatentPolicy(SIZE, 48))
    lora = {k: v for k, v in model.state_dict().items() if ".lora_" in k}
    state = prefixed("llm.base_model.model.", lora) | prefixed("latent_policy.", head.state_dict())
    source = folder / "colar_best.ckpt"
    torch.save({"epoch": 3, "global_step": 100, "state_dict": state}, source)
    flags = ("--lora-alpha", "8", "--emb-std", "0.03")
    expected = {
        **_COLAR, "adapters.default.emb_std": 0.03, "halting.token_ids": [90],
        "prompt.end_ids": [90], "tokens.end.id": 90,
    }  # fmt: skip
    return Case(source, model, base, flags, head, expected, emb_std=0.03)


_FILTERS: dict[str | None, tuple[Callable[[int], nn.Module] | None, str | None]] = {
    None: (None, None),
    "linear": (FilterLinear, "linear_rms"),
    "linear_ln": (FilterLinearLN, "linear_ln"),
    "MLP": (FilterMLP, "mlp_ln"),
    "SRE": (None, None),
}


def adaptive(folder: Path, mode: str | None = "MLP", **more: Any) -> Case:
    model = grown(make_base(folder, "llama-tied"), VOCAB)
    build, kind = _FILTERS[mode]
    module = seeded(build(SIZE)) if build else None
    settings = {
        "start_token_id": 120, "end_token_id": 121, "continue_token_id": 122,
        "stop_token_id": 123, "recurrent_filter_mode": mode, "add_latent_to_end": True,
        "binary_head_temp": 2.0, "unused_token_ids": [124, 125, 126, 127], "lora_mode": False,
        **more,
    }  # fmt: skip
    source = folder / "adaLR"
    write_model(source, model, {}, _inserted_LatentThinkingModelSettings=settings)
    state = prefixed("_base_model.", untied(model))
    if module:
        state |= prefixed("recurrent_filter.", module.state_dict())
    save_file(state, source / "model.safetensors")
    expected = {
        "method": "adaptive", "tokens.start.id": 120, "tokens.end.id": 121,
        "halting.rule": "binary_rows", "halting.token_ids": [122, 123],
        "halting.temperature": 2.0, "halting.end_adds_latent": True,
        "tokens.never_emit": list(range(120, 128)), "prompt.template": "Question: {question}",
    }  # fmt: skip
    if kind:
        expected["adapters.default.type"] = kind
    if mode == "SRE":
        expected |= {"default_mode": "distribution", "distribution.slots": "latent",
                     "distribution.kind": "full", "adapters": {}}  # fmt: skip
    return Case(source, model, adapter=module, manifest=expected)


def later(folder: Path) -> Case:
    model = grown(make_base(folder, "qwen3"), VOCAB)
    projector = seeded(LatentProjector(SIZE))
    source = write_model(
        folder / "LaTER-14B",
        model,
        prefixed("latent_projector.", projector.state_dict()),
        model_type="latent_qwen3",
        architectures=["LatentQwenForCausalLM"],
        latent_projector_hidden_size=SIZE,
        latent_projector_dropout=0.1,
        discrete_attention_impl="eager",
        train_rollout_use_cache=True,
    )
    named = {"<latent_think>": 120, "</latent_think>": 121, "<think>": 122, "</think>": 123}
    write_tokenizer(source, named)
    expected = {
        "method": "later", "tokens.start.id": 120, "tokens.end.id": 121,
        "tokens.think_start.id": 122, "tokens.think_end.id": 123, "prompt.end_ids": [122],
        "halting.rule": "stop_token", "halting.token_ids": [121], "halting.test": "argmax",
        "steps": 128, "adapters.default.type": "mlp", "adapters.default.activation": "gelu",
    }  # fmt: skip
    return Case(source, model, adapter=projector, manifest=expected)


def hrpo(folder: Path) -> Case:
    base = make_base(folder, "qwen2")
    model = lora_on(base, LLAMA_TARGETS)
    gate = seeded(ThinkingResidual(SIZE))
    state = adapter_state(model) | prefixed("base_model.model.model.", gate.state_dict())
    source = write_adapter(folder / "hrpo", state)
    write_tokenizer(source, {"####": 99})
    expected = {
        "method": "hrpo", "default_mode": "distribution", "distribution.kind": "gated",
        "adapters.default.type": "gate", "halting.rule": "stop_token", "halting.token_ids": [99],
        "answer.extract": "after:####",
    }  # fmt: skip
    return Case(source, model, base, adapter=gate, manifest=expected)


def switch(folder: Path) -> Case:
    base = make_base(folder, "qwen3")
    model = lora_on(base, LLAMA_TARGETS)
    source = write_adapter(folder / "SWITCH-Phase3", adapter_state(model))
    write_tokenizer(source, {"<swi>": 118, "</swi>": 119})
    expected = {
        "method": "switch", "boundary": "model_emitted", "adapters": {},
        "tokens.start.id": 118, "tokens.end.id": 119, "halting.rule": "stop_token",
        "halting.token_ids": [119],
    }  # fmt: skip
    return Case(source, model, base, manifest=expected)


def plain(folder: Path, method: str, top_k: int) -> Case:
    model = grown(make_base(folder, "llama"), VOCAB)
    source = write_model(folder / method, model, {})
    write_tokenizer(source, {"<think>": 100, "</think>": 101})
    expected: dict[str, Any] = {
        "method": "latent_sft" if method == "latent_sft" else "none",
        "default_mode": "distribution", "distribution.top_k": top_k,
        "distribution.kind": "multiplex" if method == "multiplex" else "topk",
        "distribution.temperature": 1.0, "tokens.think_end.id": 101, "adapters": {},
    }  # fmt: skip
    return Case(source, model, flags=("--method", method), manifest=expected)


BUILDERS: dict[str, Callable[[Path], Case]] = {
    "coconut": coconut,
    "coconut-text": text_run,
    "coconut-pause": pause_coconut,
    "multimode-coconut-gpt2": lambda folder: multimode_coconut(folder, "gpt2"),
    "multimode-coconut-llama": lambda folder: multimode_coconut(folder, "llama"),
    "multimode-codi-gpt2": lambda folder: multimode_codi(folder, "gpt2"),
    "multimode-codi-llama": lambda folder: multimode_codi(folder, "llama"),
    "superposition": superposition,
    "simcot-coconut": simcot_coconut,
    "codi": codi,
    "codi-no-norm": codi_no_norm,
    "codi-peft": codi_peft,
    "simcot-codi": simcot_codi,
    "latent-tts-coconut": latent_tts_coconut,
    "latent-tts-codi": latent_tts_codi,
    "latent-tts-colar": latent_tts_colar,
    "colar": colar,
    "adaptive-mlp": adaptive,
    "adaptive-none": lambda folder: adaptive(folder, None),
    "adaptive-linear": lambda folder: adaptive(folder, "linear"),
    "adaptive-linear-ln": lambda folder: adaptive(folder, "linear_ln"),
    "adaptive-sre": lambda folder: adaptive(folder, "SRE"),
    "later": later,
    "hrpo": hrpo,
    "switch": switch,
    "latent-sft": lambda folder: plain(folder, "latent_sft", 10),
    "soft-grpo": lambda folder: plain(folder, "soft_grpo", 5),
    "multiplex": lambda folder: plain(folder, "multiplex", 3),
}

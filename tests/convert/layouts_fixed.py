"""Checkpoints that think a fixed number of steps, with the exact files and keys of each format."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tests.convert.builders import (
    GPT2_TARGETS,
    LLAMA_TARGETS,
    RANK,
    SIZE,
    VOCAB,
    Case,
    adapter_state,
    cloned,
    grown,
    make_base,
    prefixed,
    seeded,
    untied,
    write_adapter,
    write_model,
)
from tests.convert.originals import Projection, add_lora, latent_tts_projector
from tests.models import load_plain, save_tiny


def coconut(folder: Path) -> Case:
    base = make_base(folder)
    model = grown(base, VOCAB + 3)
    state = prefixed("base_causallm.", model.state_dict())
    state["embedding.weight"] = state["base_causallm.transformer.wte.weight"]
    torch.save(state, folder / "checkpoint_33")
    ids = [VOCAB, VOCAB + 1, VOCAB + 2]
    expected = {
        "method": "coconut", "default_mode": "latent", "steps": 4, "c_thought": 2,
        "tokens.start.id": ids[0], "tokens.end.id": ids[1], "tokens.latent.id": ids[2],
        "tokens.never_emit": ids, "prompt.template": "{question}\n", "adapters": {},
        "answer.extract": "after:#", "boundary": "forced", "trained_steps": [4],
    }  # fmt: skip
    flags = ("--c-thought", "2", "--stage", "2")
    return Case(folder / "checkpoint_33", model, base, flags, manifest=expected)


def text_run(folder: Path) -> Case:
    base = make_base(folder)
    model = grown(base, VOCAB)
    torch.save(cloned(model.state_dict()), folder / "checkpoint_25")
    expected = {
        "modes": ["cot"], "default_mode": "cot", "tokens.start": None, "method": "none",
        "prompt.template": "{question}\n",
    }  # fmt: skip
    return Case(folder / "checkpoint_25", model, base, manifest=expected)


def superposition(folder: Path) -> Case:
    base = save_tiny("gpt2", folder / "unused", vocab_size=40, num_attention_heads=8)
    model = grown(base, 40)
    state = prefixed("base_causallm.", model.state_dict())
    state["embedding.weight"] = state["base_causallm.transformer.wte.weight"]
    torch.save(state, folder / "checkpoint_300")
    expected: dict[str, Any] = {
        "tokens.start": None, "tokens.end.id": 37, "tokens.latent.id": 33, "steps": 4,
        "variable_steps": True, "prompt.add_bos": True, "tokens.never_emit": [31, 32, 33],
        "adapters": {},
    }  # fmt: skip
    return Case(folder / "checkpoint_300", model, manifest=expected)


def simcot_coconut(folder: Path) -> Case:
    base = make_base(folder)
    model = grown(base, VOCAB + 3)
    state = prefixed("base_causallm.", model.state_dict())
    state |= prefixed("expainable_llm.", load_plain(base).state_dict())
    state["embedding.weight"] = state["base_causallm.transformer.wte.weight"]
    source = folder / "SIM_COT-GPT2-Coconut"
    source.mkdir()
    (source / "config.json").touch()  # 0 bytes, as published
    torch.save(state, source / "checkpoint_28")
    expected = {
        "method": "simcot", "steps": 10, "c_thought": 2, "tokens.start.id": VOCAB,
        "tokens.end.id": VOCAB + 1, "adapters": {},
    }  # fmt: skip
    return Case(source, model, base, manifest=expected)


_CODI: dict[str, Any] = {
    "default_mode": "latent", "steps": 6, "tokens.pad.id": VOCAB, "tokens.start.id": VOCAB + 1,
    "tokens.end.id": VOCAB + 2, "prompt.suffix_ids": [VOCAB + 1], "prompt.end_ids": [VOCAB + 2],
    "tokens.never_emit": [VOCAB, VOCAB + 1, VOCAB + 2], "answer.extract": "last_number",
    "prompt.template": "{question}", "prompt.chat_template": False,
    "adapters.default.type": "mlp_ln", "adapters.default.activation": "gelu",
}  # fmt: skip


def _codi_model(base: Path, targets: tuple[str, ...]) -> Any:
    model = grown(base, VOCAB + 3)
    torch.manual_seed(5)
    add_lora(model, targets, RANK, 8 / RANK)
    return model.eval()


def codi(folder: Path) -> Case:
    """GPT-2 in one .bin with both tied copies, as the authors' trainer writes it."""
    base = make_base(folder)
    model = _codi_model(base, GPT2_TARGETS)
    prj = seeded(Projection(SIZE, 48))
    source = folder / "CODI-gpt2"
    source.mkdir()
    state = prefixed("codi.base_model.model.", model.state_dict())
    torch.save(state | prefixed("prj.", prj.state_dict()), source / "pytorch_model.bin")
    flags = ("--lora-alpha", "8")
    return Case(source, model, base, flags, prj, {**_CODI, "method": "codi"})


def simcot_codi(folder: Path) -> Case:
    """Llama in two safetensors shards, an empty config.json, and the training decoder."""
    base = make_base(folder, "llama")
    model = _codi_model(base, LLAMA_TARGETS)
    prj = seeded(Projection(SIZE, SIZE))
    source = folder / "SIM_COT-LLaMA3-CODI-3B"
    source.mkdir()
    (source / "config.json").touch()
    state = prefixed("codi.base_model.model.", model.state_dict())
    state |= prefixed("prj.", prj.state_dict())
    state |= prefixed("decoder.", load_plain(base).state_dict())
    state |= prefixed("pj_in.", nn.Linear(SIZE, SIZE).state_dict())
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2]}
    shards["model-00002-of-00002.safetensors"] = names[1::2]
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, source / file)
    index = {name: file for file, part in shards.items() for name in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    flags = ("--lora-alpha", "8", "--keep-eos")
    expected = {
        **_CODI, "method": "simcot", "prompt.suffix_ids": [2, VOCAB + 1],
        "prompt.end_ids": [VOCAB + 2, 2],
    }  # fmt: skip
    return Case(source, model, base, flags, prj, expected)


def codi_no_norm(folder: Path) -> Case:
    """Trained with prj_no_ln; config.json beside it, so no base is needed."""
    base = make_base(folder)
    model = _codi_model(base, GPT2_TARGETS)
    prj = seeded(Projection(SIZE, SIZE, has_norm=False))
    source = folder / "CODI-no-ln"
    source.mkdir()
    shutil.copyfile(base / "config.json", source / "config.json")
    state = prefixed("codi.base_model.model.", untied(model)) | prefixed("prj.", prj.state_dict())
    save_file(state, source / "model.safetensors")
    expected = {**_CODI, "method": "codi", "adapters.default.type": "mlp"}
    return Case(source, model, None, ("--lora-alpha", "8"), prj, expected)


def codi_peft(folder: Path) -> Case:
    base = make_base(folder, "qwen3")
    model = _codi_model(base, LLAMA_TARGETS)
    prj = seeded(Projection(SIZE, SIZE))
    state = adapter_state(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # save_embedding_layers
        state[f"base_model.model.{name}"] = model.state_dict()[name].clone()
    source = write_adapter(folder / "codi_qwen3", state)
    torch.save(cloned(prj.state_dict()), source / "prj.pt")
    # Only what the adapter holds may differ from the base.
    plain: Any = load_plain(base)
    own = {k: v for k, v in plain.state_dict().items() if "embed" not in k and "lm_head" not in k}
    layers = {n.replace(".base_layer.", "."): p for n, p in model.state_dict().items()}
    with torch.no_grad():
        for name, tensor in own.items():
            layers[name].copy_(tensor)
    return Case(source, model, base, (), prj, {**_CODI, "base_model": "someone/base"})


def tts_settings(**more: Any) -> dict[str, Any]:
    return {"latent_start_id": 125, "latent_end_id": 126, "latent_id": 127, **more}


_TTS: dict[str, Any] = {
    "tokens.start.id": 125, "tokens.end.id": 126, "tokens.latent.id": 127, "steps": 6,
    "tokens.never_emit": [125, 126, 127],
}  # fmt: skip


def latent_tts_coconut(folder: Path) -> Case:
    model = grown(make_base(folder), VOCAB)
    settings = tts_settings(architectures=["COCONUTGPT2"])
    source = write_model(folder / "latent-tts-coconut", model, {}, **settings)
    expected = {**_TTS, "method": "coconut", "prompt.template": "{question}\n", "adapters": {}}
    return Case(source, model, manifest=expected)


def latent_tts_codi(folder: Path) -> Case:
    model = grown(make_base(folder), VOCAB)
    projector = seeded(latent_tts_projector(SIZE, 48))
    extra = prefixed("projector.", projector.state_dict())
    settings = tts_settings(projector=True, projector_hidden_size=48, projector_dropout=0.0)
    source = write_model(folder / "latent-tts-codi", model, extra, **settings)
    expected = {
        **_TTS, "method": "codi", "prompt.template": "{question}",
        "adapters.default.type": "mlp_ln",
    }  # fmt: skip
    return Case(source, model, adapter=projector, manifest=expected)

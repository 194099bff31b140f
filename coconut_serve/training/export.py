"""Writes the trained demo as a directory that transformers, vLLM and this server load."""

import importlib.metadata
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save
from transformers import GenerationConfig, LlamaConfig

import coconut_serve
from coconut_serve.checkpoint.manifest import FILE_NAME, Manifest
from coconut_serve.training import evaluate
from coconut_serve.training.card import render_card
from coconut_serve.training.evaluate import SERVED_MIXTURE, Mode
from coconut_serve.training.model import CONFIG, Llama, Mixture
from coconut_serve.training.recipe import MAX_THOUGHTS
from coconut_serve.training.task import HOPS, audit_shortcuts, sample, sample_each, write_questions
from coconut_serve.training.tokenizer import save_tokenizer
from coconut_serve.training.trainer import Trainer
from coconut_serve.training.vocabulary import ANSWER, END, LATENT, START, VOCAB_SIZE

_TEST_SEED: Final = 2
_TEST_PER_HOP: Final = 500  # measured
_QUESTIONS_PER_HOP: Final = 300  # written to test.json
_AUDIT_SEED: Final = 3
_NUM_AUDITED: Final = 20_000
# From the test partition. Even without thinking, no near tie that another dtype could flip.
_EXAMPLE: Final = (
    "hanoi > seoul, quito > milan, sydney > porto, turin > sydney, turin > accra, bonn > hanoi, "
    "bonn > quito, turin > sofia, porto or milan from turin?",
    "porto",
)
_PACKAGES: Final = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def export(trainer: Trainer, directory: Path) -> None:
    """Write the model, its training record, its model card and held-out questions."""
    save_model(trainer.model, directory)
    record = training_record(trainer)
    _write_json(directory / "training.json", record)
    write_questions(directory / "test.json", _TEST_SEED, _QUESTIONS_PER_HOP)
    (directory / "README.md").write_text(render_card(record), encoding="utf-8")


def save_model(model: Llama, directory: Path) -> None:
    """Write the files needed to load and serve the model."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().cpu().contiguous() for name, w in model.weights.items()}
    (directory / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    config = LlamaConfig(**CONFIG, architectures=["LlamaForCausalLM"], dtype="float32")
    config.save_pretrained(directory)
    ids = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(directory)
    save_tokenizer(directory, CONFIG["max_position_embeddings"])
    _write_json(directory / FILE_NAME, manifest())


def manifest() -> dict[str, Any]:
    """Build the demo's latent_config.json."""
    tokens = {
        "start": {"id": START, "text": "<|start-latent|>"},
        "end": {"id": END, "text": "<|end-latent|>"},
        "latent": {"id": LATENT, "text": "<|latent|>"},
        "think_end": {"id": ANSWER, "text": "###"},
    }
    # As trained: soft tokens in the latent slots, over the whole distribution.
    unfiltered = {"top_p": 1.0, "filter_top_k": 0, "min_p": 0.0, "slots": "latent"}
    question, answer = _EXAMPLE
    prompt = {"template": "{question}", "chat_template": False}
    data = {
        "schema": 1,
        "method": "coconut",
        "modes": ["none", "cot", "latent", "distribution"],
        "default_mode": "latent",
        "tokens": tokens,
        "prompt": {**prompt, "example": question, "example_answer": answer},
        "steps": MAX_THOUGHTS,
        "trained_steps": list(range(MAX_THOUGHTS + 1)),
        "max_steps": MAX_THOUGHTS,
        "distribution": asdict(SERVED_MIXTURE) | unfiltered,
        "answer": {"extract": "last_word"},
        "provenance": {"source": "coconut-serve train demo", "license": "Apache-2.0"},
    }
    Manifest.model_validate(data)
    return data


def training_record(trainer: Trainer) -> dict[str, Any]:
    """Collect how the model was trained and its accuracies."""
    audited = (sample(np.random.default_rng(_AUDIT_SEED), h, _NUM_AUDITED, "train") for h in HOPS)
    return {
        "recipe": asdict(trainer.recipe),
        "model": dict(CONFIG),
        "parameters": sum(w.numel() for w in trainer.model.weights.values()),
        "steps": trainer.step,
        "questions_seen": trainer.step * trainer.recipe.batch_size,
        "seconds": round(trainer.seconds),
        "machine": {
            "device": str(trainer.model.device),
            "threads": torch.get_num_threads(),
            "architecture": platform.machine(),
        },
        "versions": {
            "coconut_serve": coconut_serve.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "dev_curve": trainer.curve,
        "test": {
            "seed": _TEST_SEED,
            "hops": list(HOPS),
            "per_hop": _TEST_PER_HOP,
            "accuracy": measure(trainer.model),
        },
        "shortcut_audit": {
            "per_hop": _NUM_AUDITED,
            "right": dict(zip(map(str, HOPS), map(audit_shortcuts, audited), strict=True)),
        },
    }


def measure(model: Llama) -> dict[str, list[float]]:
    """Measure accuracy on held-out questions for each number of hops, in each mode."""
    graphs = sample_each(_TEST_SEED, _TEST_PER_HOP, "test")
    return {name: evaluate.accuracies(model, graphs, mode) for name, mode in _modes().items()}


def _modes() -> dict[str, Mode]:
    modes = {"none": evaluate.DIRECT, "cot": evaluate.COT}
    for steps in range(MAX_THOUGHTS + 3):
        modes[f"latent, {steps} thought{'s' * (steps != 1)}"] = evaluate.latent(steps)
    for top_k in (1, 2, 3, SERVED_MIXTURE.top_k, 10, VOCAB_SIZE):
        mode = evaluate.distribution(MAX_THOUGHTS, Mixture(top_k=top_k))
        modes[f"distribution, {MAX_THOUGHTS} thoughts, top {top_k}"] = mode
    return modes


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

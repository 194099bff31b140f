"""What training writes is complete, and loads in transformers as it was trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from coconut_serve.checkpoint.manifest import load_manifest
from coconut_serve.checkpoint.tokenizer import load_tokenizer
from coconut_serve.checkpoint.weights import resolve_model
from coconut_serve.training import export as module
from coconut_serve.training import trainer as trainer_module
from coconut_serve.training.export import export
from coconut_serve.training.recipe import Phase, Recipe
from coconut_serve.training.task import draw, prompt_ids
from coconut_serve.training.trainer import Trainer
from tests.models import load_plain

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    directory = tmp_path_factory.mktemp("trained")
    recipe = Recipe(phases=(Phase(name="latent", steps=1),), batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "_DEV_PER_HOP", 2)
        patch.setattr(module, "_NUM_AUDITED", 100)
        patch.setattr(module, "_TEST_PER_HOP", 2)
        patch.setattr(module, "_QUESTIONS_PER_HOP", 3)
        trainer = Trainer(recipe, directory / "checkpoint")
        trainer.run()
        export(trainer, directory)
    return trainer, directory


def test_directory_is_complete(trained: tuple[Trainer, Path]) -> None:
    _, directory = trained
    assert {path.name for path in directory.iterdir()} == {
        "README.md",
        "checkpoint",
        "config.json",
        "generation_config.json",
        "latent_config.json",
        "model.safetensors",
        "test.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert resolve_model(str(directory)) == directory
    assert len(json.loads((directory / "test.json").read_text())) == 12


@torch.no_grad()
def test_transformers_gives_the_logits_that_were_trained(trained: tuple[Trainer, Path]) -> None:
    trainer, directory = trained
    ids = torch.from_numpy(prompt_ids(draw(np.random.default_rng(0), 4, 3)))
    hidden, _ = trainer.model.forward(trainer.model.embed(ids))
    plain = load_plain(directory)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(
        plain(ids).logits, trainer.model.logits(hidden), rtol=1e-5, atol=1e-5
    )


def test_manifest_names_tokens_of_the_tokenizer(trained: tuple[Trainer, Path]) -> None:
    _, directory = trained
    manifest, tokenizer = load_manifest(directory), load_tokenizer(directory)
    assert manifest is not None
    assert tokenizer is not None
    assert (manifest.method, manifest.default_mode, manifest.steps) == ("coconut", "latent", 6)
    assert manifest.trained_step_counts == list(range(7))
    for token in (manifest.tokens.start, manifest.tokens.latent, manifest.tokens.end):
        assert token is not None
        assert token.text is not None
        assert tokenizer.find_id(token.text) == token.id
    assert tokenizer.eos_token_ids == (2,)
    assert not tokenizer.has_chat_template


def test_shipped_manifest_is_what_export_writes() -> None:
    shipped = json.loads((resolve_model("demo") / "latent_config.json").read_text())
    assert shipped == module.manifest()
    prompt = shipped["prompt"]
    tokenizer = load_tokenizer(resolve_model("demo"))
    assert tokenizer is not None
    unknown = tokenizer.unknown_token_id
    assert unknown is not None
    assert unknown not in tokenizer.encode(prompt["example"], add_special_tokens=True)
    assert unknown in tokenizer.encode("hi", add_special_tokens=True)


def test_tokenizer_needs_no_code_of_ours(trained: tuple[Trainer, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[1])
    assert tokenizer("Oslo > Rome?").input_ids == [1, 10, 11]
    assert tokenizer.decode([1, 10, 11, 6, 10], skip_special_tokens=True) == "oslo rome, oslo"
    assert len(tokenizer) == load_plain(trained[1]).config.vocab_size


def test_record_and_card_tell_how_it_was_made(trained: tuple[Trainer, Path]) -> None:
    _, directory = trained
    record = json.loads((directory / "training.json").read_text())
    assert record["recipe"]["seed"] == 0
    assert record["steps"] == 1
    assert record["questions_seen"] == 2
    assert record["dev_curve"][-1]["step"] == 1
    assert {"torch", "transformers", "coconut_serve"} <= set(record["versions"])
    assert {len(row) for row in record["test"]["accuracy"].values()} == {4}
    card = (directory / "README.md").read_text()
    assert "{" not in card
    assert "| latent, 6 thoughts | " in card
    assert "not COCONUT as published" in card

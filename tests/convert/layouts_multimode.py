"""COCONUT and CODI trained for several modes, and COCONUT trained with one vector in every slot.

Layouts of connordilgren/are-lrms-easily-interpretable (src_coconut_multimode/coconut.py and run.py,
src_codi_multimode/src/model.py and train.py) and bmarti44/research-pipeline (coconut.py).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.convert.builders import (
    GPT2_TARGETS,
    LLAMA_TARGETS,
    RANK,
    SIZE,
    VOCAB,
    Case,
    cloned,
    grown,
    make_base,
    prefixed,
    seeded,
    write_tokenizer,
)
from tests.convert.originals import Projection, add_lora

EOT = 100  # Llama's <|eot_id|>
BEGIN, END = VOCAB, VOCAB + 1  # <|bocot|>, <|eocot|>
QUESTION = [5, 6, 7, 8, 9]
_FAMILIES = {"gpt2": "gpt2", "llama": "llama-tied"}


def _base(folder: Path, family: str) -> Path:
    base = make_base(folder, _FAMILIES[family])
    if family == "llama":
        write_tokenizer(base, {"<|eot_id|>": EOT})
    return base


@torch.inference_mode()
def _teach_the_end(model: Any, turn: list[int]) -> None:
    """Let `<|eocot|>` be likeliest after some words of the question's thought.

    Its row becomes a little more than that of the word said there and not before.
    """
    ids = [*QUESTION, *turn, BEGIN]
    said: list[int] = []
    while len(said) < 3 or said[-1] in said[:-1]:
        assert len(said) < 20, "no new word: another seed"
        said.append(int(model(torch.tensor([ids + said])).logits[0, -1, :BEGIN].argmax()))
    rows = model.get_input_embeddings().weight
    rows[END] = 1.05 * rows[said[-1]]


def turn_of(family: str) -> list[int]:
    return [EOT] if family == "llama" else []


def _expected(family: str, never_emit: list[int]) -> dict[str, Any]:
    turn = turn_of(family)
    return {
        "modes": ["none", "cot", "latent", "distribution"], "default_mode": "latent",
        "tokens.start": {"id": BEGIN, "text": "<|bocot|>"},
        "tokens.think_start": {"id": BEGIN, "text": "<|bocot|>"},
        "tokens.end": {"id": END, "text": "<|eocot|>"},
        "tokens.think_end": {"id": END, "text": "<|eocot|>"},
        "tokens.never_emit": never_emit, "prompt.suffix_ids": [*turn, BEGIN],
        "prompt.end_ids": [END], "steps": 6, "trained_steps": [6],
        "prompt.mode_suffix_ids": {
            "none": [*turn, END], "cot": [*turn, BEGIN], "distribution": [*turn, BEGIN],
        },
    }  # fmt: skip


def multimode_coconut(folder: Path, family: str) -> Case:
    """The wrapper looks the embedding up, so its state dict has no copy; the tied head is there."""
    base = _base(folder, family)
    model = grown(base, VOCAB + 3)
    _teach_the_end(model, turn_of(family))
    torch.save(prefixed("base_causallm.", model.state_dict()), folder / "checkpoint_41")
    expected = {
        **_expected(family, [BEGIN, VOCAB + 2]), "method": "coconut", "tokens.latent.id": VOCAB + 2,
        "c_thought": 1, "prompt.template": "{question}\n", "answer.extract": "after:#",
        "adapters": {},
    }  # fmt: skip
    flags = ("--method", "multimode")
    return Case(folder / "checkpoint_41", model, base, flags, manifest=expected)


def multimode_codi(folder: Path, family: str) -> Case:
    """Two rows are added, not three: padding is the end-of-sequence token."""
    base = _base(folder, family)
    model = grown(base, VOCAB + 2)
    torch.manual_seed(5)
    add_lora(model, GPT2_TARGETS if family == "gpt2" else LLAMA_TARGETS, RANK, 8 / RANK)
    _teach_the_end(model.eval(), turn_of(family))
    prj = seeded(Projection(SIZE, SIZE))
    source = folder / "best_checkpoint"
    source.mkdir()
    state = prefixed("codi.base_model.model.", model.state_dict())
    torch.save(state | prefixed("prj.", prj.state_dict()), source / "pytorch_model.bin")
    expected = {
        **_expected(family, [BEGIN]), "method": "codi", "prompt.template": "{question}",
        "tokens.pad": None, "adapters.default.type": "mlp_ln",
        "answer.extract": "after:The answer is:",
    }  # fmt: skip
    return Case(source, model, base, ("--lora-alpha", "8"), prj, expected)


class Constant(nn.Module):
    """One vector, whatever the hidden state."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.vector = nn.Parameter(vector)

    def forward(self, x: Tensor) -> Tensor:
        return self.vector.expand_as(x)


def pause_coconut(folder: Path) -> Case:
    """COCONUT's state dict and `pause_embedding`, fed in place of each hidden state."""
    base = make_base(folder)
    model = grown(base, VOCAB + 3)
    pause = torch.randn(SIZE, generator=torch.Generator().manual_seed(4))
    state = prefixed("base_causallm.", model.state_dict())
    state["embedding.weight"] = state["base_causallm.transformer.wte.weight"]
    torch.save(state | cloned({"pause_embedding": pause}), folder / "checkpoint_50")
    expected = {
        "method": "coconut", "source": "constant", "default_mode": "latent", "adapters": {},
        "tokens.latent.id": VOCAB + 2, "tokens.never_emit": [VOCAB, VOCAB + 1, VOCAB + 2],
    }  # fmt: skip
    return Case(folder / "checkpoint_50", model, base, manifest=expected, fed=Constant(pause))

"""What the synthetic checkpoints of layouts_fixed.py and layouts_halting.py are built from.

A Case keeps the original's modules too (LoRA unmerged, adapter as its authors build it): they are
what the converted directory is compared with.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.convert.originals import add_lora
from tests.models import load_plain, save_tiny

SIZE, VOCAB, RANK = 64, 128, 4
GPT2_TARGETS = ("c_attn", "c_proj", "c_fc")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Case:
    """A checkpoint on disk and the original's modules."""

    source: Path
    model: Any  # the causal language model as the original runs it
    base: Path | None = None
    flags: tuple[str, ...] = ()
    adapter: nn.Module | None = None
    manifest: dict[str, Any] = field(default_factory=dict)  # by dotted name: what must be there
    emb_std: float = 1.0
    fed: nn.Module | None = None  # from hidden state to next input, where no adapter is written

    @property
    def command(self) -> list[str]:
        """The command line without DST."""
        base = ["--base", str(self.base)] if self.base else []
        return ["convert", str(self.source), *base, *self.flags]


def seeded(module: nn.Module, seed: int = 11) -> nn.Module:
    """Give weights values that matter, norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def write_tokenizer(directory: Path, named: dict[str, int], size: int = VOCAB) -> None:
    """A tokenizer of words w0, w1, ...; some ids have a name, and stand alone."""
    texts = {i: f"w{i}" for i in range(size)} | {i: text for text, i in named.items()}
    tokenizer = Tokenizer(WordLevel({text: i for i, text in texts.items()}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in named])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def make_base(folder: Path, family: str = "gpt2", **overrides: Any) -> Path:
    """A base model's directory."""
    directory = save_tiny(family, folder / "base", **overrides)
    write_tokenizer(directory, {})
    return directory


def grown(base: Path, rows: int) -> Any:
    """The base with a resized embedding and other weights: what training made of it."""
    model: Any = load_plain(base)
    if rows > model.config.vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def cloned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in cloned(state).items()}


def untied(model: Any) -> dict[str, Tensor]:
    """A state dict without the tied head, as safetensors files are saved."""
    state = cloned(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return state


def write_model(directory: Path, model: Any, extra: dict[str, Tensor], **settings: Any) -> Path:
    """A Hugging Face directory with more settings and tensors than its class knows."""
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **settings}))
    save_file(untied(model) | cloned(extra), directory / "model.safetensors")
    return directory


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What PEFT saves of a LoRA model: without the adapter's name."""
    state = {k: v for k, v in cloned(model.state_dict()).items() if ".lora_" in k}
    return {f"base_model.model.{name.replace('.default', '')}": t for name, t in state.items()}


def lora_on(base: Path, targets: tuple[str, ...]) -> Any:
    """The base model with LoRA beside its weights, as it runs before merging."""
    model: Any = load_plain(base)
    torch.manual_seed(5)
    add_lora(model, targets, RANK, 8 / RANK)
    return model.eval()


def write_adapter(directory: Path, state: dict[str, Tensor], **settings: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "fan_in_fan_out": False}
    config |= {"base_model_name_or_path": "someone/base"}
    (directory / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    save_file(state, directory / "adapter_model.safetensors")
    return directory


def load_converted(directory: Path) -> Any:
    """transformers' own model of a converted directory, which must have each tensor it needs."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval()

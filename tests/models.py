"""Tiny seeded models of many families, and the slow, obvious loops they are checked against."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 128
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What each family adds to the common settings; the names are the tests' parameters.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-multihead": {"model_type": "llama", "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 8},
    "gemma": {"model_type": "gemma"},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 8,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi": {"model_type": "phi"},
    "phi3": {"model_type": "phi3"},
    "gpt2": {"model_type": "gpt2"},
    "gpt_neox": {"model_type": "gpt_neox"},
    "opt": {"model_type": "opt"},
    "olmo2": {"model_type": "olmo2"},
    "granite": {
        "model_type": "granite",
        "logits_scaling": 4.0,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
    },
    "cohere": {"model_type": "cohere", "logit_scale": 0.25},
    "smollm3": {"model_type": "smollm3"},
    "starcoder2": {"model_type": "starcoder2"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
_RENAMED = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    "bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "opt": {"intermediate_size": "ffn_dim"},
}


def save_tiny(family: str, folder: Path, **overrides: Any) -> Path:
    """Write a seeded random model; weights large enough that greedy choices vary."""
    settings = {**_COMMON, **FAMILIES.get(family, {"model_type": family}), **overrides}
    model_type = settings.pop("model_type")
    for old, new in _RENAMED.get(model_type, {}).items():
        settings[new] = settings.pop(old)
    if model_type == "opt":
        settings["word_embed_proj_dim"] = 64
    if model_type in ("gpt2", "bloom", "opt", "gpt_neox"):
        settings.pop("num_key_value_heads")
        settings.pop("head_dim")
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.15)
    directory = folder / family
    model.save_pretrained(directory)
    return directory


def write_with_latent(
    source: Path, target: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]
) -> None:
    """Write a model again with adapter weights and the manifest that declares them."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / "latent").mkdir()
    save_file(tensors, target / "latent" / "adapter.safetensors")
    (target / "latent_config.json").write_text(json.dumps(manifest))


def with_projection(source: Path, target: Path) -> tuple[Path, nn.Module]:
    """Write a model again with a random projection of CODI's kind, and return that too."""
    size = json.loads((source / "config.json").read_text())["hidden_size"]
    torch.manual_seed(13)
    first, second, norm = nn.Linear(size, 48), nn.Linear(48, size), nn.LayerNorm(size)
    parts = {"linear_1": first, "linear_2": second, "norm": norm}
    tensors = {
        f"default.{name}.{key}": value.detach().clone()
        for name, module in parts.items()
        for key, value in module.state_dict().items()
    }
    manifest = {
        "schema": 1, "method": "codi", "modes": ["none", "cot", "latent", "distribution"],
        "adapters": {"default": {"type": "mlp_ln"}}, "steps": 4, "boundary": "none",
    }  # fmt: skip
    write_with_latent(source, target, tensors, manifest)
    return target, nn.Sequential(first, nn.GELU(), second, norm)


def load_plain(directory: Path) -> PreTrainedModel:
    """transformers' own model, float32, eager attention: shares no code with ours."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def generate(
    model: PreTrainedModel, prompt: Sequence[int], max_tokens: int, eos: int | None = None
) -> list[int]:
    """transformers' own greedy generate; the end token is part of what it returns."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=eos,
        pad_token_id=0,
    )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


@torch.inference_mode()
def reference(
    model: PreTrainedModel,
    prompt: list[int],
    max_tokens: int,
    *,
    mode: str = "none",
    steps: int = 0,
    end: tuple[int, ...] = (),
    top_k: int = 10,
    eos: int | None = None,
    adapter: Callable[[Tensor], Tensor] = lambda hidden: hidden,
    given: Sequence[Tensor] = (),
) -> tuple[list[int], list[Tensor]]:
    """Greedy generation that recomputes the whole sequence at each position.

    The first steps feed what is `given`.

    Returns:
        Answer tokens, and the vectors fed while thinking.
    """
    embed = model.get_input_embeddings()
    inputs = embed(torch.tensor([prompt]))  # [1, length, hidden_size]
    fed: list[Tensor] = []

    def feed(row: Tensor) -> None:
        nonlocal inputs
        inputs = torch.cat([inputs, row.reshape(1, 1, -1)], dim=1)

    def forward() -> tuple[Tensor, Tensor]:
        out = model(inputs_embeds=inputs, use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1][0, -1], out.logits[0, -1].float()

    for step in range(steps):
        hidden, logits = forward()
        vector = adapter(hidden) if mode == "latent" else soft_token(logits, embed, top_k)
        vector = given[step] if step < len(given) else vector
        fed.append(vector)
        feed(vector)
    for token in end:
        feed(embed(torch.tensor(token)))
    answer: list[int] = []
    while len(answer) < max_tokens:
        _, logits = forward()
        token = int(logits.argmax())
        if token == eos:
            break
        answer.append(token)
        feed(embed(torch.tensor(token)))
    return answer, fed


def soft_token(
    logits: Tensor,  # [vocab_size]
    embed: Any,
    top_k: int,
    temperature: float = 0.6,
    top_p: float = 0.95,
    filter_top_k: int = 30,
    min_p: float = 0.001,
) -> Tensor:
    """Soft Thinking's next input, written out for one row."""
    p = torch.softmax(logits / temperature, -1)
    order = p.argsort(descending=True).tolist()
    kept = [(i, float(p[i])) for i in order[:filter_top_k]]
    total = sum(w for _, w in kept)
    kept = [(i, w / total) for i, w in kept]
    nucleus, mass = [], 0.0
    for i, w in kept:
        if mass >= top_p:
            break
        nucleus.append((i, w))
        mass += w
    nucleus = [(i, w) for i, w in nucleus if w >= min_p * nucleus[0][1]][:top_k]
    total = sum(w for _, w in nucleus)
    mixed = torch.zeros(embed(torch.tensor(0)).shape[-1])
    for i, w in nucleus:
        mixed += w / total * embed(torch.tensor(i)).float()
    return mixed

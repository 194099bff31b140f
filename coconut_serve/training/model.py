"""A plain functional Llama, whose forward pass takes the mask and positions of packed branches.

Names and arithmetic are those of transformers' LlamaForCausalLM, which loads the trained weights
unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor

from coconut_serve.training.vocabulary import BOS, EOS, PAD, VOCAB_SIZE

# Arguments of transformers' LlamaConfig.
CONFIG: Final[Mapping[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
HIDDEN_SIZE: Final[int] = CONFIG["hidden_size"]
NUM_LAYERS: Final[int] = CONFIG["num_hidden_layers"]
NUM_HEADS: Final[int] = CONFIG["num_attention_heads"]
HEAD_DIM: Final[int] = CONFIG["head_dim"]
EMBEDDING: Final = "model.embed_tokens.weight"
FINAL_NORM: Final = "model.norm.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Keys and values of the positions seen so far, one tensor per layer."""

    keys: tuple[Tensor, ...]  # each [batch_size, num_heads, num_positions, head_dim]
    values: tuple[Tensor, ...]  # as keys

    @property
    def num_positions(self) -> int:
        return self.keys[0].shape[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How a thought becomes a soft token; trained with the whole vocabulary at temperature 1."""

    top_k: int = VOCAB_SIZE
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """The filled latent slots of a batch of prompts."""

    thoughts: Tensor  # [batch_size, num_thoughts, hidden_size], hidden states before mixing
    cache: Cache  # of prompt and thoughts


class Llama:
    """The demo's transformer, as a function of its weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        """Take the weights under transformers' names, without the tied `lm_head.weight`."""
        self.weights = weights
        theta: float = CONFIG["rope_parameters"]["rope_theta"]
        exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.int64).float() / HEAD_DIM
        positions = torch.arange(CONFIG["max_position_embeddings"]).float()
        angles = torch.outer(positions, 1.0 / theta**exponents).repeat(1, 2).to(self.device)
        self._cos, self._sin = angles.cos(), angles.sin()  # [max_positions, head_dim]

    @property
    def device(self) -> torch.device:
        return self.weights[EMBEDDING].device

    def embed(self, token_ids: Tensor) -> Tensor:
        """Look up embeddings: token ids [...] -> [..., hidden_size]."""
        return F.embedding(token_ids, self.weights[EMBEDDING])

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the next token: hidden states [..., hidden_size] -> [..., vocab_size]."""
        return F.linear(hidden, self.weights[EMBEDDING])

    def forward(
        self,
        inputs: Tensor,
        *,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """Run the layers and the final norm.

        Args:
            inputs: [batch_size, num_new, hidden_size].
            cache: Earlier positions, if any.
            positions: [num_new] for RoPE; None: they follow the cache.
            mask: [num_new, num_earlier + num_new] bool, what each may attend to; None: causal,
                which needs an empty cache or a single new position.

        Returns:
            Hidden states [batch_size, num_new, hidden_size], and the cache with the new positions.
        """
        num_new, num_earlier = inputs.shape[1], cache.num_positions if cache else 0
        assert mask is not None or num_new == 1 or not num_earlier
        where = slice(num_earlier, num_earlier + num_new) if positions is None else positions
        rope = self._cos[where], self._sin[where]
        keys, values = [], []
        for layer in range(NUM_LAYERS):
            earlier = (cache.keys[layer], cache.values[layer]) if cache else None
            inputs, key, value = self._layer(layer, inputs, rope, earlier, mask)
            keys.append(key)
            values.append(value)
        hidden = self._norm(FINAL_NORM, inputs)
        return hidden, Cache(keys=tuple(keys), values=tuple(values))

    def think(
        self, hidden: Tensor, cache: Cache, num_thoughts: int, mixture: Mixture | None = None
    ) -> Thinking:
        """Feed the last hidden state back, or the soft token computed from it.

        Args:
            hidden: [batch_size, hidden_size], at the last position of the cache.
            cache: Of the prompt and the start token.
            num_thoughts: Latent slots to fill.
            mixture: None feeds hidden states.
        """
        thoughts = [hidden.new_empty(len(hidden), 0, HIDDEN_SIZE)]
        for _ in range(num_thoughts):
            thoughts.append(hidden[:, None])
            fed = hidden if mixture is None else self.mix(hidden, mixture)
            out, cache = self.forward(fed[:, None], cache=cache)
            hidden = out[:, -1]
        return Thinking(thoughts=torch.cat(thoughts, dim=1), cache=cache)

    def mix(self, hidden: Tensor, mixture: Mixture) -> Tensor:
        """Average the embeddings of the likeliest tokens; [..., hidden_size], like `hidden`."""
        probs = torch.softmax(self.logits(hidden) / mixture.temperature, dim=-1)
        if mixture.top_k < VOCAB_SIZE:
            top = probs.topk(mixture.top_k, dim=-1)
            probs = torch.zeros_like(probs).scatter(-1, top.indices, top.values)
            probs = probs / probs.sum(dim=-1, keepdim=True)
        return probs @ self.weights[EMBEDDING]

    def _layer(
        self,
        layer: int,
        inputs: Tensor,
        rope: tuple[Tensor, Tensor],
        earlier: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one layer; returns its output, all keys and all values."""
        name = f"model.layers.{layer}."
        normed = self._norm(f"{name}input_layernorm.weight", inputs)
        query = _rotate(self._heads(f"{name}self_attn.q_proj.weight", normed), rope)
        key = _rotate(self._heads(f"{name}self_attn.k_proj.weight", normed), rope)
        value = self._heads(f"{name}self_attn.v_proj.weight", normed)
        if earlier is not None:
            key, value = torch.cat([earlier[0], key], 2), torch.cat([earlier[1], value], 2)
        is_causal = mask is None and query.shape[2] > 1
        mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
        mixed = mixed.transpose(1, 2).flatten(2)
        inputs = inputs + F.linear(mixed, self.weights[f"{name}self_attn.o_proj.weight"])
        normed = self._norm(f"{name}post_attention_layernorm.weight", inputs)
        gate = F.silu(F.linear(normed, self.weights[f"{name}mlp.gate_proj.weight"]))
        up = F.linear(normed, self.weights[f"{name}mlp.up_proj.weight"])
        inputs = inputs + F.linear(gate * up, self.weights[f"{name}mlp.down_proj.weight"])
        return inputs, key, value

    def _norm(self, name: str, inputs: Tensor) -> Tensor:
        return F.rms_norm(inputs, (HIDDEN_SIZE,), self.weights[name], CONFIG["rms_norm_eps"])

    def _heads(self, name: str, inputs: Tensor) -> Tensor:
        """Project to [batch_size, num_heads, num_new, head_dim]."""
        out = F.linear(inputs, self.weights[name])
        return out.view(*out.shape[:-1], NUM_HEADS, HEAD_DIM).transpose(1, 2)


def _rotate(heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE, which pairs dimension i with i + head_dim / 2."""
    first, second = heads.chunk(2, dim=-1)
    return heads * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]

"""Initial weights of training.

From plain random weights, a model this small does not learn edge lookup within minutes. The
*induction prior* supplies the two parts of an induction head, both trainable: layer 0 copies part
of the previous token into free dimensions, layer 1 attends from a place to the positions after it.
"""

import math
from typing import Final

import torch
from torch import Tensor

from coconut_serve.training.model import (
    CONFIG,
    EMBEDDING,
    FINAL_NORM,
    HEAD_DIM,
    HIDDEN_SIZE,
    NUM_HEADS,
    NUM_LAYERS,
)
from coconut_serve.training.vocabulary import VOCAB_SIZE

_SCALE: Final = 0.2  # of both embeddings and fed-back vectors
_CONSTANT: Final = 0.6  # of embedding dimension 0
_OWN: Final = slice(1, 17)  # dimensions by which layer 1 identifies a token ...
_PREVIOUS: Final = slice(17, 33)  # ... and those to which layer 0 copies the previous token's
_FAST_PAIRS: Final = 4  # RoPE pairs that distinguish neighbouring positions
_SLOW_PAIRS: Final = range(8, 16)  # RoPE pairs that hardly rotate over a prompt
_SHARPNESS: Final = 8.0  # attention score at the peak of a previous-token head
_MATCH: Final = 1.5  # gain of the comparison in layer 1


def initial_weights(seed: int, *, has_prior: bool) -> dict[str, Tensor]:
    """Draw random float32 weights, under transformers' names."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        random = torch.randn(rows, columns, generator=generator)
        weights[name] = random * (gain / math.sqrt(columns))

    embeddings = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator) * _SCALE
    weights[EMBEDDING] = embeddings
    inner, out_gain = CONFIG["intermediate_size"], 0.5 * _SCALE
    for layer in range(NUM_LAYERS):
        name = f"model.layers.{layer}."
        weights[f"{name}input_layernorm.weight"] = torch.ones(HIDDEN_SIZE)
        for projection in "qkv":
            matrix(f"{name}self_attn.{projection}_proj.weight", HIDDEN_SIZE, HIDDEN_SIZE)
        matrix(f"{name}self_attn.o_proj.weight", HIDDEN_SIZE, HIDDEN_SIZE, out_gain)
        weights[f"{name}post_attention_layernorm.weight"] = torch.ones(HIDDEN_SIZE)
        matrix(f"{name}mlp.gate_proj.weight", inner, HIDDEN_SIZE)
        matrix(f"{name}mlp.up_proj.weight", inner, HIDDEN_SIZE)
        matrix(f"{name}mlp.down_proj.weight", HIDDEN_SIZE, inner, out_gain)
    weights[FINAL_NORM] = torch.full((HIDDEN_SIZE,), _SCALE)
    if has_prior:
        _add_prior(weights, generator)
    return weights


def _add_prior(weights: dict[str, Tensor], generator: torch.Generator) -> None:
    embeddings = weights[EMBEDDING]
    embeddings[:, 0] = _CONSTANT
    embeddings[:, _PREVIOUS] = 0.0
    attention = "model.layers.0.self_attn."
    for head in (0, 1):
        _look_back(weights, attention, head, offset=head + 1)
    _copy_previous(weights[f"{attention}v_proj.weight"], weights[f"{attention}o_proj.weight"])
    _match_previous(weights, "model.layers.1.self_attn.", generator)


def _look_back(weights: dict[str, Tensor], attention: str, head: int, offset: int) -> None:
    """Make a head attend `offset` positions back, by the constant dimension rotated by RoPE."""
    constant = _CONSTANT / math.sqrt(_CONSTANT**2 + (HIDDEN_SIZE - 1) * _SCALE**2)
    constant *= math.sqrt(HIDDEN_SIZE)  # after the norm
    size = math.sqrt(_SHARPNESS * math.sqrt(HEAD_DIM) / _FAST_PAIRS) / constant
    theta = CONFIG["rope_parameters"]["rope_theta"]
    angles = offset * theta ** (-2 * torch.arange(_FAST_PAIRS) / HEAD_DIM)
    rows = head * HEAD_DIM + torch.arange(_FAST_PAIRS)
    query, key = (weights[f"{attention}{projection}_proj.weight"] for projection in "qk")
    for projection in (query, key):
        projection[head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0.0
    query[rows, 0] = size
    key[rows, 0] = size * angles.cos()
    key[rows + HEAD_DIM // 2, 0] = size * angles.sin()


def _copy_previous(value: Tensor, out: Tensor) -> None:
    """Make head 0 copy dimensions _OWN of the position it attends to into _PREVIOUS."""
    value[:HEAD_DIM] = 0.0
    out[:, :HEAD_DIM] = 0.0
    width = torch.arange(_OWN.stop - _OWN.start)
    value[width, width + _OWN.start] = 1.0
    out[width + _PREVIOUS.start, width] = 2 * _SCALE  # it gets about half of the attention


def _match_previous(weights: dict[str, Tensor], attention: str, generator: torch.Generator) -> None:
    """Make head 0 attend from a token to what followed its earlier occurrences, and copy it."""
    query, key, value, out = (weights[f"{attention}{name}_proj.weight"] for name in "qkvo")
    rows = torch.tensor([*_SLOW_PAIRS, *(pair + HEAD_DIM // 2 for pair in _SLOW_PAIRS)])
    width = torch.arange(len(rows))
    for projection, dimensions in ((query, _OWN), (key, _PREVIOUS)):
        projection[:HEAD_DIM] = 0.0
        projection[rows, width + dimensions.start] = _MATCH
    square = torch.randn(HIDDEN_SIZE, NUM_HEADS * HEAD_DIM, generator=generator)
    value.copy_(torch.linalg.qr(square).Q)
    out.copy_(_SCALE * value.T)

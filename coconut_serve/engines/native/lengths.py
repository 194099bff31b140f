"""LongRoPE by sequence, and short attention windows for the self-test.

LongRoPE (arXiv 2402.13753) uses a second set of rotary factors for all positions of a sequence that
is longer than the model's original length. Cached keys keep the factors they were computed with, so
the set is chosen by sequence, and a sequence that grows past that length is recomputed.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_NARROW = 8  # positions of windows and chunks during the self-test
_WINDOWS = ("sliding_window", "attention_chunk_size")


class LongRotary(nn.Module):
    """Rotary embeddings with factors chosen by the length of each row's sequence.

    Args:
        plain: transformers' module of type longrope, which chooses by the longest row of a batch.
    """

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.original_length: int = plain.config.rope_parameters["original_max_position_embeddings"]
        compute: Callable[..., tuple[Tensor, float]] = ROPE_INIT_FUNCTIONS["longrope"]
        device = plain.inv_freq.device
        long, _ = compute(plain.config, device, seq_len=self.original_length + 1)
        self._short = _fixed(plain, plain.original_inv_freq.to(device, copy=True))
        self._long = _fixed(plain, long)
        self.is_long: Tensor | None = None  # [num_rows] bool; None: no row is

    @classmethod
    def replace(cls, model: PreTrainedModel) -> Self | None:
        """Replace a model's rotary embeddings, if they are of type longrope.

        Raises:
            ValueError: Only some of its layers are of that type.
        """
        found = [
            (name, module.rope_type)
            for name, module in model.named_modules()
            if "longrope" in _kinds(module)
        ]
        if not found:
            return None
        if len(found) > 1 or found[0][1] != "longrope":
            raise ValueError("longrope is the rotary type of some of its layers only")
        name = found[0][0]
        parent, _, attribute = name.rpartition(".")
        rotary = cls(model.get_submodule(name))
        setattr(model.get_submodule(parent), attribute, rotary)
        return rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, [1, num_rows, dim] each, for position_ids [1, num_rows]."""
        short: tuple[Tensor, Tensor] = self._short(x, position_ids)
        if self.is_long is None:
            return short
        long: tuple[Tensor, Tensor] = self._long(x, position_ids)
        is_long = self.is_long[None, :, None]
        return torch.where(is_long, long[0], short[0]), torch.where(is_long, long[1], short[1])


def _fixed(plain: Any, inv_freq: Tensor) -> Any:
    """A copy with fixed factors; transformers never updates those of type default."""
    module = copy.deepcopy(plain)
    module.rope_type = "default"
    module.inv_freq = inv_freq
    return module


def _kinds(module: Any) -> tuple[str, ...]:
    """The rotary types of a module: none, one, or one for each type of layer."""
    kinds = getattr(module, "rope_type", ())
    return tuple(kinds.values()) if isinstance(kinds, dict) else (kinds,) if kinds else ()


@contextlib.contextmanager
def narrowed(model: PreTrainedModel) -> Iterator[None]:
    """Shorten windows and chunks of attention so that a short prompt exceeds them."""
    config = model.config.get_text_config()
    changed: list[tuple[Any, str, int]] = []
    for owner in (config, *model.modules()):
        for name in _WINDOWS:
            value = owner.__dict__.get(name)
            if isinstance(value, int) and value > _NARROW:
                changed.append((owner, name, value))
                setattr(owner, name, _NARROW)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)

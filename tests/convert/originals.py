"""The modules between hidden state and next input, as each project's own code builds them.

Written down from the layouts that docs/checkpoints.md names; no line is shared with the converter.
LoRA is kept apart, as PEFT runs it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class LoraLayer(nn.Module):
    """PEFT's wrapper: base_layer(x) + scale * B(A(x)); its state dict has PEFT's names."""

    def __init__(self, layer: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        into, out = weight.shape if isinstance(layer, Conv1D) else reversed(weight.shape)
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(into, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False)})
        nn.init.normal_(self.lora_B["default"].weight, std=0.1)  # type: ignore[arg-type]  # a weight
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        delta = self.lora_B["default"](self.lora_A["default"](x))
        out: Tensor = self.base_layer(x) + self.scale * delta
        return out


def add_lora(model: nn.Module, targets: Iterable[str], rank: int, scale: float) -> None:
    """Wrap each layer whose last name is a target."""
    names = tuple(targets)
    found = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in names]
    for name in found:
        parent, _, last = name.rpartition(".")
        setattr(
            model.get_submodule(parent), last, LoraLayer(model.get_submodule(name), rank, scale)
        )


class Projection(nn.Sequential):
    """CODI's `prj`: keys 1, 3 and ln."""

    def __init__(self, size: int, inner: int, *, has_norm: bool = True) -> None:
        super().__init__(nn.Dropout(0.0), nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size))
        if has_norm:
            self.add_module("ln", nn.LayerNorm(size))


def latent_tts_projector(size: int, inner: int) -> nn.Module:
    """LatentTTS's CODI projector: keys 1, 3 and 4."""
    return nn.Sequential(
        nn.Dropout(0.0), nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size),
        nn.LayerNorm(size),
    )  # fmt: skip


class LatentPolicy(nn.Module):
    """CoLaR's head; LatentTTS keeps its mean only."""

    def __init__(self, size: int, inner: int, *, has_std: bool = True) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, inner), nn.LayerNorm(inner)
        )
        self.mean = nn.Linear(inner, size)
        if has_std:
            self.log_std = nn.Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        """The mean, which is what is drawn at latent temperature 0."""
        mean: Tensor = self.mean(self.fc(x))
        return mean


class LatentProjector(nn.Module):
    """LaTER's projector: keys net.0 and net.3."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(size, size), nn.GELU(), nn.Dropout(0.1), nn.Linear(size, size)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class FilterLinear(nn.Module):
    """adaLR's filter `linear` and `linear_ECF`: RMSNorm, and a bias after it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear_layer = nn.Linear(size, size)
        self.norm = nn.RMSNorm(size)
        self.bias = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear_layer(x)) + self.bias
        return out


class FilterLinearLN(nn.Module):
    """adaLR's filter `linear_ln`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear_layer = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear_layer(x))
        return out


class FilterMLP(nn.Module):
    """adaLR's filter `MLP`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.input_layer = nn.Linear(size, size)
        self.output_layer = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.input_layer(x))
        out: Tensor = self.norm(self.output_layer(hidden))
        return out


class ThinkingLambda(nn.Module):
    """HRPO's vector: the residual's share as a function of the gate."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.Lambda = nn.Parameter(torch.randn(size))

    def forward(self, r: Tensor) -> Tensor:
        return torch.exp(-8.0 * nn.functional.softplus(-self.Lambda) * r)


class ThinkingResidual(nn.Module):
    """HRPO's gate between a token's embedding and the mixture's; keys as under its model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.thinking_residual_gate_r = nn.Linear(size, size)
        self.thinking_residual_gate_i = nn.Linear(size, size)
        self.thinking_residual_Lambda = ThinkingLambda(size)

    def forward(self, embeds: Tensor, residual: Tensor) -> Tensor:
        r = torch.sigmoid(self.thinking_residual_gate_r(embeds))
        i = torch.sigmoid(self.thinking_residual_gate_i(embeds))
        a: Tensor = self.thinking_residual_Lambda(r)
        out: Tensor = a * embeds + torch.sqrt(1 - a.pow(2) + 1e-8) * (i * residual)
        return out

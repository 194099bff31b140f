"""A model with one adapter of each kind, as plain torch modules and as files."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.models import write_with_latent

EMB_STD = 0.15  # of the Gaussian head


class Gaussian(nn.Module):
    """CoLaR's LatentPolicy: Linear, GELU, Linear, LayerNorm, then mean and log_std."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(size, 48), nn.Linear(48, size)
        self.norm = nn.LayerNorm(size)
        self.mean, self.log_std = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.norm(self.linear_2(nn.functional.gelu(self.linear_1(hidden))))
        return self.mean(hidden), self.log_std(hidden).exp()


class Gate(nn.Module):
    """HRPO's thinking residual: a e + sqrt(1 - a^2 + 1e-8) (i soft)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate_r, self.gate_i = nn.Linear(size, size), nn.Linear(size, size)
        self.lam = nn.Parameter(1.0 + torch.rand(size))

    def forward(self, token: Tensor, soft: Tensor) -> Tensor:
        r, i = self.gate_r(token).sigmoid(), self.gate_i(token).sigmoid()
        a = torch.exp(-8.0 * nn.functional.softplus(-self.lam) * r)
        mixed: Tensor = a * token + (1.0 - a**2 + 1e-8).sqrt() * (i * soft)
        return mixed


def make_adapters(size: int) -> dict[str, nn.Module]:
    """Random ones, always the same; each name is the kind."""
    torch.manual_seed(17)

    def mlp() -> list[tuple[str, nn.Module]]:
        linear_1, linear_2 = nn.Linear(size, 48), nn.Linear(48, size)
        return [("linear_1", linear_1), ("gelu", nn.GELU()), ("linear_2", linear_2)]

    def stack(*parts: tuple[str, nn.Module]) -> nn.Module:
        whole = nn.Sequential()
        for name, part in parts:
            whole.add_module(name, part)
        return whole

    return {
        "mlp_ln": stack(*mlp(), ("norm", nn.LayerNorm(size))),
        "mlp": stack(*mlp()),
        "linear_ln": stack(("linear_1", nn.Linear(size, size)), ("norm", nn.LayerNorm(size))),
        "gaussian_head": Gaussian(size),
        "gate": Gate(size),
    }


def with_adapters(source: Path, target: Path) -> Path:
    """Write a model again with a manifest that declares `make_adapters`."""
    made = make_adapters(json.loads((source / "config.json").read_text())["hidden_size"])
    tensors = {
        f"{name}.{'lambda' if key == 'lam' else key}": value.detach().clone()
        for name, module in made.items()
        for key, value in module.state_dict().items()
    }
    adapters = {name: {"type": name} for name in made}
    adapters["gaussian_head"]["emb_std"] = EMB_STD  # type: ignore[assignment]  # JSON
    manifest = {"schema": 1, "method": "codi", "boundary": "none", "adapters": adapters}
    write_with_latent(source, target, tensors, manifest)
    return target

"""What some checkpoints put between the hidden state and the next input.

A new kind is a line in KINDS, and a class if none here computes it. Weights are float32 and so is
the arithmetic: the result is fed back step after step, and rounding would add up.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from coconut_serve.errors import StartupError
from coconut_serve.reasoning import noise
from coconut_serve.reasoning.slots import index_of
from coconut_serve.types import AdapterSpec

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,  # exact, by erf
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


@dataclass(frozen=True, slots=True)
class Draw:
    """The randomness of the rows that an adapter works on."""

    seed: Tensor  # [num_rows] int64
    counter: Tensor  # [num_rows] int64
    temperature: Tensor  # [num_rows] float32, scales the noise; 0: none

    def normal(self, width: int) -> Tensor:
        """Draw standard normal numbers; [num_rows, width]."""
        columns = torch.arange(width, device=self.seed.device).unsqueeze(0)
        return noise.normal(self.seed, self.counter, noise.ADAPTER_STREAM, columns)


class Adapter(ABC):
    """Maps hidden states to inputs, many rows at once.

    Args:
        spec: What the manifest says.
        weights: Its tensors by name, float32: those that its kind requires, maybe others.
    """

    def __init__(self, spec: AdapterSpec, weights: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self.weights = weights

    @abstractmethod
    def __call__(self, hidden: Tensor, draw: Draw) -> Tensor:
        """Compute the next inputs; [num_rows, hidden_size] float32 -> the same."""

    def _linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return functional.linear(x, weight, bias)


class FeedForward(Adapter):
    """Linear; activation and linear; norm; a normal distribution: as far as there are tensors.

    linear and linear_ln, a LayerNorm, are of adaptive latent reasoning (arXiv 2511.21581), as is
    linear_rms (its code's filters "linear"); mlp is LaTER's (arXiv 2605.07315), mlp_ln CODI's
    projection (arXiv 2502.21074), gaussian_head CoLaR's (arXiv 2505.16552):
    next = emb_std * (mean + temperature * exp(log_std) * z), with z standard normal.
    """

    def __call__(self, hidden: Tensor, draw: Draw) -> Tensor:
        x, activate = self._linear(hidden, "linear_1"), _ACTIVATIONS[self.spec.activation]
        if "linear_2.weight" in self.weights:
            x = self._linear(activate(x), "linear_2")
        if "norm.weight" in self.weights:
            x = self._norm(x)
        if "mean.weight" not in self.weights:
            return x
        mean = self._linear(x, "mean")
        if "log_std.weight" in self.weights:
            std = self._linear(x, "log_std").exp() * draw.temperature.unsqueeze(1)
            mean = mean + std * draw.normal(mean.shape[1])
        return mean * self.spec.emb_std

    def _norm(self, x: Tensor) -> Tensor:
        scale, bias = self.weights["norm.weight"], self.weights.get("norm.bias")
        if self.spec.type != "linear_rms":
            return functional.layer_norm(x, scale.shape, scale, bias)
        normed = functional.rms_norm(x, scale.shape, scale)
        return normed if bias is None else normed + bias


class Matrix(Adapter):
    """A fixed matrix and, where `target_norm` is given, a fixed length (LatentMAS, 2511.20639)."""

    def __call__(self, hidden: Tensor, draw: Draw) -> Tensor:
        mapped: Tensor = hidden @ self.weights["matrix"]
        target = self.weights.get("target_norm")
        if target is None:
            return mapped
        scale: Tensor = target / mapped.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return mapped * scale


class Gate(Adapter):
    """Weighs the sampled token against the soft one (HRPO, arXiv 2505.18454).

    It takes part in the mixture "gated" and is no map of the hidden state.
    """

    def __call__(self, hidden: Tensor, draw: Draw) -> Tensor:
        return hidden

    def mix(self, token: Tensor, soft: Tensor) -> Tensor:
        """Compute a * e + sqrt(1 - a^2) * (i * soft) with a = exp(-8 softplus(-lambda) r).

        Args:
            token: [num_rows, hidden_size] float32, e, the embedding of the sampled token.
            soft: [num_rows, hidden_size] float32.
        """
        r, i = (self._linear(token, name).sigmoid() for name in ("gate_r", "gate_i"))
        a = torch.exp(-8.0 * functional.softplus(-self.weights["lambda"]) * r)
        mixed: Tensor = a * token + torch.sqrt(1.0 - a.square() + 1e-8) * (i * soft)
        return mixed


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of adapter, and the tensors that its file holds."""

    adapter: type[Adapter]
    layers: tuple[str, ...] = ()  # NAME.weight, which must be there, and NAME.bias
    tensors: tuple[str, ...] = ()  # others that must
    optional: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """Tensors that must be there."""
        return (*(f"{layer}.weight" for layer in self.layers), *self.tensors)

    @property
    def known(self) -> tuple[str, ...]:
        """Tensors that may be there."""
        return (*self.required, *(f"{layer}.bias" for layer in self.layers), *self.optional)


_LOG_STD = ("log_std.weight", "log_std.bias")
KINDS: dict[str, Kind] = {
    "linear": Kind(FeedForward, ("linear_1",)),
    "linear_ln": Kind(FeedForward, ("linear_1", "norm")),
    "linear_rms": Kind(FeedForward, ("linear_1", "norm")),
    "mlp": Kind(FeedForward, ("linear_1", "linear_2")),
    "mlp_ln": Kind(FeedForward, ("linear_1", "linear_2", "norm")),
    "gaussian_head": Kind(FeedForward, ("linear_1", "linear_2", "norm", "mean"), optional=_LOG_STD),
    "matrix": Kind(Matrix, tensors=("matrix",), optional=("target_norm",)),
    "gate": Kind(Gate, ("gate_r", "gate_i"), tensors=("lambda",)),
}

NO_ADAPTER = "none"
REALIGN = "realign"  # built for any model, on request


class AdapterBank:
    """The adapters of one model, by name."""

    def __init__(self, adapters: Mapping[str, Adapter] | None = None) -> None:
        self._adapters = dict(adapters or {})

    @classmethod
    def load(
        cls, directory: Path, specs: Mapping[str, AdapterSpec], device: torch.device
    ) -> "AdapterBank":
        """Read the weights that a manifest names.

        Raises:
            StartupError: A kind is unknown, a file unreadable, or a tensor missing or too much.
        """
        adapters = {}
        for name, spec in specs.items():
            if spec.type not in KINDS:
                known = ", ".join(KINDS)
                raise StartupError(f"adapters.{name}.type must be one of {known}", param="adapters")
            kind = KINDS[spec.type]
            weights = _read(directory / spec.file, name, kind)
            adapters[name] = kind.adapter(spec, {k: v.to(device) for k, v in weights.items()})
        return cls(adapters)

    def check(self, hidden_size: int) -> None:
        """Try each adapter on one row.

        Raises:
            StartupError: Its tensors do not fit each other, or a model of that size.
        """
        for name, adapter in self._adapters.items():
            device = next(iter(adapter.weights.values())).device
            row = torch.zeros(1, hidden_size, device=device)
            zero = torch.zeros(1, dtype=torch.int64, device=device)
            try:
                result = adapter(row, Draw(zero, zero, zero.float()))
                result = adapter.mix(row, row) if isinstance(adapter, Gate) else result
                fits = result.shape == row.shape
            except RuntimeError:
                fits = False
            if not fits:
                shapes = {key: list(weight.shape) for key, weight in adapter.weights.items()}
                raise StartupError(
                    f"the adapter {name!r} does not fit a model of hidden_size {hidden_size}: "
                    f"{adapter.spec.file} holds {shapes}",
                    param="adapters",
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters there are."""
        return tuple(self._adapters)

    def __getitem__(self, name: str) -> Adapter:
        return self._adapters[name]

    def add(self, name: str, adapter: Adapter) -> None:
        """Add one that was made here, not read."""
        self._adapters[name] = adapter

    def apply(self, names: tuple[str, ...], hidden: Tensor, draw: Draw) -> Tensor:
        """Turn the hidden state of each row into its next input.

        Args:
            names: For each row its adapter, or "none".
            hidden: [num_rows, hidden_size].
            draw: Of the same rows.

        Returns:
            [num_rows, hidden_size] in the dtype of `hidden`; `hidden` itself without adapters.
        """
        wanted = {name for name in names if name != NO_ADAPTER}
        if not wanted:
            return hidden
        if len(wanted) == 1 and NO_ADAPTER not in names:
            return self._adapters[names[0]](hidden.float(), draw).to(hidden.dtype)
        result = hidden.clone()
        for name in sorted(wanted):
            members = [i for i, each in enumerate(names) if each == name]
            rows = index_of(members, hidden.device)
            part = Draw(draw.seed[rows], draw.counter[rows], draw.temperature[rows])
            result[rows] = self._adapters[name](hidden[rows].float(), part).to(hidden.dtype)
        return result


def _read(path: Path, name: str, kind: Kind) -> dict[str, Tensor]:
    """Read the tensors `name.*` of a file, exactly those that the kind takes."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(f"{name}.")]  # noqa: SIM118 (no dict)
            found = {key.removeprefix(f"{name}."): file.get_tensor(key).float() for key in keys}
    except (OSError, SafetensorError) as error:
        raise StartupError(f"cannot read {path}: {error}", param="adapters") from error
    missing = [key for key in kind.required if key not in found]
    unknown = [key for key in found if key not in kind.known]
    for what, keys in (("lacks", missing), ("has an unexpected", unknown)):
        if keys:
            raise StartupError(f"{path} {what} tensor {name}.{keys[0]}", param="adapters")
    return found


def build_realign(
    rows: Iterable[tuple[Tensor, Tensor]],
    target_norm: Tensor,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Matrix:
    """Build a map from hidden states to the input space of any model, without training.

    W = (O^T O + 1e-5 I)^-1 O^T E, then the mean length of the rows of E (LatentMAS, arXiv
    2511.20639, as in its code): the ridge solution of O W = E. In float32, as it inverts.

    Args:
        rows: Of O, the output head without what some families do after it, and of E for the same
            tokens, a part of the vocabulary at a time: [num_rows, hidden_size] each. E may lack
            a factor.
        target_norm: The mean length of an embedding.
        reduce: Adds up what each rank computed from its part of the vocabulary.
    """
    sums: list[Tensor] = []
    for head, table in rows:
        o, e = head.float(), table.float()
        products = [o.T @ o, o.T @ e]
        sums = [a.add_(b) for a, b in zip(sums, products, strict=True)] if sums else products
    gram, cross = map(reduce, sums) if reduce is not None else sums
    gram.diagonal().add_(1e-5)
    weights = {"matrix": torch.linalg.solve(gram, cross), "target_norm": target_norm}
    return Matrix(AdapterSpec(type="matrix"), weights)

"""Merges LoRA (arXiv 2106.09685), as PEFT stores it, into the base weights."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from coconut_serve.convert.report import Report
from coconut_serve.errors import StartupError

PUBLISHED_RANK, PUBLISHED_ALPHA = 128, 32.0  # CODI, SIM-CoT and CoLaR, whose files omit them
_WRAPPER = "base_model.model."
_PART = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])\b.*$")
_REFUSED = {
    "lora_magnitude_vector": "DoRA",
    "trainable_tokens": "PEFT's trainable tokens",
    "lora_bias": "a LoRA bias",
    "ia3_": "IA3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """One module's delta = scale * b @ a."""

    a: Tensor  # [rank, in_features]
    b: Tensor  # [out_features, rank]
    is_embedding: bool  # a is [rank, vocab_size], b is [hidden_size, rank]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """Tensors of a PEFT model by kind, under names without PEFT's prefixes."""

    plain: dict[str, Tensor] = field(default_factory=dict)  # base weights, or their replacements
    factors: dict[str, Factors] = field(default_factory=dict)  # by module
    replaced: dict[str, Tensor] = field(default_factory=dict)  # originals of modules_to_save


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Factor of each module's delta."""

    rank: int | None  # None: taken from the tensors
    alpha: float
    is_rank_stabilised: bool = False  # alpha / sqrt(rank), arXiv 2312.03732
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def of(self, module: str, rank: int) -> float:
        """Compute the scale of one module.

        Raises:
            StartupError: The rank differs from the declared one.
        """
        declared = _matching(self.rank_pattern, module, self.rank)
        if declared is not None and declared != rank:
            raise StartupError(f"LoRA of {module} has rank {rank}, not {declared}", param="SRC")
        alpha = float(_matching(self.alpha_pattern, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def scaling_of(adapter_config: Mapping[str, Any], adapted: Adapted, alpha: float | None) -> Scaling:
    """Find the scale in adapter_config.json, else --lora-alpha, else the published values.

    Raises:
        StartupError: The adapter is not LoRA, or its scale is unknown.
    """
    if adapter_config:
        kind = adapter_config.get("peft_type", "LORA")
        if kind != "LORA" or adapter_config.get("use_dora"):
            name = "DoRA" if adapter_config.get("use_dora") else kind
            raise StartupError(
                f"adapter_config.json: {name} cannot be merged, LoRA can", param="SRC"
            )
        return Scaling(
            rank=adapter_config.get("r"),
            alpha=float(adapter_config.get("lora_alpha", 8)),
            is_rank_stabilised=bool(adapter_config.get("use_rslora")),
            rank_pattern=adapter_config.get("rank_pattern") or {},
            alpha_pattern=adapter_config.get("alpha_pattern") or {},
        )
    ranks = {pair.a.shape[0] for pair in adapted.factors.values()}
    if len(ranks) > 1:
        raise StartupError(f"LoRA ranks differ: {sorted(ranks)}", param="SRC")
    if alpha is None and ranks - {PUBLISHED_RANK}:
        raise StartupError(
            f"the LoRA rank is {ranks.pop()}, not the published {PUBLISHED_RANK}, and no "
            "adapter_config.json says alpha: give --lora-alpha",
            param="--lora-alpha",
        )
    return Scaling(rank=None, alpha=PUBLISHED_ALPHA if alpha is None else alpha)


def split(tensors: Mapping[str, Tensor], prefix: str = "") -> Adapted:
    """Split a PEFT state dict by kind of tensor.

    Args:
        tensors: Named as by PEFT or a wrapper around it.
        prefix: The wrapper's prefix, such as `codi.`; tensors without it are skipped.

    Raises:
        StartupError: A tensor is not LoRA, or half of a pair is missing.
    """
    plain: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    sides: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    for full, tensor in tensors.items():
        if not full.startswith(prefix):
            continue
        name = full.removeprefix(prefix).removeprefix(_WRAPPER)
        for word, kind in _REFUSED.items():
            if word in name:
                raise StartupError(f"{full}: {kind} cannot be merged, LoRA can", param="SRC")
        part = _PART.match(name)
        if part:
            sides.setdefault(part["module"], {})[part["side"]] = tensor
            embeddings |= {part["module"]} if part["embedding"] else set()
        elif ".original_module." in name:
            replaced[full] = tensor
        else:
            name = re.sub(r"\.modules_to_save(\.default)?", "", name)
            plain[name.replace(".base_layer.", ".")] = tensor
    factors = {}
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise StartupError(f"LoRA of {module} lacks its half A or B", param="SRC")
        factors[module] = Factors(a=pair["A"], b=pair["B"], is_embedding=module in embeddings)
    return Adapted(plain=plain, factors=factors, replaced=replaced)


def merge(
    skeleton: Any, tensors: Mapping[str, Tensor], adapted: Adapted, scaling: Scaling, report: Report
) -> dict[str, Tensor]:
    """Add each delta to its weight, in float32, and keep the weight's dtype.

    Args:
        skeleton: The architecture; distinguishes linear layers from GPT-2's transposed ones.
        tensors: Base weights under the architecture's names.
        adapted: The split adapter; its `plain` tensors are ignored.
        scaling: See `scaling_of`.
        report: Records what was merged.

    Raises:
        StartupError: A target is missing or has another shape.
    """
    merged = dict(tensors)
    modules = dict(skeleton.named_modules())
    for module, pair in adapted.factors.items():
        weight_name = f"{module}.weight"
        if module not in modules or weight_name not in tensors:
            raise StartupError(
                f"LoRA of {module}: the base model has no such weight; another base?",
                param="--base",
            )
        is_transposed = isinstance(modules[module], Conv1D) or pair.is_embedding
        delta = _delta(module, pair, tensors[weight_name], is_transposed)
        scale = scaling.of(module, pair.a.shape[0])
        weight = tensors[weight_name]
        merged[weight_name] = (weight.float() + scale * delta).to(weight.dtype)
        pair_by_name = {f"{module}.lora_A": pair.a, f"{module}.lora_B": pair.b}
        report.merge(pair_by_name, f"{weight_name}, scale {scale:g}")
        report.accounted.add(id(weight))
    return merged


def _delta(module: str, pair: Factors, weight: Tensor, is_transposed: bool) -> Tensor:
    """Multiply the factors to [out, in], or [in, out] for Conv1D and embeddings."""
    if pair.a.ndim != 2 or pair.b.ndim != 2 or pair.a.shape[0] != pair.b.shape[1]:
        shapes = f"{list(pair.a.shape)} and {list(pair.b.shape)}"
        raise StartupError(f"LoRA of {module}: factors {shapes} do not match", param="SRC")
    delta = torch.matmul(pair.b.float(), pair.a.float())
    delta = delta.T if is_transposed else delta
    if delta.shape != weight.shape:
        raise StartupError(
            f"LoRA of {module} is for a weight of {list(delta.shape)}, but the base model's is "
            f"{list(weight.shape)}: another base?",
            param="--base",
        )
    return delta

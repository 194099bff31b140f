"""Checks tensors against transformers' architecture without allocating its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from coconut_serve.convert.report import Report
from coconut_serve.errors import StartupError

_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # of older transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A model whose tensors are exactly those its architecture needs."""

    config: Any  # transformers' configuration
    tensors: dict[str, Tensor]
    vocab_size: int


def build_skeleton(config: Mapping[str, Any]) -> Any:
    """Build the architecture that a config.json names, on the meta device.

    Raises:
        StartupError: transformers has no such architecture, or the settings are wrong.
    """
    settings = {key: value for key, value in config.items() if key != "auto_map"}
    model_type = settings.pop("model_type", None)
    if not model_type:
        raise StartupError("config.json names no model_type", param="SRC")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    except (
        ValueError,
        TypeError,
        KeyError,
        ImportError,
        AttributeError,
        ZeroDivisionError,
    ) as error:
        raise StartupError(
            f"transformers cannot build the architecture {model_type!r}: {error}", param="SRC"
        ) from error


def name_of(skeleton: Any, module: Any) -> str | None:
    """Find the state dict's name of a module's weight."""
    for name, candidate in skeleton.named_modules():
        if candidate is module:
            return f"{name}.weight"
    return None


def rename(skeleton: Any, tensors: Mapping[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Rename tensors to those of the causal language model; drop buffers of older versions.

    Some hub files hold the bare decoder (`wte.weight` for `transformer.wte.weight`).
    """
    known = set(skeleton.state_dict())
    prefix = skeleton.base_model_prefix + "."
    named = {}
    for name, tensor in tensors.items():
        if name not in known and prefix + name in known:
            name = prefix + name
        if name not in known and name.endswith(_BUFFERS):
            report.drop({name: tensor}, "a buffer of an older transformers")
            continue
        named[name] = tensor
    head, embedding = head_name(skeleton), embedding_name(skeleton)
    if skeleton.config.tie_word_embeddings and head in named and embedding not in named:
        named[embedding] = named.pop(head)  # safetensors keeps the first name of a tied pair
        report.merged[head] = f"{embedding}, to which it is tied"
    return named


def head_name(skeleton: Any) -> str:
    """Find the name of the output layer's weight; empty if there is none."""
    return name_of(skeleton, skeleton.get_output_embeddings()) or ""


def embedding_name(skeleton: Any) -> str:
    """Find the name of the input embedding's weight."""
    name = name_of(skeleton, skeleton.get_input_embeddings())
    assert name is not None
    return name


def fit(config: Mapping[str, Any], tensors: Mapping[str, Tensor], report: Report) -> Fitted:
    """Check names and shapes; the embedding's rows set the vocabulary size.

    Args:
        config: The contents of config.json.
        tensors: The whole model under transformers' names.
        report: Records tied duplicates and absent tied heads.

    Raises:
        StartupError: A tensor is missing, unknown, not finite or has another shape.
    """
    skeleton = build_skeleton(config)
    tensors = rename(skeleton, tensors, report)
    embedding = embedding_name(skeleton)
    if embedding not in tensors:
        raise StartupError(f"the checkpoint has no input embedding ({embedding})", param="SRC")
    vocab_size = tensors[embedding].shape[0]
    if vocab_size != skeleton.config.vocab_size:
        skeleton = build_skeleton({**config, "vocab_size": vocab_size})
    tensors = _untie(skeleton, tensors, report)
    _check(skeleton, tensors)
    skeleton.config.architectures = [type(skeleton).__name__]
    return Fitted(config=skeleton.config, tensors=tensors, vocab_size=vocab_size)


def _untie(skeleton: Any, tensors: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Keep one copy of tied weights; if they differ, untie the model."""
    head, embedding = head_name(skeleton), embedding_name(skeleton)
    if not skeleton.config.tie_word_embeddings or not head:
        return tensors
    if head not in tensors:
        report.missing[head] = "tied to the input embedding"
        return tensors
    if torch.equal(tensors[head], tensors[embedding]):
        report.drop({head: tensors[head]}, "equal to the input embedding, to which it is tied")
        return {name: tensor for name, tensor in tensors.items() if name != head}
    skeleton.config.tie_word_embeddings = False
    report.note("the head differs from the input embedding: written untied")
    return tensors


def _check(skeleton: Any, tensors: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
    tied = {head_name(skeleton)} if skeleton.config.tie_word_embeddings else set()
    what = skeleton.config.model_type
    missing = sorted(expected.keys() - tensors.keys() - tied)
    if missing:
        raise StartupError(f"{some(missing)} of {what} missing in the checkpoint", param="SRC")
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise StartupError(f"{some(unknown)} that {what} has no place for", param="SRC")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise StartupError(
                f"{name} has shape {list(tensor.shape)}, but {what} as configured needs "
                f"{list(expected[name])}: another base model or config.json?",
                param="SRC",
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise StartupError(f"{name} has values that are not finite: damaged?", param="SRC")


def some(names: list[str]) -> str:
    """Format a count of tensors and the first few names."""
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"

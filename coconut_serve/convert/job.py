"""Input and result of a format's `convert` function."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from coconut_serve.checkpoint.tokenizer import HFTokenizer, load_tokenizer
from coconut_serve.convert.lora import Adapted, merge, scaling_of
from coconut_serve.convert.model import build_skeleton, embedding_name, head_name, rename
from coconut_serve.convert.options import Options
from coconut_serve.convert.report import Report
from coconut_serve.convert.source import Source, read_json, read_source
from coconut_serve.errors import StartupError

ADAPTER = "default"  # name of the only adapter in the manifest
MARKERS = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")  # COCONUT's, in id order


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """Result of a format's `convert`, not yet validated."""

    config: dict[str, Any]  # config.json
    tensors: dict[str, Tensor]  # under transformers' names
    manifest: dict[str, Any]  # without schema and provenance
    adapter: dict[str, Tensor] = field(default_factory=dict)  # PART.weight, without the name
    files: dict[str, str] = field(default_factory=dict)  # tokenizer files, used if there are none


class Job:
    """One conversion: the checkpoint, the options, and the base model, which is read lazily."""

    def __init__(self, source: Source, options: Options, report: Report) -> None:
        self.source = source
        self.options = options
        self.report = report
        self._base: Source | None = None
        self._tokenizer: HFTokenizer | None = None

    @property
    def base(self) -> Source:
        """The base model's weights.

        Raises:
            StartupError: --base is missing.
        """
        if self._base is None:
            self._base = read_source(self._base_path("the base model's weights"), "--base")
        return self._base

    @property
    def base_if_read(self) -> Source | None:
        """The base model; None if its weights were never needed."""
        return self._base

    def _base_path(self, what: str) -> Path:
        path = self.options.base
        if path is None:
            named = self.source.adapter_config.get("base_model_name_or_path")
            hint = f" (the checkpoint names {named})" if named else ""
            raise StartupError(
                f"{self.report.format}: {what} are not in the checkpoint: give --base DIR{hint}",
                param="--base",
            )
        if not path.is_dir():
            raise StartupError(f"--base {path} is no directory", param="--base")
        return path

    def config(self) -> dict[str, Any]:
        """Return a copy of the checkpoint's config.json, else of the base model's.

        Raises:
            StartupError: Neither has one.
        """
        if self.source.config.get("model_type"):
            return dict(self.source.config)
        return self.base_config()

    def base_config(self) -> dict[str, Any]:
        """Read the base model's config.json.

        Raises:
            StartupError: It is missing or names no model_type.
        """
        path = self._base_path("settings (config.json)") / "config.json"
        config = read_json(path)
        if not config.get("model_type"):
            raise StartupError(f"{path} is missing or names no model_type", param="--base")
        return config

    def directories(self) -> list[Path]:
        """List where to look for tokenizer and generation settings, best first."""
        base = self.options.base
        return [self.source.directory, *([base] if base is not None else [])]

    def token_id(self, text: str) -> int | None:
        """Find a token's id in --token or the tokenizer; None if neither has it."""
        given = dict(self.options.tokens)
        if text in given:
            return given[text]
        tokenizer = self.tokenizer()
        return tokenizer.find_id(text) if tokenizer else None

    def tokenizer(self) -> HFTokenizer | None:
        """Load the checkpoint's tokenizer, else the base model's."""
        for directory in self.directories():
            if self._tokenizer is None and directory.is_dir():
                self._tokenizer = load_tokenizer(directory)
        return self._tokenizer

    def need_token(self, text: str) -> dict[str, Any]:
        """Build a token's manifest entry.

        Raises:
            StartupError: Neither --token nor a tokenizer has its id.
        """
        found = self.token_id(text)
        if found is None:
            raise StartupError(
                f"{self.report.format}: no tokenizer here has {text}: give --base DIR or "
                f"--token '{text}=ID'",
                param="--token",
            )
        return {"id": found, "text": text}

    def steps(self, published: int, what: str) -> int:
        """Return --steps, or else the published count and note it in the report."""
        if self.options.steps is not None:
            return self.options.steps
        self.report.note(f"{published} steps assumed ({what}); --steps says otherwise")
        return published

    def merged(self, config: dict[str, Any], adapted: Adapted) -> dict[str, Tensor]:
        """Merge LoRA into the whole model, taking missing weights from the base.

        Weights saved beside the LoRA (a resized embedding) replace the base model's.

        Raises:
            StartupError: The base is missing or does not match.
        """
        skeleton = build_skeleton(config)
        self.report.drop(adapted.replaced, "what the base had before PEFT trained a copy")
        tensors = rename(skeleton, adapted.plain, self.report)
        lacks_base = embedding_name(skeleton) not in tensors or any(
            f"{module}.weight" not in tensors for module in adapted.factors
        )
        if lacks_base:
            base = rename(skeleton, self.base.tensors, self.report)
            if skeleton.config.tie_word_embeddings and embedding_name(skeleton) in tensors:
                base.pop(head_name(skeleton), None)
            tensors = base | tensors
        if not adapted.factors:
            return tensors
        alpha = self.options.lora_alpha
        scaling = scaling_of(self.source.adapter_config, adapted, alpha)
        return merge(skeleton, tensors, adapted, scaling, self.report)


def linear(part: str, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Rename a layer's weight and bias to an adapter's part.

    Args:
        part: `linear_1`, `norm`, ...
        tensors: The state dict that holds the layer.
        name: The layer's name in it.

    Raises:
        StartupError: The layer has no weight.
    """
    if f"{name}.weight" not in tensors:
        raise StartupError(f"the adapter's {name}.weight is missing in the checkpoint", param="SRC")
    found = {f"{part}.weight": tensors[f"{name}.weight"]}
    if f"{name}.bias" in tensors:
        found[f"{part}.bias"] = tensors[f"{name}.bias"]
    return found

"""`latent_config.json`: what a checkpoint was trained for. Imports no torch.

Unknown keys and versions are errors: ignoring what this version does not know could serve a
checkpoint wrongly.
"""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from coconut_serve.declare import settings_of
from coconut_serve.errors import InvalidRequestError, StartupError
from coconut_serve.params import MAX_STEPS, MixtureKind, MixtureParams, Source
from coconut_serve.types import AdapterSpec

FILE_NAME = "latent_config.json"

_Method = Literal[
    "coconut", "codi", "simcot", "adaptive", "colar", "later", "switch", "latent_sft", "hrpo",
    "pccot", "none",
]  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Token(_Strict):
    """A token of the vocabulary; only `id` matters, `text` is for readers."""

    id: int = Field(ge=0)
    text: str | None = None


class Tokens(_Strict):
    """Special tokens of the thinking phase."""

    start: Token | None = None  # fed before the first latent
    end: Token | None = None  # forced after the last
    latent: Token | None = None  # placeholder in training data, never an input here
    think_start: Token | None = None  # bounds of `cot` and `distribution` thinking
    think_end: Token | None = None
    pad: Token | None = None
    added: bool = False
    never_emit: list[int] = []


class Prompt(_Strict):
    """How a question becomes a prompt, and the tokens fed around a latent phase."""

    template: str | None = None  # with {question}; None: the text unchanged
    chat_template: bool = True  # chat messages go through the tokenizer's template
    add_bos: bool = True
    suffix_ids: list[int] | None = None  # appended before a latent phase; None: the start token
    end_ids: list[int] | None = None  # forced after it; None: the end token
    # For modes without latent steps: appended to the question instead of a think token.
    mode_suffix_ids: dict[str, list[int]] = {}
    speed: int | Literal["auto"] | None = None  # fills {speed} of the template (CoLaR)
    example: str | None = None  # a question that the model can answer
    example_answer: str | None = None  # part of its greedy answer in every mode


class Hidden(_Strict):
    """Which hidden state is fed back; this version supports only COCONUT's."""

    layer: Literal[-1] = -1
    norm: Literal["post_final_norm"] = "post_final_norm"
    position: Literal["last"] = "last"


class Distribution(_Strict):
    """The mixture used in training: any setting of a request's reasoning.mixture."""

    model_config = ConfigDict(extra="allow")

    slots: Literal["text", "latent"] = "text"  # latent: soft vectors replace hidden states
    kind: MixtureKind | None = None

    @property
    def mixture(self) -> dict[str, Any]:
        """The declared settings of the mixture."""
        return self.model_dump(exclude_none=True, exclude={"slots"})

    @model_validator(mode="after")
    def _check_mixture(self) -> Self:
        known = {own.asked: own.type for own in settings_of(MixtureParams).values() if own.asked}
        for name, value in self.mixture.items():
            if name not in known:
                raise ValueError(f"{name} is not known; mixtures have {', '.join(known)}")
            try:
                TypeAdapter(known[name]).validate_json(json.dumps(value), strict=True)
            except ValidationError as error:
                raise ValueError(f"{name}: {error.errors()[0]['msg']}") from None
        try:
            MixtureParams(**self.mixture)
        except InvalidRequestError as error:
            raise ValueError(error.message.removeprefix(MixtureParams.path)) from None
        return self


class Adapter(_Strict):
    """Weights between the hidden state and the next input; see reasoning/adapters.py."""

    type: str
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    file: str = "latent/adapter.safetensors"  # tensors NAME.PART.weight, NAME.PART.bias
    emb_std: float = 1.0  # gaussian_head: scale of its output


class Halting(_Strict):
    """How the checkpoint decides to end its latent phase."""

    rule: Literal["fixed", "binary_rows", "stop_token"] = "fixed"
    token_ids: list[int] = []  # binary_rows: continue, stop; stop_token: any of these
    test: Literal["argmax", "sampled"] = "argmax"
    temperature: float = 1.0
    min_steps: int = Field(default=0, ge=0)  # latents before the rule applies
    end_adds_latent: bool = False  # the end token's embedding is added to the last latent
    keeps_last: bool = False  # the latent of the halting step is still fed


class Answer(_Strict):
    """How an evaluation finds the answer in the text."""

    extract: str | None = None


class Manifest(_Strict):
    """The contents of `latent_config.json`."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    method: _Method = "none"
    modes: list[str] | None = None  # None: those that need no training
    default_mode: str | None = None
    base_model: str | None = None
    tokens: Tokens = Tokens()
    boundary: Literal["forced", "model_emitted", "none"] = "forced"
    prompt: Prompt = Prompt()
    steps: int = Field(default=6, ge=0, le=MAX_STEPS)
    trained_steps: list[int] | None = None  # None: [steps]
    max_steps: int = Field(default=64, ge=0, le=MAX_STEPS)
    c_thought: int = Field(default=1, ge=1)
    variable_steps: bool = False
    hidden: Hidden = Hidden()
    source: Source = "hidden"  # constant: trained with the latent token's embedding in every step
    adapters: dict[str, Adapter] = {}
    halting: Halting = Halting()
    distribution: Distribution = Distribution()
    answer: Answer = Answer()
    provenance: dict[str, Any] = {}

    @property
    def start_token_ids(self) -> tuple[int, ...]:
        """Tokens fed between the prompt and the first latent."""
        if self.prompt.suffix_ids is not None:
            return tuple(self.prompt.suffix_ids)
        start = self.tokens.start
        return (start.id,) if start and self.boundary == "forced" else ()

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens forced after the last latent."""
        if self.prompt.end_ids is not None:
            return tuple(self.prompt.end_ids)
        end = self.tokens.end
        return (end.id,) if end and self.boundary != "none" else ()

    @property
    def token_ids(self) -> set[int]:
        declared = (getattr(self.tokens, name) for name in Tokens.model_fields)
        suffixes = self.prompt.mode_suffix_ids.values()
        return {
            *(token.id for token in declared if isinstance(token, Token)),
            *self.start_token_ids,
            *self.end_token_ids,
            *self.halting.token_ids,
            *self.tokens.never_emit,
            *(token_id for suffix in suffixes for token_id in suffix),
        }

    @property
    def adapter_specs(self) -> dict[str, AdapterSpec]:
        """The adapters in the form that engines load."""
        return {name: AdapterSpec(**each.model_dump()) for name, each in self.adapters.items()}

    @property
    def trained_step_counts(self) -> list[int]:
        return [self.steps] if self.trained_steps is None else self.trained_steps


_NOT_YET = {
    "weights": "weights in a foreign layout; convert them first",
    "readout": "a readout decoder",
    "compat": "compatibility switches",
}


def load_manifest(directory: Path) -> Manifest | None:
    """Read a model directory's manifest; None if it has none.

    Raises:
        StartupError: The file is broken, or needs something this version does not support.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} is not readable JSON: {error}", param=FILE_NAME) from error
    if not isinstance(data, dict):
        raise StartupError(f"{path} must hold one JSON object", param=FILE_NAME)
    for key, what in _NOT_YET.items():
        if data.pop(key, None):
            raise StartupError(f"{path}: {key}: {what}: not yet supported", param=key)
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        told = first["msg"].removeprefix("Value error, ")
        raise StartupError(f"{path}: {where}: {told}", param=where) from error
    _check_parts(path, manifest)
    return manifest


def _check_parts(path: Path, manifest: Manifest) -> None:
    """Check the parts of a manifest against each other."""
    if "{speed}" in (manifest.prompt.template or "") and manifest.prompt.speed is None:
        raise StartupError(
            f"{path}: prompt.speed is needed: the template has {{speed}}", param="prompt.speed"
        )
    if manifest.source == "constant" and manifest.tokens.latent is None:
        raise StartupError(f"{path}: source constant needs tokens.latent", param="source")
    if manifest.steps > manifest.max_steps:
        raise StartupError(f"{path}: steps is more than max_steps", param="steps")

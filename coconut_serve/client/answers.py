"""What answers tell of the thinking, typed."""

import base64
import struct
from collections.abc import Mapping
from typing import Any

from openai import BaseModel


class ReasoningInfo(BaseModel):
    """How an answer was thought: with several choices, how the first was."""

    mode: str
    """The effective mode."""
    latent_steps: int
    """Steps that fed a hidden state."""
    reasoning_steps: int
    """Thinking positions of any kind."""
    forward_passes: int
    """Of the model, the prompt's included."""
    halt_reason: str | None
    """What ended thinking; None: it was not ended."""
    switches: int
    """Between tokens and vectors."""
    latent_ms: float
    """Milliseconds from the prompt to the first answer token."""
    warnings: list[str]
    """What was asked for and had no effect, and the like."""
    changed: dict[str, Any]
    """Settings that are not the model's defaults."""
    resolved: dict[str, Any] | None = None
    """With `explain`: the value and the source of every setting."""


class TopToken(BaseModel):
    """A likely token of a step."""

    token_id: int
    token: str | None
    """Its text; None: the model has no tokenizer."""
    prob: float


class TraceStep(BaseModel):
    """A thinking step: a readout of the state, not an explanation of the answer."""

    step: int
    kind: str
    """latent, distribution or token."""
    token_id: int | None
    """The text of the step; None: it has none."""
    entropy: float
    """Of the next token, in nats."""
    max_prob: float
    norm: float
    """Length of the vector that is fed next."""
    cosine: float
    """To the input before."""
    retained_mass: float
    """Probability of the tokens that are mixed; 1 for hidden states."""
    top: list[TopToken] | None = None
    """The likeliest tokens, with `trace` topk or vectors."""
    vector: str | None = None
    """What is fed, with `trace` vectors: float32, little-endian, base64; `floats` reads it."""

    @property
    def floats(self) -> tuple[float, ...]:
        """The numbers of `vector`; () without one."""
        data = base64.b64decode(self.vector or "")
        return struct.unpack(f"<{len(data) // 4}f", data)


def reasoning_info(answer: object) -> ReasoningInfo | None:
    """How a completion, response or last chunk of a stream was thought; None: it does not tell.

    Chunks tell with `stream_options={"include_usage": True}`.
    """
    told = getattr(getattr(answer, "usage", None), "reasoning", None)
    told = told or getattr(answer, "reasoning_info", None)
    return ReasoningInfo.construct(**told) if isinstance(told, Mapping) else None


def reasoning_trace(choice: object) -> list[TraceStep]:
    """The thinking steps of a choice, a response, or a chunk's choice; [] without a trace."""
    parts = (choice, *getattr(choice, "output", ()))
    return [
        TraceStep.construct(**step)
        for part in parts
        for step in getattr(part, "reasoning_trace", None) or ()
    ]

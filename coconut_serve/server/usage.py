"""Builds usage, reasoning_info, traces and logprobs of an answer."""

import base64
import struct
from collections.abc import Sequence
from typing import Any

from openai.types import CompletionUsage
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from pydantic import BaseModel, Field

from coconut_serve.reasoning.registry import Feeds, properties_of
from coconut_serve.service.generation import Generation, TokenDelta, TraceStep
from coconut_serve.service.tokenizer import Tokenizer
from coconut_serve.types import HaltReason, SequenceCounts

_OF_MODEL = ("default", "generation_config", "manifest")  # sources of unchanged settings


class ReasoningInfo(BaseModel):
    """`usage.reasoning` and `reasoning_info`: how the first choice shown was thought."""

    mode: str = Field(description="The effective mode.")
    latent_steps: int = Field(description="Steps that fed a hidden state.")
    reasoning_steps: int = Field(description="Thinking positions of any kind.")
    forward_passes: int = Field(description="Of the model, the prompt's included.")
    halt_reason: str | None = Field(description="What ended thinking; null: it was not ended.")
    switches: int = Field(description="Between tokens and vectors.")
    latent_ms: float = Field(description="Milliseconds from the prompt to the first answer token.")
    warnings: list[str] = Field(description="What was asked for and had no effect, and the like.")
    changed: dict[str, Any] = Field(description="Settings that are not the model's defaults.")
    resolved: dict[str, Any] | None = Field(
        None, description="With reasoning.explain: every setting's value and source."
    )


def reasoning_info(generation: Generation) -> dict[str, Any]:
    """The effective mode and what it did for the first choice shown; `usage` has the totals."""
    prepared = generation.prepared
    state = generation.choices[generation.shown]
    counts = state.counts
    warnings = list(prepared.resolved.warnings)
    if counts.num_reasoning_steps and not counts.num_output_tokens:
        warnings.append("no answer tokens: the model ended, or was ended, while it was thinking")
    feeds = properties_of(prepared.mode).feeds
    is_halted = state.halt_reason is not HaltReason.NONE
    info = {
        "mode": prepared.mode,
        "latent_steps": counts.num_vector_steps if feeds is Feeds.HIDDEN else 0,
        "reasoning_steps": counts.num_reasoning_steps,
        "forward_passes": counts.num_forward_passes,
        "halt_reason": state.halt_reason.label if is_halted else None,
        "switches": counts.num_switches,
        "latent_ms": round(state.thinking_seconds * 1e3, 1),
        "warnings": warnings,
        "changed": {
            name: each["value"]
            for name, each in prepared.resolved.parameters.items()
            if each["source"] not in _OF_MODEL and name != "mode"
        },
    }
    return info | {"resolved": prepared.resolved.parameters} if prepared.ask.explains else info


def usage(generation: Generation) -> CompletionUsage:
    """Sum over all choices; a prompt counts once, thinking and forced positions count as output."""
    counts = [choice.counts for choice in generation.choices]
    num_prompt = sum(len(ids) for ids in generation.prepared.prompt_token_ids)
    num_completion = sum(_num_completion(c) for c in counts)
    num_reasoning = sum(c.num_reasoning_steps for c in counts)
    num_vectors = sum(c.num_vector_steps for c in counts)
    feeds = properties_of(generation.prepared.mode).feeds
    n = generation.prepared.num_sequences
    return CompletionUsage(
        prompt_tokens=num_prompt,
        completion_tokens=num_completion,
        total_tokens=num_prompt + num_completion,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(c.num_cached_tokens for c in counts[::n])
        ),
        # openai's classes keep extra fields, but their signatures do not say so.
        completion_tokens_details=CompletionTokensDetails.model_validate(
            {
                "reasoning_tokens": num_reasoning,
                "latent_steps": num_vectors if feeds is Feeds.HIDDEN else 0,
                "distribution_steps": num_vectors if feeds is Feeds.MIXTURE else 0,
            }
        ),
        reasoning=reasoning_info(generation),  # type: ignore[call-arg]  # extra field
    )


def _num_completion(counts: SequenceCounts) -> int:
    return counts.num_output_tokens + counts.num_reasoning_steps + counts.num_forced_tokens


def trace_json(step: TraceStep, number: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """One step of `reasoning_trace`: a readout of the state, not an explanation of the answer."""
    trace = step.trace

    def text(token_id: int) -> str | None:
        return token_text(token_id, tokenizer) if tokenizer else None

    shown: dict[str, Any] = {
        "step": number,
        "kind": step.kind,
        "token_id": step.token_id,
        "entropy": trace.entropy,
        "max_prob": trace.max_prob,
        "norm": trace.norm,
        "cosine": trace.cosine,
        "retained_mass": trace.retained_mass,
    }
    if trace.top:
        shown["top"] = [{"token_id": i, "token": text(i), "prob": p} for i, p in trace.top]
    if trace.vector is not None and step.kind != "token":
        data = struct.pack(f"<{len(trace.vector)}f", *trace.vector)
        shown["vector"] = base64.b64encode(data).decode()
    return shown


def token_text(token_id: int, tokenizer: Tokenizer | None) -> str:
    r"""The text of one token, special ones included.

    As OpenAI does, "bytes:\xf0\x9f" for part of a character; "token_id:N" without a tokenizer.
    """
    if tokenizer is None:
        return f"token_id:{token_id}"
    return _text_of(tokenizer.token_bytes(token_id))


def named_logprobs(
    top: Sequence[tuple[int, float]], tokenizer: Tokenizer | None
) -> dict[str, float]:
    """Log-probabilities by text, or by id where another token has the same text."""
    named: dict[str, float] = {}
    for token_id, value in top:
        name = token_text(token_id, tokenizer)
        named[token_text(token_id, None) if name in named else name] = value
    return named


def _text_of(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprob(token: TokenDelta, tokenizer: Tokenizer | None) -> ChatCompletionTokenLogprob:
    """One item of choices[].logprobs.content."""
    assert token.logprobs is not None

    def fields(token_id: int, logprob: float) -> dict[str, Any]:
        name = token_text(token_id, None).encode()
        data = tokenizer.token_bytes(token_id) if tokenizer else name
        return {"token": _text_of(data), "logprob": max(logprob, -9999.0), "bytes": list(data)}

    return ChatCompletionTokenLogprob(
        **fields(token.token_id, token.logprobs.logprob),
        top_logprobs=[TopLogprob(**fields(i, p)) for i, p in token.logprobs.top],
    )

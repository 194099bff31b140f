"""What an LLM returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coconut_serve.server.schemas import GenerationBody
from coconut_serve.server.usage import ReasoningInfo, reasoning_info
from coconut_serve.service import generation as parts
from coconut_serve.service.generation import Delta, Generation
from coconut_serve.service.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

_NUMBERS = ("entropy", "max_prob", "norm", "cosine", "retained_mass")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceStep:
    """A thinking step: a readout of the state, not an explanation of the answer."""

    kind: str  # latent, distribution or token
    token_id: int | None  # the text of the step
    entropy: float  # of the next token, in nats
    max_prob: float
    norm: float  # of the vector that is fed next
    cosine: float  # to the input before
    retained_mass: float
    top: dict[int, float]  # likely next tokens with their probabilities; {} unless traced
    vector: "torch.Tensor | None"  # [hidden_size] float32: what is fed next; None unless traced

    def __repr__(self) -> str:
        """A short form: traces are long."""
        token = "" if self.token_id is None else f"token_id={self.token_id}, "
        vector = "" if self.vector is None else f", vector=[{len(self.vector)}]"
        numbers = f"entropy={self.entropy:.3f}, max_prob={self.max_prob:.3f}"
        return f"TraceStep({self.kind}, {token}{numbers}{vector})"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One choice, or what a stream adds to it."""

    index: int
    text: str
    token_ids: list[int]  # of the answer
    logprobs: list[dict[int, float]] | None  # by answer token: its own first, then its rivals'
    finish_reason: str | None  # stop or length; None while it goes on
    stop_reason: str | int | None
    reasoning: str  # text of the thinking
    trace: list[TraceStep]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt and its choices."""

    request_id: str
    prompt: str | None  # its text, of a chat as the model reads it; None: token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    reasoning_info: ReasoningInfo  # of the first choice


def completion(delta: Delta, run: Generation, body: GenerationBody) -> CompletionOutput:
    """Show a choice, or a part of it."""
    is_asked = run.prepared.ask.sampling.num_logprobs is not None
    known = [(t.token_id, t.logprobs) for t in delta.tokens if t.logprobs is not None]
    return CompletionOutput(
        index=delta.index,
        text=delta.content,
        token_ids=[token.token_id for token in delta.tokens],
        logprobs=[{i: own.logprob, **dict(own.top)} for i, own in known] if is_asked else None,
        finish_reason=delta.finish_reason.value if delta.finish_reason else None,
        stop_reason=delta.stop_reason,
        reasoning=delta.reasoning if body.include_reasoning else "",
        trace=[_step(each) for each in delta.trace],
    )


def request_output(
    choices: Sequence[Delta], run: Generation, body: GenerationBody, tokenizer: Tokenizer | None
) -> RequestOutput:
    """Show a finished call of one prompt."""
    ask, ids = run.prepared.ask, run.prepared.prompt_token_ids[0]
    prompt = next((each for each in ask.prompts if isinstance(each, str)), None)
    if ask.messages is not None and tokenizer is not None:
        prompt = tokenizer.decode(ids, skip_special_tokens=False)
    return RequestOutput(
        request_id=ask.request_id,
        prompt=prompt,
        prompt_token_ids=list(ids),
        outputs=[completion(each, run, body) for each in choices],
        reasoning_info=ReasoningInfo(**reasoning_info(run)),
    )


def _step(step: parts.TraceStep) -> TraceStep:
    trace, vector = step.trace, None
    if trace.vector is not None and step.kind != "token":
        import torch

        vector = torch.tensor(trace.vector, dtype=torch.float32)
    numbers = {name: getattr(trace, name) for name in _NUMBERS}
    return TraceStep(
        kind=step.kind, token_id=step.token_id, **numbers, top=dict(trace.top), vector=vector
    )

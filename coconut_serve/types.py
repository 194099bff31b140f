"""Records that cross layers: the request, what each step adds to it, and step statistics.

A latent step takes a KV *position* but makes no *token*; the names keep the two apart:
positions fill the cache, tokens have an id, reasoning steps are positions of the thinking phase.
"""

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Literal

from coconut_serve.errors import require
from coconut_serve.params import Phase, ReasoningParams, SamplingParams

WaitReason = Literal["capacity", "kv"]  # for a slot or room in the step, or for KV blocks


class FinishReason(StrEnum):
    """Why a sequence ended; each accepted sequence ends with exactly one of these."""

    STOP = "stop"
    LENGTH = "length"


class HaltReason(IntEnum):
    """Why a thinking phase ended; NONE while it goes on."""

    NONE = 0
    FIXED = 1
    CAP = 2
    STOP_TOKEN = 3
    COLD_STOP = 4
    NUMERICAL = 5
    LEARNED = 6
    UNCERTAIN = 7
    CONVERGED = 8
    SWITCHES = 9

    @property
    def label(self) -> str:
        """The name that clients and metrics see."""
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """Weights between the hidden state and the next input, as a manifest declares them."""

    type: str
    activation: str = "gelu"
    file: str = "latent/adapter.safetensors"  # engines load any weights beside config.json
    emb_std: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate. A client's `n` becomes n requests of one group."""

    request_id: str
    prompt_token_ids: tuple[int, ...]  # includes the start-of-thought token
    sampling: SamplingParams = field(default_factory=SamplingParams)
    thinking: SamplingParams | None = None  # samples thinking tokens and seeds thinking noise;
    # None: as `sampling`
    reasoning: ReasoningParams = field(default_factory=ReasoningParams)
    group_id: str | None = None  # same prompt; members share the prompt's blocks

    def __post_init__(self) -> None:
        draws_alike = self.thinking is None or not self.reasoning.mixture.in_answer
        in_answer = "reasoning.mixture.in_answer"
        require(draws_alike, in_answer, "draws all tokens alike: without reasoning.seed and after")

    @property
    def thinking_seed(self) -> int:
        return (self.thinking or self.sampling).seed

    @property
    def max_new_positions(self) -> int:
        """Most KV positions the request can fill after its prompt."""
        steps = self.reasoning.max_thinking + self.sampling.max_tokens
        return min(steps, self.reasoning.max_total_steps or steps)

    @property
    def max_num_positions(self) -> int:
        """Most KV positions the request can fill."""
        return len(self.prompt_token_ids) + self.max_new_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities (nats) of one emitted token and the likeliest alternatives."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningTrace:
    """Measurements of one thinking step, not an explanation of it."""

    entropy: float  # nats, of the raw next-token distribution
    max_prob: float
    norm: float  # L2 norm of the vector fed next
    cosine: float  # to the previous position's input
    retained_mass: float  # probability covered by the mixed tokens; 1 for latent steps
    top: tuple[tuple[int, float], ...] = ()  # (token id, probability): logit lens
    vector: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceCounts:
    """Running totals of one sequence, sent with each output."""

    num_output_tokens: int = 0  # answer tokens
    num_reasoning_steps: int = 0  # thinking positions of any kind
    num_vector_steps: int = 0  # of these, fed as a vector
    num_forced_tokens: int = 0
    num_switches: int = 0  # between tokens and vectors
    num_forward_passes: int = 0
    num_cached_tokens: int = 0  # prompt positions taken from the prefix cache
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What one step adds to one sequence."""

    request_id: str
    phase: Phase = Phase.ANSWER
    token_id: int | None = None  # None for a step without text
    is_vector: bool = False
    logprobs: TokenLogprobs | None = None
    trace: ReasoningTrace | None = None
    halt_reason: HaltReason = HaltReason.NONE  # set on the output that ends the thinking phase
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # token id, stop string or "numerical"
    counts: SequenceCounts = field(default_factory=SequenceCounts)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # first output only: of prompt tokens 1..
    queue_seconds: float = 0.0  # from arrival to the first step


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """Statistics of one engine step, from which the caller makes metrics."""

    seconds: float
    num_rows: dict[tuple[str, str], int]  # (mode, prefill|latent|distribution|decode) -> rows
    num_prefill_positions: int
    num_running: dict[str, int]  # mode -> sequences holding a slot
    num_waiting: dict[str, int]
    num_preemptions: int
    num_free_blocks: int
    num_cached_blocks: int
    num_used_blocks: int
    num_prefix_queries: int  # prompt tokens looked up since the last step
    num_prefix_hits: int
    wait_reason: WaitReason = "capacity"  # of the whole queue: it is first come, first served

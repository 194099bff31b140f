"""The records that cross layers: what was asked, what one step adds, what a step cost.

A latent step takes a KV *position* but makes no *token*; the names keep the two apart:
positions fill the cache, tokens have an id, reasoning steps are positions of the thinking phase.
"""

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Literal

from coconut_serve.errors import require
from coconut_serve.limits import (
    HALT_RANGES,
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_FORCED_TOKENS,
    MAX_HARD_TOKENS,
    MAX_LOGPROBS,
    MAX_STOP_TOKENS,
    MIN_TEMPERATURE,
    MIXTURE_RANGES,
    REASONING_RANGES,
    SAMPLING_RANGES,
    SWITCH_RANGES,
    check_ranges,
)

TraceLevel = Literal["none", "summary", "topk", "vectors"]
MixtureKind = Literal["topk", "full", "multiplex", "moi", "gated"]
WeightKind = Literal["prob", "equal"]
NormKind = Literal["none", "l2", "embed_mean"]
NoiseKind = Literal["none", "gumbel", "dirichlet"]
Source = Literal["hidden", "constant"]
Select = Literal["first", "vote", "logprob", "all"]
SwitchRule = Literal["none", "swi", "confidence"]
SoftWhen = Literal["confident", "uncertain"]
StopTest = Literal["argmax", "sampled", "prob"]
EntropyUnit = Literal["nats", "normalized"]
ConvergeMetric = Literal["none", "cosine", "rel_l2", "kl", "argmax_stable"]
WaitReason = Literal["capacity", "kv"]  # for a slot or room in the step; for KV blocks


class FinishReason(StrEnum):
    """Why a sequence ended; each accepted sequence ends with exactly one of these."""

    STOP = "stop"
    LENGTH = "length"


class Phase(IntEnum):
    """Which part of the answer a position belongs to."""

    THINK = 0
    BOUNDARY = 1
    ANSWER = 2


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
class SamplingParams:
    """How tokens are drawn: of the answer, and of the thinking phase where its mode draws any.

    Temperature 0 is greedy. The seed and the position alone decide the noise of a row, so batch
    mates never change it.
    """

    max_tokens: int = 16  # answer tokens; thinking is bounded by ReasoningParams.steps
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned_token_ids: tuple[int, ...] = ()  # the manifest's never_emit
    allowed_token_ids: tuple[int, ...] = ()  # no other is drawn; (): any
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that are never completed
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence ids and the client's own
    num_logprobs: int | None = None  # None = off, 0 = the sampled token only

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, "", SAMPLING_RANGES)
        require(self.top_p > 0, "top_p", "must be above 0")
        require(self.min_tokens <= self.max_tokens, "min_tokens", "must be at most max_tokens")
        num_logprobs = self.num_logprobs or 0
        require(0 <= num_logprobs <= MAX_LOGPROBS, "top_logprobs", f"must be in 0..{MAX_LOGPROBS}")
        is_short = len(self.allowed_token_ids) <= MAX_ALLOWED_TOKENS
        require(is_short, "allowed_token_ids", f"takes at most {MAX_ALLOWED_TOKENS}")
        is_short = len(self.bad_words) <= MAX_BAD_WORDS
        require(is_short, "bad_words", f"may come to {MAX_BAD_WORDS} sequences of tokens at most")
        is_short = sum(map(len, self.bad_words)) <= MAX_BAD_WORD_TOKENS
        require(is_short, "bad_words", f"may have {MAX_BAD_WORD_TOKENS} tokens at most")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether tokens seen before change the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def has_filters(self) -> bool:
        """Whether some tokens are cut before drawing."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureParams:
    """How the next input of a `distribution` step is mixed (Soft Thinking, arXiv 2505.15778).

    Order: temperature, `filter_top_k`, `top_p`, `min_p`, then the `top_k` likeliest, renormalised;
    noise as in Stochastic Soft Thinking (arXiv 2508.03440).
    """

    kind: MixtureKind = "topk"  # reasoning/mixers.py
    top_k: int = 10
    temperature: float = 0.6
    top_p: float = 0.95
    filter_top_k: int = 30  # 0 = all
    min_p: float = 0.001
    noise: NoiseKind = "none"
    noise_temperature: float = 0.5
    noise_clamp: tuple[float, ...] = ()  # bounds of Gumbel noise; (): none
    dirichlet_alpha: float = 4.0
    weights: WeightKind = "prob"  # multiplex
    replacement: bool = True  # multiplex
    moi_beta: float = 1.0  # -1, -100: the distribution alone
    in_answer: bool = False  # moi, gated: goes on in the answer, whose text is the drawn tokens
    norm: NormKind = "none"  # l2: by the root of the summed squared weights; embed_mean: the mean
    # length of an embedding

    def __post_init__(self) -> None:
        """Check ranges."""
        path = "reasoning.mixture."
        check_ranges(self, path, MIXTURE_RANGES)
        has_filter = self.noise != "dirichlet" or self.filter_top_k > 0
        require(has_filter, path + "filter_top_k", "must not be 0 with noise 'dirichlet'")
        has_beta = self.moi_beta >= 0 or self.moi_beta in (-1, -100)
        require(has_beta, path + "moi_beta", "must be -1, -100 or at least 0")
        clamp = self.noise_clamp
        is_range = not clamp or (len(clamp) == 2 and -1000 <= clamp[0] < clamp[1] <= 1000)
        require(is_range, path + "noise_clamp", "must be two rising numbers in -1000..1000")


@dataclass(frozen=True, slots=True, kw_only=True)
class HaltParams:
    """When a thinking phase ends before its steps are spent: the first rule that holds.

    Each rule is off by default. reasoning/halting.py says what they look at.
    """

    stop_token_ids: tuple[int, ...] = ()  # the step's text, or what its logits give, is one
    stop_test: StopTest = "argmax"  # how logits give a token, where a step has no text; prob: none
    # is given, the stop tokens must be likely enough, whatever the text is
    learned_token_ids: tuple[int, ...] = ()  # continue, stop: two rows of the output head
    stop_temperature: float = 1.0  # of both, where they draw or look at a probability
    stop_prob: float = 0.5  # learned, and stop_test prob: stops at this probability
    sample: bool = False  # learned: draws instead
    entropy_below: float = 0.0  # 0 = off (Soft Thinking's Cold Stop)
    entropy_patience: int = 256  # consecutive steps below the threshold
    entropy_above: float = 0.0  # 0 = off
    entropy_unit: EntropyUnit = "nats"  # normalized: divided by ln vocab_size
    converge_metric: ConvergeMetric = "none"
    converge_below: float = 0.0
    converge_patience: int = 1  # consecutive steps

    def __post_init__(self) -> None:
        """Check ranges."""
        path = "reasoning.halt."
        check_ranges(self, path, HALT_RANGES)
        num_stops, num_learned = len(self.stop_token_ids), len(self.learned_token_ids)
        require(num_stops <= MAX_STOP_TOKENS, path + "stop_tokens", f"takes {MAX_STOP_TOKENS} ids")
        require(num_learned in (0, 2), path + "learned", "needs two token ids: continue, stop")
        metric, is_bound = self.converge_metric, self.converge_below > 0
        is_measured = metric != "argmax_stable" or not is_bound
        require(is_measured, path + "converge_below", "has no meaning for argmax_stable")
        has_bound = metric in ("none", "argmax_stable") or is_bound
        require(has_bound, path + "converge_below", f"must be above 0 with {metric}")

    @property
    def may_halt(self) -> bool:
        """Whether any rule is on."""
        return bool(self.stop_token_ids) or self.needs_logits(has_text=True)

    def needs_logits(self, *, has_text: bool) -> bool:
        """Whether a rule that is on looks at logits; a text shows its stop token itself."""
        is_seen = has_text and self.stop_test != "prob"
        if self.learned_token_ids or (self.stop_token_ids and not is_seen):
            return True
        has_bound = self.entropy_below > 0 or self.entropy_above > 0
        return has_bound or self.converge_metric != "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchParams:
    """When `auto` goes from tokens to soft tokens and back (reasoning/modes/auto.py)."""

    rule: SwitchRule = "swi"  # none: every step feeds the mixture
    soft_when: SoftWhen = "confident"  # confidence
    p_max: float = 0.6  # confidence
    window: int = 512  # swi: steps in tokens before soft ones may come back
    alpha: float = 1.0  # swi: share of the soft token at a switch to it, the rest <think>
    beta: float = 0.7  # swi: share of the token at a switch to tokens, the rest </think>
    max_switches: int = 0  # swi: to tokens; </think> is said from here on, twice this ends the
    # phase (modes/auto.py); 0: no bound
    final_token_ids: tuple[int, ...] = ()  # fed at such an end in place of the end tokens
    answer_tokens: int = 0  # of the answer after it, at most; 0: no bound of their own
    hard_token_ids: tuple[int, ...] = ()  # swi: never fed softly
    think_token_id: int = -1  # -1: the model has none
    end_token_id: int = -1
    newline_token_id: int = -1  # swi: a tenth of the first soft input

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, "reasoning.switch.", SWITCH_RANGES)
        is_short = len(self.hard_token_ids) <= MAX_HARD_TOKENS
        require(is_short, "reasoning.switch.hard_tokens", f"takes {MAX_HARD_TOKENS} ids")
        is_short = len(self.final_token_ids) <= MAX_FORCED_TOKENS
        require(is_short, "reasoning.switch.final_token_ids", f"takes {MAX_FORCED_TOKENS} ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """Weights between the hidden state and the next input, as a manifest declares them."""

    type: str
    activation: str = "gelu"
    file: str = "latent/adapter.safetensors"  # engines load all weights beside config.json
    emb_std: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningParams:
    """How one sequence thinks, fully resolved: engines look nothing up.

    The start-of-thought token, if any, is already the end of the prompt. After `steps` thinking
    positions, or when the mode halts, `end_token_ids` are fed and hidden from the client.
    """

    mode: str = "none"
    steps: int = 0
    min_steps: int = 0  # halting rules are not looked at before
    is_fixed: bool = False  # the step count is exact, not a cap
    end_token_ids: tuple[int, ...] = ()
    end_adds_vector: bool = False  # the first end token is added to the last vector, not instead
    keeps_last: bool = False  # the vector of the step that halts is fed all the same
    enter_token_id: int | None = None  # thinking starts each time the answer says this token
    max_blocks: int = 1  # thinking phases; more than one only with enter_token_id
    pad_positions: bool = False  # the answer stands where it would if all steps had been taken
    max_total_steps: int = 0  # thinking, end tokens and answer together; 0: no bound of their own
    source: Source = "hidden"  # latent: what is fed; constant: a control run
    constant_token_id: int | None = None  # the token of source "constant"
    adapter: str = "none"  # latent: its name in the manifest, or "realign"
    noise_std: float = 0.0  # additive Gaussian noise on fed vectors
    latent_temperature: float = 1.0  # scales the noise of adapters that draw
    soft_weight: float = 0.0  # latent: adds so much of the soft token
    mixture: MixtureParams = field(default_factory=MixtureParams)
    halt: HaltParams = field(default_factory=HaltParams)
    switch: SwitchParams = field(default_factory=SwitchParams)
    trace: TraceLevel = "none"
    trace_top_k: int = 5
    replay_vectors: bytes = field(default=b"", repr=False)  # what the first steps feed, in place
    # of their own: [num_replayed, hidden_size] float32, little-endian
    replay_token_ids: tuple[int, ...] = ()  # the texts of those steps; (): they have none

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, "reasoning.", REASONING_RANGES)
        thinks = self.mode != "none" or self.steps == 0
        require(thinks, "reasoning.steps", "must be 0 in mode none")
        require(self.min_steps <= self.steps, "reasoning.min_steps", "must be at most steps")
        has_enter = self.max_blocks == 1 or self.enter_token_id is not None
        require(has_enter, "reasoning.max_blocks", "must be 1: no token opens another block")
        has_constant = self.source != "constant" or self.constant_token_id is not None
        require(has_constant, "reasoning.source", "'constant' needs a token to feed")
        has_vectors = self.mode != "cot" or self.halt.converge_metric not in ("cosine", "rel_l2")
        metric = "reasoning.halt.converge_metric"
        require(has_vectors, metric, "must be kl or argmax_stable: cot has no vectors to compare")
        is_drawn = self.mode == "distribution" and self.mixture.kind in ("moi", "gated")
        in_answer = "reasoning.mixture.in_answer"
        require(
            is_drawn or not self.mixture.in_answer, in_answer, "is for moi and gated distributions"
        )
        is_short = len(self.end_token_ids) <= MAX_FORCED_TOKENS
        require(is_short, "reasoning.end", f"must be at most {MAX_FORCED_TOKENS} tokens")

    @property
    def num_forced(self) -> int:
        """How many end tokens are fed after the thinking phase, however short it is."""
        return len(self.end_token_ids) if self.mode != "none" else 0

    def may_end_in(self, phase: Phase) -> bool:
        """Whether a stop token said at a position of that phase ends the sequence.

        The tokens of a thinking phase of an exact number of steps are readouts and end nothing;
        end tokens are forced.
        """
        return phase is Phase.ANSWER or (phase is Phase.THINK and not self.is_fixed)

    @property
    def max_thinking(self) -> int:
        """Positions that thinking and its end tokens take at most."""
        num_forced = max(self.num_forced, len(self.switch.final_token_ids))
        return self.max_blocks * (self.steps + num_forced)

    @property
    def has_topk_trace(self) -> bool:
        """Whether each step reports its likeliest tokens."""
        return self.trace in ("topk", "vectors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate. A client's `n` becomes n requests of one group."""

    request_id: str
    prompt_token_ids: tuple[int, ...]  # includes the start-of-thought token
    sampling: SamplingParams = field(default_factory=SamplingParams)
    thinking: SamplingParams | None = None  # draws thinking tokens and seeds all noise of thinking;
    # None: `sampling` does
    reasoning: ReasoningParams = field(default_factory=ReasoningParams)
    group_id: str | None = None  # same prompt; members share the prompt's blocks

    def __post_init__(self) -> None:
        """Check what sampling and reasoning must agree on."""
        draws_alike = self.thinking is None or not self.reasoning.mixture.in_answer
        in_answer = "reasoning.mixture.in_answer"
        require(draws_alike, in_answer, "draws all tokens alike: without reasoning.seed and after")

    @property
    def thinking_seed(self) -> int:
        """What seeds the thinking phase."""
        return (self.thinking or self.sampling).seed

    @property
    def max_new_positions(self) -> int:
        """Positions after the prompt that the request can take at most."""
        steps = self.reasoning.max_thinking + self.sampling.max_tokens
        return min(steps, self.reasoning.max_total_steps or steps)

    @property
    def max_num_positions(self) -> int:
        """KV positions the request can take at most."""
        return len(self.prompt_token_ids) + self.max_new_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities (nats) of one emitted token and its likeliest rivals."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningTrace:
    """What one thinking step looked like: a readout, not an explanation."""

    entropy: float  # nats, of the raw next-token distribution
    max_prob: float
    norm: float  # L2 norm of the vector fed next
    cosine: float  # to the input of the position before
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
    queue_seconds: float = 0.0  # from arrival to the first step


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """Facts about one engine step; the engine knows no metrics."""

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
    wait_reason: WaitReason = "capacity"  # of all that wait: they are first come, first served

"""Every setting of sampling and reasoning, declared once.

A setting is a field of one of the records below. Its declaration carries the default, the range,
the name that a request gives it, whether it holds token ids, the paper that has it and a line for
people. Request schemas, range errors, vLLM's flat keys, checks of token ids and the tables in
docs/api.md are read off these fields.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import ClassVar, Literal

from coconut_serve.declare import MAX_INT, Declared, Setting, internal, setting, settings_of
from coconut_serve.errors import require

MAX_MIXTURE_TOP_K = 64
MAX_LOGPROBS = 20
MAX_STEPS = 1024
MIN_TEMPERATURE = 1e-3  # below, sampling is greedy: dividing by less overflows float32
MAX_FORCED_TOKENS = 8
MAX_STOP_TOKENS = 32
MAX_HARD_TOKENS = 128
MAX_BRANCHES = 32
MAX_ALLOWED_TOKENS = 1024
MAX_BAD_WORDS = 128  # each as one or two sequences of tokens
MAX_BAD_WORD_TOKENS = 1024  # of all of them
_INT64 = (-(2**63), 2**63 - 1)

TraceLevel = Literal["none", "summary", "topk", "vectors"]
MixtureKind = Literal["topk", "full", "multiplex", "moi", "gated"]
NoiseKind = Literal["none", "gumbel", "dirichlet"]
Source = Literal["hidden", "constant"]
Select = Literal["first", "vote", "logprob", "all"]
SwitchRule = Literal["none", "swi", "confidence"]
ConvergeMetric = Literal["none", "cosine", "rel_l2", "kl", "argmax_stable"]
HaltRule = Literal["learned", "stop_token", "cold_stop", "uncertain", "converged"]


class Phase(IntEnum):
    """Which part of the answer a position belongs to."""

    THINK = 0
    BOUNDARY = 1
    ANSWER = 2


# A declaration reads like the row of a table, so it is laid out by hand.
# fmt: off


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(Declared):
    """How tokens are drawn: of the answer, and of the thinking phase where its mode draws any.

    Temperature 0 is greedy. The seed and the position alone decide the noise of a row, so batch
    mates never change it.
    """

    max_tokens: int = setting(16, "Answer tokens, at most; thinking is bounded by reasoning.steps.",
        (1, 2**31), usual="16 in completions, the rest of the context in chats")
    min_tokens: int = setting(0, "Answer tokens before it may end.", (0, 2**31))
    temperature: float = setting(1.0, "0 takes the likeliest token.", (0, 2))
    top_p: float = setting(1.0, "Probability that the tokens drawn from must cover.", (0, 1),
        is_open=True)
    top_k: int = setting(0, "Likeliest tokens drawn from; 0, -1: all.", (0, MAX_INT), also=-1)
    min_p: float = setting(0.0, "Least probability drawn, as a share of the largest.", (0, 1))
    repetition_penalty: float = setting(1.0, "Divides logits of tokens seen in prompt or output.",
        (0.01, 2))
    presence_penalty: float = setting(0.0, "Taken from the logits of tokens said before.", (-2, 2))
    frequency_penalty: float = setting(0.0, "The same for each time they were said.", (-2, 2))
    logit_bias: tuple[tuple[int, float], ...] = internal((), "Token id, and what is added to its "
        "logit.")
    banned_token_ids: tuple[int, ...] = internal((), "The manifest's never_emit.")
    allowed_token_ids: tuple[int, ...] = internal((), "No other token is drawn; (): any.",
        longest=MAX_ALLOWED_TOKENS)
    bad_words: tuple[tuple[int, ...], ...] = internal((), "Sequences of tokens that are never "
        "completed.")
    seed: int = setting(0, "Repeats the random numbers of a request.", _INT64, usual="random")
    stop_token_ids: frozenset[int] = internal(frozenset, "End-of-sequence ids and the client's "
        "own.")
    num_logprobs: int | None = internal(None, "None: off, 0: of the sampled token only.")

    def __post_init__(self) -> None:
        """Check ranges, and what the settings must agree on."""
        self.check_ranges()
        require(self.min_tokens <= self.max_tokens, "min_tokens", "must be at most max_tokens")
        num_logprobs = self.num_logprobs or 0
        require(0 <= num_logprobs <= MAX_LOGPROBS, "top_logprobs", f"must be in 0..{MAX_LOGPROBS}")
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
class MixtureParams(Declared):
    """What a soft token is made of.

    Order: temperature, `filter_top_k`, `top_p`, `min_p`, then the `top_k` likeliest, renormalised
    (Soft Thinking, arXiv 2505.15778); noise as in Stochastic Soft Thinking (arXiv 2508.03440).
    """

    path: ClassVar[str] = "reasoning.mixture."

    kind: MixtureKind = setting("topk", "How tokens are mixed.")
    top_k: int = setting(10, "Likeliest tokens that take part.", (1, MAX_MIXTURE_TOP_K))
    temperature: float = setting(0.6, "Of the distribution that is mixed.", (0.01, 5))
    top_p: float = setting(0.95, "Probability that the tokens taken must cover.", (0.01, 1))
    filter_top_k: int = setting(30, "Tokens kept before top_p; 0: all.", (0, MAX_MIXTURE_TOP_K))
    min_p: float = setting(0.001, "Least probability, as a share of the largest.", (0, 0.99))
    noise: NoiseKind = setting("none", "Randomness of the weights.", paper="2508.03440")
    noise_temperature: float = setting(0.5, "Of Gumbel noise: low is close to a sampled token.",
        (0.01, 10), paper="2508.03440")
    noise_clamp: tuple[float, ...] = setting((), "Two bounds of Gumbel noise; none: unbounded.",
        longest=2, is_column=True)
    dirichlet_alpha: float = setting(4.0, "Concentration of Dirichlet noise.", (0.01, 10_000),
        paper="2508.03440")
    weights: Literal["prob", "equal"] = setting("prob", "multiplex: by probability, or all alike.")
    replacement: bool = setting(True, "multiplex: whether a token may be drawn twice.")
    moi_beta: float = setting(1.0, "moi: how much the drawn token counts; -1, -100: not at all.",
        (-100, 10**6), paper="2505.14827")
    in_answer: bool = setting(False, "moi, gated: goes on in the answer, whose text is the drawn "
        "tokens.")
    norm: Literal["none", "l2", "embed_mean"] = setting("none", "How long the mixed vector is "
        "made: l2: the root of the summed squared weights, embed_mean: the mean length of an "
        "embedding.")

    def __post_init__(self) -> None:
        """Check ranges, and what the settings must agree on."""
        path = self.path
        self.check_ranges()
        has_filter = self.noise != "dirichlet" or self.filter_top_k > 0
        require(has_filter, path + "filter_top_k", "must not be 0 with noise 'dirichlet'")
        has_beta = self.moi_beta >= 0 or self.moi_beta in (-1, -100)
        require(has_beta, path + "moi_beta", "must be -1, -100 or at least 0")
        clamp = self.noise_clamp
        is_range = not clamp or (len(clamp) == 2 and -1000 <= clamp[0] < clamp[1] <= 1000)
        require(is_range, path + "noise_clamp", "must be two rising numbers in -1000..1000")


@dataclass(frozen=True, slots=True, kw_only=True)
class HaltParams(Declared):
    """When thinking ends before its steps are spent: the first rule that holds.

    Each rule is off by default. reasoning/halting.py says what they look at.
    """

    path: ClassVar[str] = "reasoning.halt."

    stop_token_ids: tuple[int, ...] = setting((), "Tokens that end it where a step says one: "
        "ids, or texts of one token.", asked="stop_tokens", takes=list[int | str], has_tokens=True,
        longest=MAX_STOP_TOKENS, is_column=True, is_set=True, usual="the model's")
    stop_test: Literal["argmax", "sampled", "prob"] = setting("argmax", "How the logits of a step "
        "without text give a token; prob: none is given, the stop tokens must be likely enough, "
        "whatever the text is.")
    learned_token_ids: tuple[int, ...] = internal((), "Continue, stop: two rows of the output "
        "head.", blame="learned", has_tokens=True, longest=2, is_column=True)
    stop_temperature: float = setting(1.0, "Of stop_test and learned, where they draw or look at "
        "a probability.", (0.01, 100))
    stop_prob: float = setting(0.5, "learned, and stop_test prob: stops at it.", (0, 1))
    sample: bool = setting(False, "learned: draws instead.")
    entropy_below: float = setting(0.0, "Entropy under which a step is certain; 0: off.", (0, 20),
        paper="2505.15778")
    entropy_patience: int = setting(256, "Certain steps in a row that end the phase.", (1, 10**6),
        paper="2505.15778")
    entropy_above: float = setting(0.0, "Entropy over which a step is uncertain; 0: off.", (0, 20))
    entropy_unit: Literal["nats", "normalized"] = setting("nats", "Of both bounds; normalized: "
        "divided by ln vocab_size.")
    converge_metric: ConvergeMetric = setting("none", "How far a step is from the one before.")
    converge_below: float = setting(0.0, "Distance under which a step changes nothing.", (0, 100))
    converge_patience: int = setting(1, "Such steps in a row that end the phase.", (1, 10**6))

    def __post_init__(self) -> None:
        """Check ranges, and what the settings must agree on."""
        path = self.path
        self.check_ranges()
        num_learned = len(self.learned_token_ids)
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
class SwitchParams(Declared):
    """When `auto` goes from tokens to soft tokens and back (reasoning/modes/auto.py)."""

    path: ClassVar[str] = "reasoning.switch."

    rule: SwitchRule = setting("swi", "What decides; none: every step is soft.", paper="2510.05069")
    soft_when: Literal["confident", "uncertain"] = setting("confident", "confidence: when soft "
        "tokens are fed.")
    p_max: float = setting(0.6, "confidence: probability from which a step is confident.", (0, 1))
    window: int = setting(512, "swi: steps in tokens before soft ones may come back.", (0, 10**6))
    alpha: float = setting(1.0, "swi: share of the soft token at a switch to it, the rest is "
        "`<think>`.", (0, 1))
    beta: float = setting(0.7, "swi: share of the token at a switch to tokens, the rest is "
        "`</think>`.", (0, 1))
    max_switches: int = setting(0, "swi: switches to tokens; `</think>` is said from here on, "
        "twice as many end the phase; 0: no bound.", (0, 10**6))
    final_token_ids: tuple[int, ...] = internal((), "Fed at such an end in place of the end "
        "tokens.", blame="max_switches", has_tokens=True, longest=MAX_FORCED_TOKENS,
        is_column=True)
    answer_tokens: int = setting(0, "Of the answer after such an end, at most; 0: no bound of "
        "their own.", (0, MAX_INT))
    hard_token_ids: tuple[int, ...] = setting((), "swi: tokens that are never fed softly: a "
        "named set, ids, or texts of one token.", asked="hard_tokens",
        takes=Literal["math", "none"] | list[int | str], has_tokens=True, longest=MAX_HARD_TOKENS,
        is_column=True, is_set=True,
        usual="none")
    think_token_id: int = internal(-1, "<think>; -1: the model has none.", has_tokens=True)
    end_token_id: int = internal(-1, "</think>; -1: the same.", has_tokens=True)
    newline_token_id: int = internal(-1, "swi: a tenth of the first soft input.", has_tokens=True)

    def __post_init__(self) -> None:
        """Check ranges."""
        self.check_ranges()


_BOUNDS = str | int | list[int | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningParams(Declared):
    """How one sequence thinks, fully resolved: engines look nothing up.

    The start-of-thought token, if any, is already the end of the prompt. After `steps` thinking
    positions, or when the mode halts, `end_token_ids` are fed and hidden from the client.
    """

    path: ClassVar[str] = "reasoning."

    mode: str = setting("none", "As reasoning_mode.", usual="the model's")
    steps: int = setting(0, "latent: the exact number of thinking steps, unless a halting rule "
        "is on; else the most.", (0, 2**31), usual="methods.md")
    min_steps: int = setting(0, "Steps before halting rules are looked at.", (0, 2**31))
    is_fixed: bool = internal(False, "The step count is exact, not a cap.")
    end_token_ids: tuple[int, ...] = setting((), "What is fed after thinking: auto, none, ids or "
        "texts of one token.", asked="end", takes=_BOUNDS, has_tokens=True,
        longest=MAX_FORCED_TOKENS, is_column=True, usual="auto")
    end_adds_vector: bool = internal(False, "The first end token is added to the last vector, not "
        "fed after it.")
    keeps_last: bool = internal(False, "The vector of the step that halts is fed all the same.")
    enter_token_id: int | None = internal(None, "Thinking starts each time the answer says this "
        "token.", blame="start", has_tokens=True)
    max_blocks: int = setting(1, "Thinking phases of a model that opens them itself.", (1, 64),
        usual="64")
    pad_positions: bool = setting(False, "After an early halt the answer has the positions it "
        "would have after all steps (not on vllm).")
    max_total_steps: int = setting(0, "Thinking, end tokens and answer together, at most; 0: no "
        "bound of their own.", (0, 2**31), least=1, usual="-")
    source: Source = setting("hidden", "latent: hidden, or constant (a control: one embedding in "
        "place of each vector); distribution: distribution.",
        takes=Literal["hidden", "distribution", "constant"], usual="the manifest's")
    constant_token_id: int | None = internal(None, "The token of source constant.", blame="source",
        has_tokens=True)
    adapter: str = setting("none", "What stands between hidden states and inputs: auto (the "
        "manifest's), none, a name in the manifest, realign.", usual="auto")
    noise_std: float = setting(0.0, "Of Gaussian noise on each fed vector.", (0, 10),
        asked="latent_noise_std")
    latent_temperature: float = setting(1.0, "Scales the noise of adapters that draw (CoLaR).",
        (0, 5), paper="2505.16552")
    soft_weight: float = setting(0.0, "How much of the soft token a latent gets (SIM-CoT).", (0, 1),
        paper="2509.20317")
    mixture: MixtureParams = internal(MixtureParams, "What a soft token is made of.")
    halt: HaltParams = internal(HaltParams, "When thinking ends early.")
    switch: SwitchParams = internal(SwitchParams, "When `auto` switches.")
    trace: TraceLevel = setting("none", "How much is told of each step.")
    trace_top_k: int = setting(5, "Likeliest tokens a traced step names.", (1, MAX_LOGPROBS))
    replay_vectors: bytes = internal(b"", "What the first steps feed, in place of their own: "
        "[num_replayed, hidden_size] float32, little-endian.", is_shown=False)
    replay_token_ids: tuple[int, ...] = internal((), "The texts of those steps; (): they have "
        "none.", blame="replay", has_tokens=True)

    def __post_init__(self) -> None:
        """Check ranges, and what the settings must agree on."""
        self.check_ranges()
        require(self.min_steps <= self.steps, "reasoning.min_steps", "must be at most steps")
        has_enter = self.max_blocks == 1 or self.enter_token_id is not None
        require(has_enter, "reasoning.max_blocks", "must be 1: no token opens another block")
        has_constant = self.source != "constant" or self.constant_token_id is not None
        require(has_constant, "reasoning.source", "'constant' needs a token to feed")

    @property
    def num_forced(self) -> int:
        """How many end tokens are fed after the thinking phase, however short it is."""
        return len(self.end_token_ids)

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
class RequestOnly(Declared):
    """Settings of `reasoning` that are worked into others before an engine sees them."""

    path: ClassVar[str] = "reasoning."

    effort: str | None = setting(None, "As reasoning_effort: scales the default number of steps; "
        "none: mode none.", usual="-")
    summary: str | None = setting(None, "OpenAI's; accepted without effect.", usual="-")
    explain: bool = setting(False, "Tell every resolved setting with its source.")
    preset: str | None = setting(None, "Settings of a published method, by name.", usual="-")
    start: _BOUNDS = setting("auto", "What is fed before thinking, in mode latent: auto, none, "
        "ids or texts of one token.")
    speed: int | str = setting("auto", "A whole number from 1, or auto: fills {speed} of the "
        "model's prompt template, in chats (CoLaR).", usual="the manifest's", paper="2505.16552")
    seed: int = setting(0, "Of the noise and the draws of thinking alone.", _INT64,
        usual="the request's")
    branches: int = setting(1, "Lines of thought of each choice, which share the prompt's "
        "blocks; more than one needs noise while thinking.", (1, MAX_BRANCHES))
    select: Select = setting("vote", "Which of them is the answer: by vote, the first that ended, "
        "logprob (mean of the answer's), or all (a choice each).")
    halt_rule: Literal["auto", "fixed"] | HaltRule | list[HaltRule] = setting("auto", "Which "
        "rules hold; auto: all that are set up, fixed: none.", asked="halt.rule", shortest=1)


# fmt: on

AFTER = ("temperature", "top_p", "top_k", "min_p")  # settings of the answer alone
# The objects inside `reasoning`, with what they are about.
PARTS = {
    "mixture": "What a soft token is made of; see docs/methods.md.",
    "halt": "When thinking ends before its steps are spent.",
    "switch": "When `auto` goes from tokens to soft tokens and back.",
    "after": "How the answer is drawn after thinking, where it differs.",
}


def _asked_settings() -> Iterator[tuple[str, Setting]]:
    for kind in (ReasoningParams, RequestOnly, MixtureParams, HaltParams, SwitchParams):
        prefix = kind.path.removeprefix("reasoning.")
        own = (each for each in settings_of(kind).values() if each.asked)
        for each in own:
            low = each.low if each.least is None else each.least
            yield f"{prefix}{each.asked}", replace(each, low=low)
    drawn = settings_of(SamplingParams)
    yield from ((f"after.{name}", replace(drawn[name], usual="the request's")) for name in AFTER)


# All settings of `reasoning` by the dotted names of requests.
ASKED: Mapping[str, Setting] = dict(_asked_settings())
# Settings of a request's body that go into SamplingParams under their own name.
SAMPLED: Mapping[str, Setting] = {
    name: own for name, own in settings_of(SamplingParams).items() if own.asked
}

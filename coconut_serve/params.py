"""Every setting of sampling and reasoning, declared once.

Each field of the records below is a setting. Its declaration carries the default, the range, the
name in a request, whether it holds token ids, the source paper and one line of documentation.
Request schemas, range errors, vLLM's flat keys, token-id checks and the tables in docs/api.md are
derived from these fields.
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
MAX_BAD_WORDS = 128  # token sequences; each word becomes one or two
MAX_BAD_WORD_TOKENS = 1024  # in total
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
    """The phase a position belongs to."""

    THINK = 0
    BOUNDARY = 1
    ANSWER = 2


# A declaration reads like the row of a table, so it is laid out by hand.
# fmt: off


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(Declared):
    """How to sample answer tokens, or thinking tokens in modes that sample them.

    Temperature 0 is greedy. A row's noise depends only on its seed and position, never on the rest
    of the batch.
    """

    max_tokens: int = setting(16, "Maximum answer tokens; reasoning.steps bounds thinking.",
        (1, 2**31), usual="16 in completions, the rest of the context in chats")
    min_tokens: int = setting(0, "Answer tokens before the answer may end.", (0, 2**31))
    temperature: float = setting(1.0, "0 takes the likeliest token.", (0, 2))
    top_p: float = setting(1.0, "Probability mass of the tokens to sample from.", (0, 1),
        is_open=True)
    top_k: int = setting(0, "Likeliest tokens to sample from; 0, -1: all.", (0, MAX_INT), also=-1)
    min_p: float = setting(0.0, "Minimum probability, relative to the largest.", (0, 1))
    repetition_penalty: float = setting(1.0, "Divides logits of tokens seen in prompt or output.",
        (0.01, 2))
    presence_penalty: float = setting(0.0, "Subtracted from logits of generated tokens.",
        (-2, 2))
    frequency_penalty: float = setting(0.0, "The same, once per occurrence.", (-2, 2))
    logit_bias: tuple[tuple[int, float], ...] = internal((), "Pairs of a token id and the value "
        "added to its logit.")
    banned_token_ids: tuple[int, ...] = internal((), "The manifest's never_emit.")
    allowed_token_ids: tuple[int, ...] = internal((), "Only these tokens are sampled; (): any.",
        longest=MAX_ALLOWED_TOKENS)
    bad_words: tuple[tuple[int, ...], ...] = internal((), "Token sequences never to complete.")
    seed: int = setting(0, "Makes random sampling repeatable.", _INT64, usual="random")
    stop_token_ids: frozenset[int] = internal(frozenset, "End-of-sequence ids and the client's "
        "own.")
    num_prompt_logprobs: int | None = internal(None, "The same of the prompt's tokens.")
    num_logprobs: int | None = internal(None, "None: off, 0: of the sampled token only.")

    def __post_init__(self) -> None:
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
        return self.temperature < MIN_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def has_filters(self) -> bool:
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureParams(Declared):
    """How a soft token is mixed.

    Order: temperature, `filter_top_k`, `top_p`, `min_p`, then the `top_k` likeliest, renormalised
    (Soft Thinking, arXiv 2505.15778); noise as in Stochastic Soft Thinking (arXiv 2508.03440).
    """

    path: ClassVar[str] = "reasoning.mixture."

    kind: MixtureKind = setting("topk", "How tokens are mixed.")
    top_k: int = setting(10, "Number of likeliest tokens to mix.", (1, MAX_MIXTURE_TOP_K))
    temperature: float = setting(0.6, "Temperature of the mixed distribution.", (0.01, 5))
    top_p: float = setting(0.95, "Probability mass of the tokens to mix.", (0.01, 1))
    filter_top_k: int = setting(30, "Tokens kept before top_p; 0: all.", (0, MAX_MIXTURE_TOP_K))
    min_p: float = setting(0.001, "Minimum probability, relative to the largest.", (0, 0.99))
    noise: NoiseKind = setting("none", "Noise on the weights.", paper="2508.03440")
    noise_temperature: float = setting(0.5, "Of Gumbel noise; a low one nearly samples one token.",
        (0.01, 10), paper="2508.03440")
    noise_clamp: tuple[float, ...] = setting((), "Two bounds of Gumbel noise; none: unbounded.",
        longest=2, is_column=True)
    dirichlet_alpha: float = setting(4.0, "Concentration of Dirichlet noise.", (0.01, 10_000),
        paper="2508.03440")
    weights: Literal["prob", "equal"] = setting("prob", "multiplex: by probability, or equal.")
    replacement: bool = setting(True, "multiplex: whether a token may be drawn twice.")
    moi_beta: float = setting(1.0, "moi: weight of the sampled token; -1, -100: none.",
        (-100, 10**6), paper="2505.14827")
    in_answer: bool = setting(False, "moi, gated: keep mixing in the answer; its text is the "
        "sampled tokens.")
    norm: Literal["none", "l2", "embed_mean"] = setting("none", "Rescales the mixed vector: "
        "l2: divides by the L2 norm of the weights, embed_mean: to the mean norm of an embedding.")

    def __post_init__(self) -> None:
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
    """When thinking ends before its steps run out: at the first rule that holds.

    Each rule is off by default. reasoning/halting.py implements them.
    """

    path: ClassVar[str] = "reasoning.halt."

    stop_token_ids: tuple[int, ...] = setting((), "Tokens that end thinking where a step has "
        "one: ids or texts of one token.", asked="stop_tokens", takes=list[int | str],
        has_tokens=True, longest=MAX_STOP_TOKENS, is_column=True, is_set=True, usual="the model's")
    stop_test: Literal["argmax", "sampled", "prob"] = setting("argmax", "How a step without text "
        "is tested: its argmax, or a sample; prob, for any step: total stop probability >= "
        "stop_prob.")
    learned_token_ids: tuple[int, ...] = internal((), "Continue, stop: two rows of the output "
        "head.", blame="learned", has_tokens=True, longest=2, is_column=True)
    stop_temperature: float = setting(1.0, "Of stop_test and learned, where they sample or use a "
        "probability.", (0.01, 100))
    stop_prob: float = setting(0.5, "learned, and stop_test prob: probability to stop at.", (0, 1))
    sample: bool = setting(False, "learned: sample instead.")
    entropy_below: float = setting(0.0, "Entropy below which a step is certain; 0: off.", (0, 20),
        paper="2505.15778")
    entropy_patience: int = setting(256, "Certain steps in a row that end the phase.", (1, 10**6),
        paper="2505.15778")
    entropy_above: float = setting(0.0, "Entropy above which a step is uncertain; 0: off.", (0, 20))
    entropy_unit: Literal["nats", "normalized"] = setting("nats", "Of both bounds; normalized: "
        "divided by ln vocab_size.")
    converge_metric: ConvergeMetric = setting("none", "Distance between consecutive steps.")
    converge_below: float = setting(0.0, "Distance below which a step has converged.", (0, 100))
    converge_patience: int = setting(1, "Converged steps in a row that end the phase.", (1, 10**6))

    def __post_init__(self) -> None:
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
        """Whether an active rule reads logits; a step with text shows its stop token without."""
        is_seen = has_text and self.stop_test != "prob"
        if self.learned_token_ids or (self.stop_token_ids and not is_seen):
            return True
        has_bound = self.entropy_below > 0 or self.entropy_above > 0
        return has_bound or self.converge_metric != "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchParams(Declared):
    """When `auto` switches between tokens and soft tokens (reasoning/modes/auto.py)."""

    path: ClassVar[str] = "reasoning.switch."

    rule: SwitchRule = setting("swi", "What decides; none: every step is soft.", paper="2510.05069")
    soft_when: Literal["confident", "uncertain"] = setting("confident", "confidence: when soft "
        "tokens are fed.")
    p_max: float = setting(0.6, "confidence: least top probability of a confident step.", (0, 1))
    window: int = setting(512, "swi: minimum steps in tokens before soft ones return.", (0, 10**6))
    alpha: float = setting(1.0, "swi: weight of the soft token at a switch to soft; the rest "
        "is `<think>`.", (0, 1))
    beta: float = setting(0.7, "swi: weight of the token at a switch to tokens; the rest is "
        "`</think>`.", (0, 1))
    max_switches: int = setting(0, "swi: switches to tokens from which on each forces "
        "`</think>`; beyond twice as many the phase ends; 0: no bound.", (0, 10**6))
    final_token_ids: tuple[int, ...] = internal((), "Fed instead of the end tokens when the "
        "switches are spent.", blame="max_switches", has_tokens=True, longest=MAX_FORCED_TOKENS,
        is_column=True)
    answer_tokens: int = setting(0, "Maximum answer tokens after max_switches ended the phase; "
        "0: no separate bound.", (0, MAX_INT))
    hard_token_ids: tuple[int, ...] = setting((), "swi: tokens that are never mixed: a named "
        "set, ids, or texts of one token.", asked="hard_tokens",
        takes=Literal["math", "none"] | list[int | str], has_tokens=True, longest=MAX_HARD_TOKENS,
        is_column=True, is_set=True, usual="none")
    think_token_id: int = internal(-1, "<think>; -1: the model has none.", has_tokens=True)
    end_token_id: int = internal(-1, "</think>; -1: the model has none.", has_tokens=True)
    newline_token_id: int = internal(-1, "swi: a tenth of the first soft input.", has_tokens=True)

    def __post_init__(self) -> None:
        self.check_ranges()


_BOUNDS = str | int | list[int | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningParams(Declared):
    """How one sequence thinks, fully resolved: engines look nothing up.

    The start-of-thought token, if any, already ends the prompt. After `steps` thinking positions,
    or at a halt, the engine feeds `end_token_ids` and hides them from the client.
    """

    path: ClassVar[str] = "reasoning."

    mode: str = setting("none", "Same as reasoning_mode.", usual="the model's")
    steps: int = setting(0, "latent: exact number of thinking steps, unless a halting rule is "
        "on; otherwise the maximum.", (0, 2**31), usual="methods.md")
    min_steps: int = setting(0, "Steps before halting rules apply.", (0, 2**31))
    is_fixed: bool = internal(False, "The step count is exact, not a cap.")
    end_token_ids: tuple[int, ...] = setting((), "Tokens fed after thinking: auto, none, ids or "
        "texts of one token.", asked="end", takes=_BOUNDS, has_tokens=True,
        longest=MAX_FORCED_TOKENS, is_column=True, usual="auto")
    end_adds_vector: bool = internal(False, "The first end token is added to the last vector, not "
        "fed after it.")
    keeps_last: bool = internal(False, "The vector of the halting step is still fed.")
    enter_token_id: int | None = internal(None, "Thinking starts whenever the answer contains "
        "this token.", blame="start", has_tokens=True)
    max_blocks: int = setting(1, "Maximum thinking phases, if the model opens them.", (1, 64),
        usual="64")
    pad_positions: bool = setting(False, "After an early halt, the answer keeps the positions it "
        "would have after all steps (not on vllm).")
    max_total_steps: int = setting(0, "Maximum of thinking, end tokens and answer together; 0: "
        "no separate bound.", (0, 2**31), least=1, usual="-")
    source: Source = setting("hidden", "latent: hidden, or constant (a control: one embedding in "
        "place of each vector); distribution: distribution.",
        takes=Literal["hidden", "distribution", "constant"], usual="the manifest's")
    constant_token_id: int | None = internal(None, "The token of source constant.", blame="source",
        has_tokens=True)
    adapter: str = setting("none", "Layer between hidden states and inputs: auto (the "
        "manifest's), none, a name in the manifest, realign.", usual="auto")
    noise_std: float = setting(0.0, "Of Gaussian noise added to each fed vector.", (0, 10),
        asked="latent_noise_std")
    latent_temperature: float = setting(1.0, "Scales the noise of adapters that sample (CoLaR).",
        (0, 5), paper="2505.16552")
    soft_weight: float = setting(0.0, "Weight of the soft token added to a latent (SIM-CoT).",
        (0, 1), paper="2509.20317")
    mixture: MixtureParams = internal(MixtureParams, "How a soft token is mixed.")
    halt: HaltParams = internal(HaltParams, "When thinking ends early.")
    switch: SwitchParams = internal(SwitchParams, "When `auto` switches.")
    trace: TraceLevel = setting("none", "How much to report of each step.")
    trace_top_k: int = setting(5, "Likeliest tokens in the trace of a step.", (1, MAX_LOGPROBS))
    replay_vectors: bytes = internal(b"", "Vectors that the first steps feed instead of their "
        "own: [num_replayed, hidden_size] float32, little-endian.", is_shown=False)
    replay_token_ids: tuple[int, ...] = internal((), "The text of those steps; (): none.",
        blame="replay", has_tokens=True)

    def __post_init__(self) -> None:
        self.check_ranges()
        require(self.min_steps <= self.steps, "reasoning.min_steps", "must be at most steps")
        has_enter = self.max_blocks == 1 or self.enter_token_id is not None
        require(has_enter, "reasoning.max_blocks", "must be 1: no token opens another block")
        has_constant = self.source != "constant" or self.constant_token_id is not None
        require(has_constant, "reasoning.source", "'constant' needs a token to feed")

    @property
    def num_forced(self) -> int:
        """Number of end tokens fed after a thinking phase, however short."""
        return len(self.end_token_ids)

    def may_end_in(self, phase: Phase) -> bool:
        """Whether a stop token in that phase ends the sequence.

        If the number of steps is exact, the tokens of its thinking phase are mere readouts.
        """
        return phase is Phase.ANSWER or (phase is Phase.THINK and not self.is_fixed)

    @property
    def max_thinking(self) -> int:
        """Most positions that thinking and its end tokens can fill."""
        num_forced = max(self.num_forced, len(self.switch.final_token_ids))
        return self.max_blocks * (self.steps + num_forced)

    @property
    def has_topk_trace(self) -> bool:
        """Whether each step reports its likeliest tokens."""
        return self.trace in ("topk", "vectors")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOnly(Declared):
    """Settings of `reasoning` that the service turns into others; engines never see them."""

    path: ClassVar[str] = "reasoning."

    effort: str | None = setting(None, "Same as reasoning_effort: scales the default number of "
        "steps; none: mode none.", usual="-")
    summary: str | None = setting(None, "OpenAI's; accepted without effect.", usual="-")
    generate_summary: str | None = setting(None, "As summary, an older name.", usual="-")
    context: str | None = setting(None, "OpenAI's; accepted without effect: thinking of earlier "
        "turns is never fed again.", usual="-")
    explain: bool = setting(False, "Report every resolved setting with its source.")
    preset: str | None = setting(None, "Settings of a published method, by name.", usual="-")
    start: _BOUNDS = setting("auto", "Tokens fed before thinking, in mode latent: auto, none, "
        "ids or texts of one token.")
    speed: int | str = setting("auto", "A whole number from 1, or auto: fills {speed} of the "
        "model's prompt template, in chats (CoLaR).", usual="the manifest's", paper="2505.16552")
    seed: int = setting(0, "Seeds the noise and samples of thinking alone.", _INT64,
        usual="the request's")
    branches: int = setting(1, "Alternative sequences for each choice, sharing the prompt's "
        "blocks; more than one needs noise while thinking.", (1, MAX_BRANCHES))
    select: Select = setting("vote", "Which branch is the answer: by vote, the first to end, by "
        "logprob (mean over the answer), or all (a choice each).")
    halt_rule: Literal["auto", "fixed"] | HaltRule | list[HaltRule] = setting("auto", "Active "
        "rules; auto: all that are configured, fixed: none.", asked="halt.rule", shortest=1)


# fmt: on

AFTER = ("temperature", "top_p", "top_k", "min_p")  # settings of the answer alone
# The objects inside `reasoning`, with their documentation.
PARTS = {
    "mixture": "How a soft token is mixed; see docs/methods.md.",
    "halt": "When thinking ends before its steps run out.",
    "switch": "When `auto` switches between tokens and soft tokens.",
    "after": "How the answer is sampled after thinking, where it differs.",
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


# All settings of `reasoning` by their dotted names in requests.
ASKED: Mapping[str, Setting] = dict(_asked_settings())
# Settings of the request body that go into SamplingParams under the same name.
SAMPLED: Mapping[str, Setting] = {
    name: own for name, own in settings_of(SamplingParams).items() if own.asked
}

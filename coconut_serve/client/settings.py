"""The settings of `reasoning` as types: what they do is in docs/api.md.

Written by `python -m tests.client.test_settings` from params.py and reasoning/registry.py.
"""

from typing import Literal, NotRequired, TypedDict

from coconut_serve.params import (
    ConvergeMetric,
    HaltRule,
    MixtureKind,
    NoiseKind,
    Select,
    SwitchRule,
    TraceLevel,
)

ReasoningMode = Literal["none", "cot", "latent", "distribution", "auto"]


class ReplayStep(TypedDict):
    """A step of a trace with vectors."""

    vector: str
    token_id: NotRequired[int | None]


class Replay(TypedDict):
    """What an earlier answer fed: its system_fingerprint and steps of its trace."""

    fingerprint: str
    steps: list[ReplayStep]


class Mixture(TypedDict, total=False):
    """`reasoning.mixture`."""

    kind: MixtureKind
    top_k: int
    temperature: float
    top_p: float
    filter_top_k: int
    min_p: float
    noise: NoiseKind
    noise_temperature: float
    noise_clamp: list[float]
    dirichlet_alpha: float
    weights: Literal["prob", "equal"]
    replacement: bool
    moi_beta: float
    in_answer: bool
    norm: Literal["none", "l2", "embed_mean"]


class Halt(TypedDict, total=False):
    """`reasoning.halt`."""

    rule: Literal["auto", "fixed"] | HaltRule | list[HaltRule]
    stop_tokens: list[int | str]
    stop_test: Literal["argmax", "sampled", "prob"]
    stop_temperature: float
    stop_prob: float
    sample: bool
    entropy_below: float
    entropy_patience: int
    entropy_above: float
    entropy_unit: Literal["nats", "normalized"]
    converge_metric: ConvergeMetric
    converge_below: float
    converge_patience: int


class Switch(TypedDict, total=False):
    """`reasoning.switch`."""

    rule: SwitchRule
    soft_when: Literal["confident", "uncertain"]
    p_max: float
    window: int
    alpha: float
    beta: float
    max_switches: int
    answer_tokens: int
    hard_tokens: Literal["math", "none"] | list[int | str]


class After(TypedDict, total=False):
    """`reasoning.after`."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float


class Reasoning(TypedDict, total=False):
    """How the model thinks."""

    mode: ReasoningMode
    steps: int
    min_steps: int
    end: str | int | list[int | str]
    max_blocks: int
    pad_positions: bool
    max_total_steps: int
    source: Literal["hidden", "distribution", "constant"]
    adapter: str
    latent_noise_std: float
    latent_temperature: float
    soft_weight: float
    trace: TraceLevel
    trace_top_k: int
    effort: str
    summary: str
    generate_summary: str
    context: str
    explain: bool
    preset: str
    start: str | int | list[int | str]
    speed: int | str
    seed: int
    branches: int
    select: Select
    mixture: Mixture
    halt: Halt
    switch: Switch
    after: After
    replay: Replay

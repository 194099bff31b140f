"""The `reasoning` object of a request, and its settings by dotted name."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from coconut_serve.errors import InvalidRequestError
from coconut_serve.limits import (
    HALT_RANGES,
    MAX_BRANCHES,
    MAX_STEPS,
    MIXTURE_RANGES,
    REASONING_RANGES,
    SWITCH_RANGES,
)
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.server.body import Body, Items, MinP, Number, Seed, Temperature, TopK, TopP, say
from coconut_serve.server.fields import Path, paths_of, unknown_error
from coconut_serve.service.presets import PRESETS


class MixtureBody(Body):
    """reasoning.mixture: what a soft token is made of; see docs/methods.md."""

    ranges = MIXTURE_RANGES

    kind: Literal["topk", "full", "multiplex", "moi", "gated"] | None = say("How tokens are mixed.")
    top_k: int | None = say("Likeliest tokens that take part.")
    temperature: Number | None = say("Of the distribution that is mixed.")
    top_p: Number | None = say("Probability that the tokens taken must cover.")
    filter_top_k: int | None = say("Tokens kept before top_p; 0: all.")
    min_p: Number | None = say("Least probability, as a share of the largest.")
    noise: Literal["none", "gumbel", "dirichlet"] | None = say("Randomness of the weights.")
    noise_temperature: Number | None = say("Of Gumbel noise: low is close to a sampled token.")
    noise_clamp: Items[Number] | None = say("Two bounds of Gumbel noise; none: unbounded.")
    dirichlet_alpha: Number | None = say("Concentration of Dirichlet noise.")
    weights: Literal["prob", "equal"] | None = say("Of multiplex: by probability, or all alike.")
    replacement: bool | None = say("Whether multiplex may draw a token twice.")
    moi_beta: Number | None = say("How much a drawn token counts in MoI; -1, -100: not at all.")
    in_answer: bool | None = say("Whether the answer is mixed too (moi, gated).")
    norm: Literal["none", "l2", "embed_mean"] | None = say("How long the mixed vector is made.")


HaltRule = Literal["learned", "stop_token", "cold_stop", "uncertain", "converged"]
HaltRules = Annotated[Items[HaltRule], Field(min_length=1)]


class HaltBody(Body):
    """reasoning.halt: when thinking ends before its steps are spent."""

    ranges = HALT_RANGES

    rule: Literal["auto", "fixed", HaltRule] | HaltRules | None = say(
        "Which rules hold; auto: all that are set up, fixed: none."
    )
    stop_tokens: Items[int | str] | None = say("Tokens that end it: ids, or texts of one token.")
    stop_test: Literal["argmax", "sampled", "prob"] | None = say(
        "How the logits of a step without text give a token."
    )
    stop_temperature: Number | None = say("Of that test where it looks at probabilities.")
    stop_prob: Number | None = say("Probability of stopping from which a phase stops.")
    sample: bool | None = say("Whether a learned rule draws instead.")
    entropy_below: Number | None = say("Entropy under which the model is certain; 0: off.")
    entropy_patience: int | None = say("Certain steps in a row that end the phase.")
    entropy_above: Number | None = say("Entropy over which the model is uncertain; 0: off.")
    entropy_unit: Literal["nats", "normalized"] | None = say("Of both bounds.")
    converge_metric: Literal["none", "cosine", "rel_l2", "kl", "argmax_stable"] | None = say(
        "How far a step is from the one before."
    )
    converge_below: Number | None = say("Distance under which a step changes nothing.")
    converge_patience: int | None = say("Such steps in a row that end the phase.")


class SwitchBody(Body):
    """reasoning.switch: when `auto` goes from tokens to soft tokens and back."""

    ranges = SWITCH_RANGES

    rule: Literal["none", "swi", "confidence"] | None = say("What decides; none: always soft.")
    soft_when: Literal["confident", "uncertain"] | None = say("When confidence feeds soft tokens.")
    p_max: Number | None = say("Probability from which the model is confident.")
    window: int | None = say("Steps in tokens before soft ones may come back (swi).")
    alpha: Number | None = say("Share of the soft token at a switch to it (swi).")
    beta: Number | None = say("Share of the token at a switch to tokens (swi).")
    max_switches: int | None = say("Switches to tokens, at most; 0: no bound (swi).")
    answer_tokens: int | None = say("Of the answer after the last switch, at most; 0: no bound.")
    hard_tokens: Literal["math", "none"] | Items[int | str] | None = say(
        "Tokens that are never fed softly (swi)."
    )


class AfterBody(Body):
    """reasoning.after: how the answer is drawn after thinking, where it differs."""

    temperature: Temperature | None = say("Sampling temperature of the answer.")
    top_p: TopP | None = say("Nucleus of the answer.")
    top_k: TopK | None = say("Likeliest tokens of the answer; 0, -1: all.")
    min_p: MinP | None = say("Least probability in the answer, as a share of the largest.")


class ReplayStep(Body):
    """A step of `reasoning_trace`; what else it says is not looked at."""

    vector: str = Field(description="What was fed: float32, little-endian, base64.")
    token_id: Annotated[int, Field(ge=0)] | None = say("The text of the step.")


class ReplayBody(Body):
    """reasoning.replay: what an earlier answer fed, instead of own vectors."""

    fingerprint: str = Field(description="system_fingerprint of that answer.")
    steps: Annotated[Items[ReplayStep], Field(min_length=1, max_length=MAX_STEPS)] = Field(
        description="Steps of its trace with vectors."
    )


class ReasoningBody(Body):
    """The `reasoning` object of chat and completions: how the model thinks."""

    ranges = REASONING_RANGES | {"branches": (1, MAX_BRANCHES)}

    mode: str | None = say("As reasoning_mode.", examples=[*mode_names()])
    effort: str | None = say("As reasoning_effort.")
    summary: str | None = say("OpenAI's; accepted without effect.")
    explain: bool | None = say("Tell every resolved setting with its source.")
    preset: str | None = say("Settings of a published method.", examples=[*PRESETS])
    steps: Annotated[int, Field(ge=0)] | None = say(
        "latent: the exact number of thinking steps; else the most."
    )
    min_steps: Annotated[int, Field(ge=0)] | None = say("Steps before halting rules are looked at.")
    max_blocks: Annotated[int, Field(ge=1)] | None = say(
        "Thinking phases of a model that opens them itself."
    )
    pad_positions: bool | None = say("Whether the answer stands where it would after all steps.")
    max_total_steps: Annotated[int, Field(ge=1)] | None = say(
        "Thinking, end tokens and answer together, at most."
    )
    start: str | int | Items[int | str] | None = say("What is fed before thinking.")
    end: str | int | Items[int | str] | None = say("What is fed after thinking.")
    source: Literal["hidden", "distribution", "constant"] | None = say("What a step feeds.")
    adapter: str | None = say("What stands between hidden states and inputs, by name.")
    latent_noise_std: Number | None = say("Of Gaussian noise on each fed vector.")
    latent_temperature: Number | None = say("Scales the noise of adapters that draw.")
    soft_weight: Number | None = say("How much of the soft token a latent gets.")
    mixture: MixtureBody | None = say("What a soft token is made of.")
    halt: HaltBody | None = say("When thinking ends early.")
    switch: SwitchBody | None = say("When `auto` switches.")
    after: AfterBody | None = say("How the answer is drawn.")
    speed: int | str | None = say("Fills {speed} of the model's prompt template.")
    seed: Seed | None = say("Of the noise and the draws of thinking alone.")
    branches: Annotated[int, Field(ge=1)] | None = say("Lines of thought of each choice.")
    select: Literal["first", "vote", "logprob", "all"] | None = say("Which of them is shown.")
    trace: Literal["none", "summary", "topk", "vectors"] | None = say(
        "How much is told of each step."
    )
    trace_top_k: int | None = say("Likeliest tokens a traced step names.")
    replay: ReplayBody | None = say("Vectors to feed, from an earlier answer.")


REASONING_PATHS = tuple(Path(f"reasoning.{each.path}") for each in paths_of(ReasoningBody))


def flatten_reasoning(body: ReasoningBody | None) -> dict[str, Any]:
    """Explicit settings by dotted name, e.g. "mixture.top_k".

    Raises:
        InvalidRequestError: A setting is unknown.
    """
    asked: dict[str, Any] = {}
    if body is not None:
        _flatten(body, "", asked)
    _check_values(asked)
    return asked


def _flatten(part: Body, prefix: str, asked: dict[str, Any]) -> None:
    for name, value in part:  # declared fields, then unknown ones
        dotted = prefix + name
        if isinstance(value, Body):
            _flatten(value, f"{dotted}.", asked)
        elif value is not None:
            if name not in type(part).model_fields:
                raise unknown_error(f"reasoning.{dotted}", REASONING_PATHS)
            asked[dotted] = value


def _check_values(asked: Mapping[str, Any]) -> None:
    preset = asked.get("preset")
    if preset is not None and preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise InvalidRequestError(
            f"reasoning.preset must be one of {known}", param="reasoning.preset"
        )
    speed = asked.get("speed", "auto")
    if speed != "auto" and (isinstance(speed, str) or speed < 1):
        raise InvalidRequestError(
            "reasoning.speed must be 'auto' or a whole number from 1", param="reasoning.speed"
        )

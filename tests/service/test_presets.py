"""Each preset is the published method: the same numbers whatever a manifest says of mixtures."""

from dataclasses import replace
from typing import Any

import pytest

from coconut_serve.checkpoint.manifest import Manifest
from coconut_serve.params import HaltParams, MixtureParams, ReasoningParams, SwitchParams
from coconut_serve.service.model import ModelReasoning
from coconut_serve.service.presets import HARD_TOKENS, PRESETS
from coconut_serve.service.reasoning import Resolved, resolve

START, END, THINK, CLOSE, EOS = 10, 11, 20, 21, 99
BLANK, FULL_STOP = 30, 31
TOKENS = {"<think>": THINK, "</think>": CLOSE, "\n\n": BLANK, ".\n\n": FULL_STOP}
DECLARED: dict[str, Any] = {
    "schema": 1,
    "modes": ["none", "cot", "latent", "distribution", "auto"],
    "tokens": {
        "start": {"id": START}, "end": {"id": END},
        "think_start": {"id": THINK}, "think_end": {"id": CLOSE},
    },
    "max_steps": 100,
}  # fmt: skip
CONTRARY: dict[str, Any] = {
    "distribution": {
        "kind": "full", "top_k": 7, "temperature": 0.5, "top_p": 0.5, "filter_top_k": 5,
        "min_p": 0.5,
    },
    "halting": {"rule": "stop_token", "token_ids": [40]},
}  # fmt: skip

ROOM = 1000 - 50 - 30 - 1
LATENT = ReasoningParams(mode="latent", steps=6, end_token_ids=(END,), is_fixed=True)
TEXT = ReasoningParams(
    mode="distribution",
    steps=ROOM,
    end_token_ids=(CLOSE,),
    halt=HaltParams(stop_token_ids=(CLOSE,)),
)
COLD = HaltParams(stop_token_ids=(CLOSE,), entropy_below=0.01, entropy_patience=256)
UNFILTERED = MixtureParams(top_k=10, temperature=1.0, top_p=1.0, filter_top_k=0, min_p=0.0)
SOFT = MixtureParams(top_k=10, temperature=0.6, top_p=0.95, filter_top_k=30, min_p=0.001)
SWITCH = SwitchParams(think_token_id=THINK, end_token_id=CLOSE)
MATH = tuple(range(200, 200 + len(HARD_TOKENS["math"])))
# docs/methods.md says where from. `adaptive`, `colar` and `switch` are what the manifest says.
EXPECTED: dict[str, ReasoningParams] = {
    "coconut": LATENT,
    "codi": LATENT,
    "latentmas": replace(LATENT, adapter="realign", steps=40),
    "later_free": replace(
        LATENT,
        adapter="realign",
        steps=96,
        is_fixed=False,
        halt=HaltParams(stop_token_ids=(EOS, CLOSE, BLANK, FULL_STOP)),
    ),
    "soft_thinking": replace(TEXT, mixture=SOFT, halt=COLD),
    "stochastic_soft": replace(
        TEXT, mixture=replace(SOFT, top_k=15, min_p=0.0, noise="gumbel", noise_temperature=0.5)
    ),
    "latent_sft": replace(TEXT, mixture=UNFILTERED),
    "multiplex": replace(TEXT, mixture=replace(UNFILTERED, kind="multiplex", top_k=3)),
    "moi": replace(
        TEXT,
        mixture=MixtureParams(kind="moi", top_k=20, temperature=1.0, moi_beta=1.0, in_answer=True),
    ),
    "swi": replace(
        TEXT,
        mode="auto",
        switch=replace(SWITCH, rule="swi", window=512, beta=0.7, hard_token_ids=MATH),
    ),
    "thinkrouter": replace(
        TEXT,
        mode="auto",
        mixture=SOFT,
        halt=COLD,
        switch=replace(SWITCH, rule="confidence", p_max=0.6, soft_when="confident"),
    ),
}


def encode(text: str) -> list[int]:
    """One id for each token these tests know, none for other texts."""
    if text in HARD_TOKENS["math"]:
        return [200 + HARD_TOKENS["math"].index(text)]
    return [TOKENS[text]] if text in TOKENS else []


def resolved(preset: str, **declared: Any) -> Resolved:
    mode = PRESETS[preset]["mode"]
    model = ModelReasoning.read(
        Manifest.model_validate(DECLARED | declared),
        None,
        engine_modes=(mode,),
        allowed_modes=None,
        default_mode=None,
        max_model_len=1000,
        adapters=("realign",),
        eos_token_ids=(EOS,),
    )
    return resolve(
        mode,
        {"preset": preset},
        replace(model, encode=encode),
        effort=None,
        trace_bounds=("none", "topk"),
        num_prompt_tokens=50,
        max_tokens=30,
    )


@pytest.mark.parametrize("preset", EXPECTED)
def test_preset_is_the_method_whatever_the_manifest_says_of_mixtures(preset: str) -> None:
    """moi, multiplex and thinkrouter took top_k and temperature from the manifest."""
    assert resolved(preset).params == EXPECTED[preset]
    contrary = resolved(preset, distribution=CONTRARY["distribution"])
    assert contrary.params == EXPECTED[preset]
    sources = {name: noted["source"] for name, noted in contrary.parameters.items()}
    assert "manifest" not in {sources[name] for name in sources if name.startswith("mixture.")}


@pytest.mark.parametrize("preset", ["coconut", "codi", "latentmas"])
def test_fixed_counts_stay_fixed_on_a_model_that_can_stop(preset: str) -> None:
    assert resolved(preset, **CONTRARY).params == EXPECTED[preset]


def test_later_free_opens_a_thought_and_keeps_to_the_model_s_limit() -> None:
    """Its 96 steps were refused by every manifest that leaves max_steps at 64."""
    later = resolved("later_free", max_steps=64)
    assert later.suffix_ids == (THINK,)
    assert later.params.steps == 64
    assert later.parameters["steps"] == {"value": 64, "source": "preset"}
    assert "steps=64, the most of this model; the preset has 96" in later.warnings

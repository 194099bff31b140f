"""Which settings win, and what a model without them gets."""

from dataclasses import replace
from typing import Any

import pytest

from coconut_serve.checkpoint.manifest import Manifest
from coconut_serve.errors import InvalidRequestError, StartupError
from coconut_serve.params import ASKED, MixtureParams, ReasoningParams
from coconut_serve.reasoning.registry import Feeds, check_params, mode_names, properties_of
from coconut_serve.service.model import ModelReasoning, declared_modes
from coconut_serve.service.reasoning import Resolved, check_mode, resolve

MANIFEST = Manifest.model_validate(
    {
        "schema": 1,
        "method": "coconut",
        "modes": ["none", "cot", "latent", "distribution"],
        "default_mode": "latent",
        "tokens": {"start": {"id": 10}, "end": {"id": 11}},
        "steps": 6,
        "max_steps": 20,
        "distribution": {"top_k": 7},
    }
)
ENGINE_MODES = ("none", "cot", "latent", "distribution")


def make_model(manifest: Manifest | None = MANIFEST, **changes: Any) -> ModelReasoning:
    settings: dict[str, Any] = {
        "engine_modes": ENGINE_MODES,
        "allowed_modes": None,
        "default_mode": None,
        "max_model_len": 1000,
    }
    return ModelReasoning.read(manifest, None, **(settings | changes))


def resolved(mode: str, model: ModelReasoning, effort: str | None = None, **asked: Any) -> Resolved:
    return resolve(
        mode,
        {name.replace("__", "."): value for name, value in asked.items()},
        model,
        effort=effort,
        trace_bounds=("none", "topk"),
        num_prompt_tokens=50,
        max_tokens=30,
    )


def test_latent_takes_count_and_bounds_from_the_manifest() -> None:
    result = resolved("latent", make_model())
    assert result.params.steps == 6
    assert result.params.is_fixed
    assert result.suffix_ids == (10,)
    assert result.params.end_token_ids == (11,)
    assert result.warnings == ()


def test_untrained_count_is_served_with_a_warning_and_too_many_refused() -> None:
    result = resolved("latent", make_model(), steps=3)
    assert result.params.steps == 3
    assert "trained with [6]" in result.warnings[0]
    with pytest.raises(InvalidRequestError) as caught:
        resolved("latent", make_model(), steps=21)
    assert caught.value.param == "reasoning.steps"


def test_model_trained_with_one_vector_is_fed_it_unless_asked_otherwise() -> None:
    declared = {"modes": ["latent", "distribution"], "tokens": {"latent": {"id": 12}}}
    model = make_model(Manifest.model_validate({"schema": 1, "source": "constant", **declared}))
    result = resolved("latent", model)
    assert (result.params.source, result.params.constant_token_id) == ("constant", 12)
    assert result.parameters["source"] == {"value": "constant", "source": "manifest"}
    assert resolved("latent", model, source="hidden").params.source == "hidden"
    assert resolved("distribution", model).params.constant_token_id is None


def test_boundaries_can_be_dropped_or_replaced() -> None:
    result = resolved("latent", make_model(), start="none", end=[12, 13])
    assert result.suffix_ids == ()
    assert result.params.end_token_ids == (12, 13)


def test_boundaries_by_text_and_of_phases_in_text() -> None:
    model = replace(make_model(), encode=lambda text: [ord(c) for c in text])
    latent = resolved("latent", model, start="a", end=["b", 7])
    assert (latent.suffix_ids, latent.params.end_token_ids) == ((97,), (98, 7))
    assert latent.parameters["end"] == {"value": (98, 7), "source": "request"}
    assert latent.parameters["start"] == {"value": (97,), "source": "request"}
    assert latent.warnings == ()
    with pytest.raises(InvalidRequestError, match="'ab' is no single token") as caught:
        resolved("latent", model, start="ab")
    assert caught.value.param == "reasoning.start"
    tokens = {"think_start": {"id": 20}, "think_end": {"id": 21}}
    thinker = make_model(Manifest.model_validate({"schema": 1, "tokens": tokens}))
    for mode in ("cot", "distribution"):
        params = resolved(mode, thinker, end=[21, 30, 31]).params
        assert (params.end_token_ids, params.halt.stop_token_ids) == ((21, 30, 31), (21,))
        assert params.steps == 1000 - 50 - 30 - 3
        assert resolved(mode, thinker, end="none").params.end_token_ids == ()
    [warning] = resolved("cot", thinker, start=[5]).warnings
    assert "reasoning.start" in warning


def test_source_is_what_the_mode_can_feed() -> None:
    soft = resolved("distribution", make_model(), source="distribution")
    assert soft.parameters["source"] == {"value": "distribution", "source": "request"}
    assert soft.warnings == ()
    for mode, source in (("distribution", "constant"), ("latent", "distribution")):
        with pytest.raises(InvalidRequestError, match="must be") as caught:
            resolved(mode, make_model(), source=source)
        assert caught.value.param == "reasoning.source"


def test_request_wins_over_preset_over_manifest_over_default() -> None:
    model = make_model()
    plain = resolved("distribution", model)
    assert plain.params.mixture.top_k == 7
    assert plain.parameters["mixture.top_k"] == {"value": 7, "source": "manifest"}
    assert plain.parameters["mixture.min_p"]["source"] == "default"
    preset = resolved("distribution", model, preset="stochastic_soft")
    assert preset.params.mixture.top_k == 15
    assert preset.params.mixture.noise == "gumbel"
    assert preset.parameters["mixture.top_k"]["source"] == "preset"
    explicit = resolved("distribution", model, preset="stochastic_soft", mixture__top_k=3)
    assert explicit.params.mixture.top_k == 3
    assert explicit.parameters["mixture.top_k"]["source"] == "request"


@pytest.mark.parametrize("mode", mode_names())
@pytest.mark.parametrize("name", ASKED)
def test_setting_is_told_with_its_source_or_warned_of(name: str, mode: str) -> None:
    """Never both, never neither: what a mode looks at is said in one place."""
    special = {"mode": mode, "start": 7, "end": 7, "speed": 1, "preset": "swi"}
    own = ASKED[name]
    least = 0.5 if own.is_open else own.low
    value = special.get(name, own.default if own.high is None else least)
    model = make_model(Manifest(modes=[*mode_names()]), engine_modes=mode_names())
    fits = name != "source" or properties_of(mode).feeds is not Feeds.MIXTURE
    asked = {name: value} if fits else {name: "distribution"}
    result = resolve(
        mode, {} if name == "effort" else asked, model,
        effort="low" if name == "effort" else None, trace_bounds=("none", "vectors"),
        num_prompt_tokens=50, max_tokens=30, has_speed=True,
    )  # fmt: skip
    is_told = result.parameters.get(name, {"source": None})["source"] == "request"
    path = "reasoning_effort" if name == "effort" else f"reasoning.{name}"
    assert is_told != any(path in warning for warning in result.warnings)


def test_effort_scales_the_default_but_not_an_explicit_count() -> None:
    model = make_model()
    steps = {
        e: resolved("latent", model, e).params.steps for e in ("minimal", "low", "medium", "high")
    }
    assert steps == {"minimal": 2, "low": 3, "medium": 6, "high": 12}
    assert resolved("latent", model, "max").params.steps == 20
    assert resolved("latent", model, "high", steps=4).params.steps == 4


def test_model_without_think_tokens() -> None:
    model = make_model(None)
    assert model.modes == ("none", "cot", "distribution")
    assert model.default_mode == "cot"
    assert resolved("cot", model).params.steps == 0, "cot and none are the same"
    soft = resolved("distribution", model).params
    assert (soft.steps, soft.end_token_ids, soft.halt.stop_token_ids) == (4, (), ())


def test_untrained_model_gets_mild_defaults_and_a_warning() -> None:
    """The bug: SmolLM2 gave word salad in `distribution` and `auto`, and nothing said why."""
    model = make_model(None, engine_modes=("cot", "distribution", "auto"))
    for mode in ("distribution", "auto"):
        mild = resolved(mode, model)
        assert (mild.params.steps, mild.params.mixture.temperature) == (4, 0.3)
        assert mild.warnings == (
            f"mode {mode!r}: this model was not trained to think in soft tokens",
        )
        assert mild.parameters["steps"] == {"value": 4, "source": "default"}
        assert resolved(mode, model, "high").params.steps == 8
        assert resolved(mode, model, steps=0).warnings == ()
    assert resolved("auto", model).params.switch.rule == "confidence"
    assert resolved("auto", model, switch__window=4).params.switch.rule == "swi"
    own = resolved("distribution", model, mixture__top_k=3).params
    assert (own.steps, own.mixture.top_k, own.mixture.temperature) == (4, 3, 0.6)
    assert resolved("distribution", model, mixture__kind="full").params.mixture.temperature == 1.0
    preset = resolved("distribution", model, preset="soft_thinking")
    assert (preset.params.steps, preset.params.mixture.temperature) == (16, 0.6)
    assert "not trained" in preset.warnings[-1]


def test_trained_and_thinking_models_keep_the_published_defaults() -> None:
    trained = make_model(Manifest(modes=["distribution"]))
    result = resolved("distribution", trained)
    assert (result.params.steps, result.params.mixture.temperature) == (16, 0.6)
    assert result.warnings == ()
    tokens = {"think_start": {"id": 20}, "think_end": {"id": 21}}
    thinker = make_model(Manifest.model_validate({"schema": 1, "tokens": tokens}))
    result = resolved("distribution", thinker)
    assert (result.params.steps, result.params.mixture.temperature) == (919, 0.6)
    assert "not trained" in result.warnings[0]


def test_thinking_model_is_bounded_by_its_think_tokens() -> None:
    tokens = {"think_start": {"id": 20}, "think_end": {"id": 21}}
    model = make_model(Manifest.model_validate({"schema": 1, "tokens": tokens}))
    params = resolved("cot", model).params
    assert params.halt.stop_token_ids == (21,)
    assert params.end_token_ids == (21,)
    assert params.steps == 1000 - 50 - 30 - 1, "what is left after prompt and answer"
    assert resolved("cot", model, steps=8).params.steps == 8


def test_mode_that_the_model_lacks_is_refused_with_the_list() -> None:
    with pytest.raises(InvalidRequestError, match="none, cot, distribution") as caught:
        check_mode("latent", make_model(None), {})
    assert caught.value.code == "unsupported_reasoning_mode"
    with pytest.raises(InvalidRequestError, match="where the engine has it"):
        check_mode("latent", make_model(None), {"adapter": "realign"})
    able = replace(make_model(None), adapters=("realign",))
    check_mode("latent", able, {"adapter": "realign"})


def test_halt_rule_names_the_rules_that_are_on() -> None:
    tokens = {"think_start": {"id": 20}, "think_end": {"id": 21}}
    model = make_model(Manifest.model_validate({"schema": 1, "tokens": tokens}))
    cold: dict[str, Any] = {"halt__entropy_below": 0.1, "halt__entropy_above": 3.0, "steps": 9}

    def halt(mode: str, rule: Any, **asked: Any) -> Any:
        return resolved(mode, model, halt__rule=rule, **asked).params.halt

    every = halt("distribution", "auto", **cold)
    assert (every.stop_token_ids, every.entropy_below, every.entropy_above) == ((21,), 0.1, 3.0)
    one = halt("distribution", "cold_stop", **cold)
    assert (one.stop_token_ids, one.entropy_below, one.entropy_above) == ((), 0.1, 0.0)
    two = halt("cot", ["uncertain", "stop_token"], **cold)
    assert (two.stop_token_ids, two.entropy_below, two.entropy_above) == ((21,), 0.0, 3.0)
    off = resolved("cot", model, halt__rule=["stop_token"], **cold)
    [warning] = off.warnings
    assert warning.endswith("mode cot: reasoning.halt.entropy_above, reasoning.halt.entropy_below")


def test_fixed_takes_all_steps_in_every_mode() -> None:
    tokens = {"think_start": {"id": 20}, "think_end": {"id": 21}}
    model = make_model(Manifest.model_validate({"schema": 1, "tokens": tokens}))
    for mode in ("cot", "distribution"):
        result = resolved(mode, model, halt__rule="fixed", halt__entropy_below=1.0, steps=4)
        assert result.params.is_fixed
        assert not result.params.halt.may_halt
        assert result.parameters["halt.rule"] == {"value": "fixed", "source": "request"}
        assert "reasoning.halt.entropy_below" in result.warnings[0]
        assert not resolved(mode, model, steps=4).params.is_fixed


def test_rule_that_is_named_needs_its_setting() -> None:
    model = make_model()
    latent = resolved("latent", model, halt__rule="stop_token")
    assert latent.params.halt.stop_token_ids == (11,), "the manifest's end token"
    assert latent.parameters["halt.stop_tokens"] == {"value": (11,), "source": "manifest"}
    for rule, name in (
        ("stop_token", "stop_tokens"), ("cold_stop", "entropy_below"), ("learned", "rule"),
        ("uncertain", "entropy_above"), ("converged", "converge_metric"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequestError) as caught:
            resolved("latent", model, end="none", halt__rule=[rule])
        assert caught.value.param == f"reasoning.halt.{name}"


def test_tokens_may_be_named_by_their_text() -> None:
    model = replace(make_model(None), encode=lambda text: [ord(c) for c in text])
    model = replace(model, adapters=("realign",))
    named = resolved("distribution", model, halt__stop_tokens=["a", 7]).params
    assert named.halt.stop_token_ids == (97, 7)
    with pytest.raises(InvalidRequestError, match="'ab' is no single token") as caught:
        resolved("distribution", model, halt__stop_tokens=["ab"])
    assert caught.value.param == "reasoning.halt.stop_tokens"
    later = resolved("latent", replace(model, encode=lambda _: [5]), preset="later_free").params
    assert (later.steps, later.adapter, set(later.halt.stop_token_ids)) == (96, "realign", {5})
    swi = resolved("auto", model, preset="swi").params.switch
    assert {ord("x"), ord("7"), ord("+")} <= {*swi.hard_token_ids}
    assert swi.newline_token_id == ord("\n")
    words = replace(model, encode=lambda text: [ord(c) for c in text] * (2 if text == "x" else 1))
    maths = resolved("auto", words, switch__hard_tokens="math")
    assert {*maths.params.switch.hard_token_ids} == {*swi.hard_token_ids} - {ord("x")}
    assert maths.parameters["switch.hard_tokens"] == {"value": "math", "source": "request"}
    assert resolved("auto", model, preset="swi", switch__hard_tokens="none").params.switch == (
        replace(swi, hard_token_ids=())
    )
    with pytest.raises(InvalidRequestError, match="'x' is no single token"):
        resolved("auto", words, switch__hard_tokens=["x"])


def test_budget_of_switches_brings_the_final_words_and_a_bound() -> None:
    """SwiReasoning's: </think>, "The final answer is", 32 more tokens; an own `end` stays."""
    tokens = {"think_start": {"id": 20}, "think_end": {"id": 21}}
    thinker = make_model(Manifest.model_validate({"schema": 1, "tokens": tokens}))
    model, end = replace(thinker, encode=lambda _: [1, 2, 3]), 21
    plain = resolved("auto", model).params.switch
    assert (plain.max_switches, plain.answer_tokens, plain.final_token_ids) == (0, 0, ())
    bound = resolved("auto", model, switch__max_switches=2, halt__rule="fixed").params
    assert (bound.switch.answer_tokens, bound.switch.final_token_ids) == (32, (end, 1, 2, 3))
    assert not bound.is_fixed, "the phase may end before its steps"
    assert bound.max_thinking == bound.steps + 4
    assert bound.max_thinking + 50 + 30 <= 1000
    own = resolved("auto", model, switch__max_switches=2, switch__answer_tokens=5, end=[9])
    assert (own.params.switch.answer_tokens, own.params.switch.final_token_ids) == (5, ())
    long = replace(model, encode=lambda _: [1] * 8)
    assert resolved("auto", long, switch__max_switches=2).params.switch.final_token_ids == ()
    without = resolved("auto", make_model(None), switch__max_switches=2).params.switch
    assert (without.answer_tokens, without.final_token_ids) == (0, ())


def test_auto_takes_every_mixture_but_swi_none() -> None:
    model = make_model(Manifest(modes=["auto"]))
    for rule in ("none", "confidence"):
        result = resolved("auto", model, switch__rule=rule, mixture__kind="moi")
        assert (result.params.switch.rule, result.params.mixture.top_k) == (rule, 20)
        assert result.parameters["switch.rule"] == {"value": rule, "source": "request"}
        assert result.warnings == ()
        with pytest.raises(InvalidRequestError, match="trained gate"):
            resolved("auto", model, switch__rule=rule, mixture__kind="gated")
    swi = resolved("auto", model, mixture__top_k=3)
    assert swi.warnings == ("without effect in mode auto: reasoning.mixture.top_k",)
    assert "mixture.top_k" not in swi.parameters


def test_echo_is_what_the_engine_gets_and_whose_it_is() -> None:
    """Steps of a manifest were "default"; adapter, start and end were the word "auto"."""
    latent = resolved("latent", make_model()).parameters
    assert latent["mode"] == {"value": "latent", "source": "manifest"}
    assert latent["steps"] == {"value": 6, "source": "manifest"}
    assert latent["start"] == {"value": (10,), "source": "manifest"}
    assert latent["end"] == {"value": (11,), "source": "manifest"}
    assert latent["adapter"] == {"value": "none", "source": "default"}
    assert latent["select"] == {"value": "first", "source": "default"}
    assert latent["preset"] == latent["effort"] == {"value": None, "source": "default"}
    low = resolved("latent", make_model(), "low", preset="coconut").parameters
    assert low["steps"] == {"value": 3, "source": "effort"}
    assert low["effort"] == {"value": "low", "source": "request"}
    assert low["preset"] == {"value": "coconut", "source": "request"}
    tokens = {"think_start": {"id": 20}, "think_end": {"id": 21}}
    thinker = make_model(Manifest.model_validate({"schema": 1, "tokens": tokens}))
    soft = resolved("distribution", thinker, halt__stop_tokens=[7]).parameters
    assert soft["halt.stop_tokens"] == {"value": (21, 7), "source": "request"}
    plain = resolved("distribution", thinker).parameters
    assert plain["halt.stop_tokens"] == {"value": (21,), "source": "manifest"}
    assert resolved("none", thinker).parameters["steps"] == {"value": 0, "source": "default"}


@pytest.mark.parametrize(
    ("kind", "ignored"),
    [
        ("full", {"noise": "gumbel", "top_k": 3, "top_p": 0.5, "min_p": 0.1, "filter_top_k": 4}),
        ("moi", {"noise": "gumbel", "top_p": 0.5, "min_p": 0.1, "weights": "equal"}),
        ("multiplex", {"noise": "dirichlet", "moi_beta": 2.0, "dirichlet_alpha": 1.0}),
        ("topk", {"weights": "equal", "replacement": False, "moi_beta": 2.0}),
        ("topk", {"noise_clamp": [-1, 1], "dirichlet_alpha": 2.0, "noise_temperature": 1.0}),
    ],
)
def test_settings_that_a_kind_of_mixture_ignores_are_named(
    kind: str, ignored: dict[str, Any]
) -> None:
    """They were taken in silence, and noise that a kind has not made branches seem to differ."""
    asked = {f"mixture__{name}": value for name, value in ignored.items()}
    result = resolved("distribution", make_model(None), mixture__kind=kind, **asked)
    assert result.params.mixture.noise == "none"
    warned = " ".join(result.warnings)
    assert "without effect with mixture." in warned
    for name in ignored:
        assert f"reasoning.mixture.{name}" in warned
        assert f"mixture.{name}" not in result.parameters


def test_only_mixtures_of_the_drawn_token_go_on_in_the_answer() -> None:
    for kind in ("moi", "topk"):
        asked: dict[str, Any] = {"mixture__kind": kind, "mixture__in_answer": True}
        result = resolved("distribution", make_model(None), **asked)
        assert result.params.mixture.in_answer == (kind == "moi")
        assert any("in_answer" in warning for warning in result.warnings) == (kind == "topk")
    drawn = MixtureParams(kind="moi", in_answer=True)
    soft = MixtureParams(kind="topk", in_answer=True)
    for mode, mixture in (("distribution", soft), ("auto", drawn), ("latent", drawn)):
        with pytest.raises(InvalidRequestError) as caught:
            check_params(ReasoningParams(mode=mode, steps=1, mixture=mixture))
        assert caught.value.param == "reasoning.mixture.in_answer"


def test_bound_of_all_positions_goes_through_in_every_mode() -> None:
    for mode in ENGINE_MODES:
        result = resolved(mode, make_model(), max_total_steps=7)
        assert result.params.max_total_steps == 7
        assert result.parameters["max_total_steps"] == {"value": 7, "source": "request"}
        plain = resolved(mode, make_model())
        assert plain.params.max_total_steps == 0
        assert plain.parameters["max_total_steps"] == {"value": None, "source": "default"}


def test_server_can_force_a_trace() -> None:
    def level(asked: dict[str, Any]) -> tuple[str, str]:
        found = resolve(
            "latent",
            asked,
            make_model(),
            effort=None,
            trace_bounds=("summary", "topk"),
            num_prompt_tokens=50,
            max_tokens=30,
        )
        assert found.parameters["trace"]["value"] == found.params.trace
        return found.params.trace, found.parameters["trace"]["source"]

    assert level({}) == ("summary", "server")
    assert level({"trace": "none"}) == ("summary", "server")
    assert level({"trace": "topk"}) == ("topk", "request")
    with pytest.raises(InvalidRequestError, match="at most 'topk'"):
        level({"trace": "vectors"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"default_mode": "latent"}, "default_mode 'latent' is not in modes"),
        ({"modes": ["cot", "dreamt"]}, "modes: 'dreamt' is none of none, cot, "),
        ({"prompt": {"mode_suffix_ids": {"latent": [1]}}}, "mode_suffix_ids: latent is not"),
        (
            {"modes": ["latent"], "prompt": {"mode_suffix_ids": {"latent": [1]}}},
            "mode_suffix_ids: latent has prompt.suffix_ids",
        ),
        (
            {"modes": ["cot"], "prompt": {"mode_suffix_ids": {"none": [1]}}},
            "mode_suffix_ids: none is not in modes",
        ),
        (
            {
                "distribution": {"slots": "latent"},
                "prompt": {"mode_suffix_ids": {"distribution": [1]}},
            },
            "mode_suffix_ids: distribution has prompt.suffix_ids",
        ),
    ],
)
def test_modes_of_a_manifest_that_cannot_be_served_are_refused(
    data: dict[str, Any], message: str
) -> None:
    with pytest.raises(StartupError, match=f"latent_config.json: .*{message}"):
        declared_modes(Manifest.model_validate({"schema": 1, **data}))


def test_server_can_narrow_the_modes() -> None:
    model = make_model(allowed_modes=("none", "cot"))
    assert model.modes == ("none", "cot")
    assert model.default_mode == "cot"
    with pytest.raises(StartupError, match="--default-reasoning-mode"):
        make_model(None, default_mode="latent")


def test_trace_is_limited_by_the_server() -> None:
    assert resolved("latent", make_model(), trace="topk").params.trace == "topk"
    with pytest.raises(InvalidRequestError, match="--max-trace"):
        resolved("latent", make_model(), trace="vectors")

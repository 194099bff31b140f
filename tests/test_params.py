"""Settings are declared once: what is read off the declarations, and what they refuse."""

from dataclasses import fields, replace
from typing import Any

import pytest

from coconut_serve.declare import Declared, map_token_ids, settings_of, token_ids
from coconut_serve.engines.base import EngineInfo, check_request
from coconut_serve.errors import InvalidRequestError
from coconut_serve.params import (
    ASKED,
    SAMPLED,
    HaltParams,
    MixtureParams,
    ReasoningParams,
    RequestOnly,
    SamplingParams,
    SwitchParams,
)
from coconut_serve.server.reasoning_body import ReasoningBody, flatten_reasoning
from coconut_serve.server.schemas import ChatRequest
from coconut_serve.service.presets import MIXTURES, NOISES, PRESETS, UNTRAINED
from tests.fakes import make_request

RECORDS = (SamplingParams, MixtureParams, HaltParams, SwitchParams, ReasoningParams, RequestOnly)
INFO = EngineInfo(
    engine="stub", vocab_size=128, max_model_len=64, kv_cache_positions=64, block_size=16,
    modes=("none", "latent"),
)  # fmt: skip
# One record with a token id in every field that can hold one.
EVERYWHERE = ReasoningParams(
    mode="latent", steps=2, end_token_ids=(11,), enter_token_id=12, constant_token_id=13,
    replay_token_ids=(14,),
    halt=HaltParams(stop_token_ids=(15,), learned_token_ids=(16, 17)),
    switch=SwitchParams(
        final_token_ids=(18,), hard_token_ids=(19,), think_token_id=20, end_token_id=21,
        newline_token_id=22,
    ),
)  # fmt: skip


@pytest.mark.parametrize("kind", RECORDS)
def test_every_field_is_declared_with_a_line_for_people(kind: type[Declared]) -> None:
    for name, own in settings_of(kind).items():
        assert own.doc.endswith("."), (kind, name)
        is_number = own.type in (int, float) and own.asked is not None
        assert not is_number or own.low is not None, f"{kind.__name__}.{name} has no range"


def test_every_setting_is_a_field_of_the_request() -> None:
    for name in ASKED:
        body: Any = ReasoningBody
        *parts, last = name.split(".")
        for part in parts:
            [body] = [t for t in body.model_fields[part].annotation.__args__ if t is not type(None)]
        assert last in body.model_fields, name
    assert {*SAMPLED} <= {*ChatRequest.model_fields}


def test_records_begin_with_what_their_own_ranges_allow() -> None:
    for kind in RECORDS:
        kind()  # none raises


@pytest.mark.parametrize("name", [name for name, own in ASKED.items() if own.high is not None])
def test_bounds_are_those_of_requests_and_of_records(name: str) -> None:
    """Both read one declaration; each bound is allowed, what is beyond it refused by its path."""
    own = ASKED[name]
    assert own.low is not None
    assert own.high is not None
    step = 1 if own.type is int else 0.5
    assert not own.complaint(own.high)
    assert bool(own.complaint(own.low)) == own.is_open
    for value in (own.low - step, own.high + max(step, own.high * 1e-6)):
        with pytest.raises(InvalidRequestError) as caught:
            own.check(value, f"reasoning.{name}")
        assert caught.value.param == f"reasoning.{name}"


def test_presets_and_defaults_by_kind_are_settings_within_their_ranges() -> None:
    found = [item for preset in PRESETS.values() for item in preset.items()]
    found += UNTRAINED.items()
    for group in (MIXTURES, NOISES):
        found += [(f"mixture.{n}", value) for own in group.values() for n, value in own.items()]
    for name, value in found:
        ASKED[name].check(value, name)


def test_what_a_request_leaves_out_is_read_off_the_declaration() -> None:
    """The default itself, a word that the request could say, or None where it depends."""
    unsaid = {name: own.unsaid for name, own in ASKED.items()}
    assert (unsaid["halt.rule"], unsaid["branches"], unsaid["switch.window"]) == ("auto", 1, 512)
    assert (unsaid["end"], unsaid["adapter"], unsaid["switch.hard_tokens"]) == (
        "auto", "auto", "none",
    )  # fmt: skip
    for name in ("mode", "steps", "seed", "source", "max_blocks", "max_total_steps", "after.top_p"):
        assert unsaid[name] is None, name


@pytest.mark.parametrize(
    ("body", "near"),
    [
        ({"top_k": 3}, "reasoning.mixture.top_k"),
        ({"switch": {"windw": 3}}, "reasoning.switch.window"),
        ({"halt": {"entropy_bellow": 1.0}}, "reasoning.halt.entropy_below"),
    ],
)
def test_misspelt_setting_is_answered_with_the_nearest_path(
    body: dict[str, Any], near: str
) -> None:
    with pytest.raises(InvalidRequestError, match="did you mean") as caught:
        flatten_reasoning(ReasoningBody.model_validate(body))
    assert repr(near) in caught.value.message


def test_token_ids_are_found_wherever_they_are() -> None:
    """Five lists by hand said where ids are; none but one knew `switch.final_token_ids`."""
    found = [token_id for _, ids in token_ids(EVERYWHERE) for token_id in ids]
    assert sorted(found) == [*range(11, 23)]
    moved = map_token_ids(EVERYWHERE, lambda token_id: token_id - 10)
    assert sorted(i for _, ids in token_ids(moved) for i in ids) == [*range(1, 13)]
    assert [*token_ids(SwitchParams())][-1] == ("reasoning.switch", ()), "-1 is no token"


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (ReasoningParams(end_token_ids=(999,)), "reasoning.end"),
        (ReasoningParams(switch=SwitchParams(final_token_ids=(999,))),
         "reasoning.switch.max_switches"),
        (ReasoningParams(switch=SwitchParams(newline_token_id=999)), "reasoning.switch"),
        (ReasoningParams(halt=HaltParams(learned_token_ids=(1, 999))), "reasoning.halt.learned"),
    ],
)  # fmt: skip
def test_token_ids_outside_the_vocabulary_are_refused(params: ReasoningParams, param: str) -> None:
    request = replace(make_request(), reasoning=params)
    with pytest.raises(InvalidRequestError) as caught:
        check_request(request, INFO)
    assert caught.value.param == param


def test_names_of_nested_settings_are_unique() -> None:
    """They share one flat namespace in vLLM's extra_args and one table on the device."""
    kinds = (ReasoningParams, MixtureParams, HaltParams, SwitchParams)
    names = [each.name for kind in kinds for each in fields(kind)]
    assert len(names) == len({*names})

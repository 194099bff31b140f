"""What a page shows of a step, and bounds from outside."""

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from coconut_serve.buckets import BUCKETS, parse_buckets
from coconut_serve.errors import StartupError
from coconut_serve.metrics import WAIT_REASONS, Metrics
from coconut_serve.types import StepStats
from tests.fakes import make_metrics

STATS = StepStats(
    seconds=0.0,
    num_rows={},
    num_prefill_positions=0,
    num_running={},
    num_waiting={"latent": 3, "cot": 1},
    num_preemptions=0,
    num_free_blocks=0,
    num_cached_blocks=0,
    num_used_blocks=0,
    num_prefix_queries=0,
    num_prefix_hits=0,
)


def test_waiting_sequences_stand_under_one_reason_at_a_time() -> None:
    metrics = make_metrics()
    for reason in WAIT_REASONS:
        metrics.observe_step(replace(STATS, wait_reason=reason))
        shown = {
            (s.labels["reasoning_mode"], s.labels["reason"]): s.value
            for s in next(iter(metrics.waiting.collect())).samples
            if s.value
        }
        assert shown == {("latent", reason): 3, ("cot", reason): 1}


def test_mean_step_follows_steps_and_not_reports_without_rows() -> None:
    metrics = make_metrics()
    assert metrics.mean_step_seconds == 0
    metrics.observe_step(replace(STATS, seconds=0.5, num_rows={("cot", "decode"): 2}))
    metrics.observe_step(STATS)  # as when the engine falls idle
    assert metrics.mean_step_seconds == 0.5
    for _ in range(100):
        metrics.observe_step(replace(STATS, seconds=0.02, num_rows={("cot", "decode"): 2}))
    assert metrics.mean_step_seconds == pytest.approx(0.02, rel=0.01)


def test_bounds_of_a_family_are_replaced_and_others_kept() -> None:
    buckets = parse_buckets('{"inter_token_latency": [0.5, 2]}')
    registry = CollectorRegistry()
    metrics = Metrics(registry, model_name="m", engine="stub", modes=["cot"], buckets=buckets)
    assert metrics.itl._kwargs["buckets"] == metrics.tpot._kwargs["buckets"] == (0.5, 2)
    assert metrics.ttft._kwargs["buckets"] == BUCKETS["time_to_first_token"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latent_steps=1", "takes a JSON object"),
        ("[1, 2]", "takes a JSON object"),
        ('{"latency": [1]}', "'latency' is not one of time_to_first_token, "),
        ('{"latent_steps": 1}', "latent_steps: give rising numbers"),
        ('{"latent_steps": []}', "give rising numbers"),
        ('{"latent_steps": ["1"]}', "give rising numbers"),
        ('{"latent_steps": [true]}', "give rising numbers"),
        ('{"latent_steps": [-1, 1]}', "give rising numbers"),
        ('{"latent_steps": [1, 1]}', "give rising numbers"),
        ('{"latent_steps": [1, NaN, 2]}', "give rising numbers"),
        ('{"latent_steps": [1, Infinity]}', "give rising numbers"),
    ],
)
def test_bad_bounds_are_refused(text: str, message: str) -> None:
    with pytest.raises(StartupError, match=message) as caught:
        parse_buckets(text)
    assert caught.value.param == "--custom-histogram-buckets"

"""The line of every ten seconds, and vLLM's names."""

import asyncio
import logging

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from coconut_serve.server.stats import log_stats
from coconut_serve.server.vllm_aliases import ALIASES, VllmAliases
from tests.fakes import listening, make_metrics, stub_app


async def test_stats_line_tells_rates_and_falls_silent_when_idle(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="coconut_serve.server.stats")
    metrics = make_metrics()
    task = asyncio.create_task(log_stats(metrics, interval_seconds=0.05))
    await asyncio.sleep(0)
    metrics.add(metrics.latent_steps, 3, "latent")
    metrics.add(metrics.reasoning_tokens, 5, "cot")
    metrics.add(metrics.requests, 4, "unknown", "chat", "rejected")
    metrics.add(metrics.rejections, 4, "queue_full")
    metrics.set(metrics.running, 2, "latent")
    async with asyncio.timeout(5):
        while not caplog.records:
            await asyncio.sleep(0.01)
        first = caplog.records[0]
        metrics.set(metrics.running, 0, "latent")
        await asyncio.sleep(0.3)
    task.cancel()
    assert "2 running, 0 waiting" in first.getMessage()
    told = vars(first)
    assert told["latent_steps_per_second"] > 0
    assert told["rejected_per_second"] > told["ended_per_second"] == 0
    assert told["thinking_steps_per_second"] > told["latent_steps_per_second"]
    assert len(caplog.records) <= 3, "one line tells that it became idle, then none"


async def test_vllm_names_show_the_same_numbers() -> None:
    app = stub_app()
    VllmAliases(app.state.metrics)
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as http:
        for mode in ("latent", "cot"):
            body = {"prompt": "abc", "max_tokens": 4, "reasoning_mode": mode}
            await http.post("/v1/completions", json=body)
        await http.post("/v1/completions", json={"prompt": ""})  # rejected: none of vLLM's reasons
        text = (await http.get("/metrics")).text
    families = {f.name: f for f in text_string_to_metric_families(text)}
    assert {f"vllm:{name}" for name in ALIASES} <= families.keys()
    finished = {
        s.labels["finished_reason"]: s.value for s in families["vllm:request_success"].samples
    }
    assert finished == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    first = {s.labels.get("le"): s for s in families["vllm:time_to_first_token_seconds"].samples}
    assert first["+Inf"].value == 2
    assert first["+Inf"].labels.keys() == {"model_name", "engine", "le"}
    [answer] = [s for s in families["vllm:generation_tokens"].samples if s.name.endswith("_total")]
    ours = sum(
        s.value
        for name in ("coconut_generation_tokens", "coconut_reasoning_tokens")
        for s in families[name].samples
    )
    assert answer.value == ours
    assert ours >= 8

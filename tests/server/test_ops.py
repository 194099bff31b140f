"""Models, probes, version, metrics, tokens."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from coconut_serve.checkpoint.manifest import Manifest
from coconut_serve.config import ServeConfig, StubConfig
from coconut_serve.errors import StartupError
from coconut_serve.metrics import Metrics
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.server.app import create_app
from coconut_serve.service.service import Service
from tests.fakes import listening, make_metrics, stub_app


@contextlib.asynccontextmanager
async def long_stream(url: str) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of a stream of 400 tokens, from its second on."""
    body = {"prompt": "abc", "max_tokens": 400, "stream": True}
    async with (
        httpx.AsyncClient(base_url=url) as c,
        c.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        yield lines


async def test_models_are_listed_with_a_row_for_each_mode(client: openai.AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [m.id for m in models] == ["m", *(f"m:{mode}" for mode in mode_names())]
    one = await client.models.retrieve("m:latent")
    assert one.model_extra is not None
    assert one.model_extra["reasoning_mode"] == "latent"
    assert one.model_extra["reasoning_modes"] == list(mode_names())
    assert one.model_extra["manifest"]["schema"] == 1
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


async def test_models_say_what_they_can_be_asked() -> None:
    manifest = Manifest.model_validate({"modes": ["none"], "prompt": {"example": "a or b?"}})
    async with listening(stub_app(manifest=manifest)) as url, httpx.AsyncClient(base_url=url) as c:
        for model in (await c.get("/v1/models")).json()["data"]:
            assert model["example"] == "a or b?"


async def test_version_tells_limits(http: httpx.AsyncClient) -> None:
    body = (await http.get("/version")).json()
    assert body["engine"] == "stub"
    assert body["commit"] == "unknown"
    assert body["limits"]["max_model_len"] == 512
    assert body["modes"] == list(mode_names())


async def test_tokenize_and_back(http: httpx.AsyncClient) -> None:
    body = (await http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True})).json()
    assert body["tokens"] == list("hé".encode())
    assert body["count"] == 3
    assert len(body["token_strs"]) == 3
    back = await http.post("/detokenize", json={"tokens": body["tokens"]})
    assert back.json() == {"prompt": "hé"}
    messages = [{"role": "user", "content": "x"}]
    chat = (await http.post("/tokenize", json={"messages": messages})).json()
    assert bytes(chat["tokens"]).decode() == "user: x\nassistant: "
    for bad in ({}, {"prompt": "a", "messages": messages}):
        assert (await http.post("/tokenize", json=bad)).status_code == 400
    assert (await http.post("/detokenize", json={"tokens": [999]})).status_code == 400


async def test_tokenize_gives_what_chat_feeds() -> None:
    """With a manifest's question template too, which needs no chat template."""
    manifest = Manifest.model_validate(
        {"modes": ["none"], "prompt": {"template": "Q: {question}\n", "chat_template": False}}
    )
    messages = [{"role": "user", "content": "why?"}]
    async with listening(stub_app(manifest=manifest)) as url, httpx.AsyncClient(base_url=url) as c:
        told = (await c.post("/tokenize", json={"messages": messages})).json()["tokens"]
        body = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
        answer = (await c.post("/v1/chat/completions", json=body)).json()
    assert bytes(told).decode() == "Q: why?\n"
    assert told == answer["prompt_token_ids"]


async def test_metrics_count_by_mode(http: httpx.AsyncClient) -> None:
    for mode in ("latent", "distribution"):
        body = {"prompt": "abc", "max_tokens": 4, "reasoning_mode": mode, "reasoning": {"steps": 3}}
        assert (await http.post("/v1/completions", json=body)).status_code == 200
    await http.post("/v1/completions", json={"prompt": ""})
    text = (await http.get("/metrics")).text
    values = {
        (s.name, s.labels.get("reasoning_mode"), s.labels.get("outcome") or s.labels.get("code")): s
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.labels.get("endpoint", "completions") == "completions"
    }
    assert values["coconut_requests_total", "latent", "length"].value == 1
    assert values["coconut_latent_steps_total", "latent", None].value == 3
    assert values["coconut_generation_tokens_total", "distribution", None].value == 4
    assert values["coconut_time_to_first_token_seconds_count", "latent", None].value == 1
    assert values["coconut_inter_token_latency_seconds_count", "latent", None].value == 3
    assert values["coconut_request_errors_total", None, "invalid_value"].value == 1
    assert values["coconut_engine_up", None, None].value == 1
    assert values["coconut_kv_cache_usage_ratio", None, None].value == 0
    assert all(name.startswith(("coconut_", "python_")) for name, _, _ in values)


async def test_metric_series_are_there_from_the_start_and_bounded(http: httpx.AsyncClient) -> None:
    text = (await http.get("/metrics")).text
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
    modes = {s.labels["reasoning_mode"] for s in samples if "reasoning_mode" in s.labels}
    assert modes == {*mode_names(), "unknown"}
    assert len(samples) < 3000


async def test_rejected_requests_are_counted_under_the_mode_they_name() -> None:
    app = stub_app(max_model_len=32)
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as c:
        for body in (
            {"prompt": "a" * 40, "max_tokens": 1, "reasoning_mode": "latent"},
            {"prompt": "a", "n": 99},
            {"prompt": 5, "reasoning_mode": "latent"},  # not read as far as the mode
        ):
            assert (await c.post("/v1/completions", json=body)).status_code == 400
        refused = [
            await c.post("/v1/completions", json={"prompt": "a", "model": "another"}),
            await c.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}),
            await c.post("/v1/completions", content=b"[" * 5_000_000),
        ]
        assert [r.status_code for r in refused] == [404, 415, 413]
        app.state.service.admission.is_draining = True
        assert (await c.post("/v1/chat/completions", json={})).status_code == 503
    metrics: Metrics = app.state.metrics
    counts = {
        tuple(s.labels[name] for name in ("reasoning_mode", "endpoint")): s.value
        for s in next(iter(metrics.requests.collect())).samples
        if s.name.endswith("_total") and s.labels["outcome"] == "rejected" and s.value
    }
    assert counts == {
        ("latent", "completions"): 1,
        ("unknown", "completions"): 5,
        ("unknown", "chat"): 1,
    }
    assert metrics.total(metrics.rejections) == 7 == metrics.total(metrics.requests)


async def test_outcome_is_what_the_client_was_told() -> None:
    """A stop string that the last allowed token completes ends the answer by "stop"."""
    app = stub_app()
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as c:
        body = {"prompt": "abc", "max_tokens": 3, "stop": ["bc"]}
        answer = (await c.post("/v1/completions", json=body)).json()
        text = (await c.get("/metrics")).text
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("a", "stop")
    assert 'outcome="stop",reasoning_mode="cot"} 1.0' in text
    assert 'outcome="length",reasoning_mode="cot"} 0.0' in text


async def test_sequence_that_outlasts_the_drain_ends_by_deadline() -> None:
    app = stub_app(stub=StubConfig(tokens_per_second=50.0))
    async with listening(app) as url, long_stream(url) as lines:
        app.state.service.admission.is_overdue = True  # as the drain does
        await app.state.service.engine.stop()
        rest = [line async for line in lines]
    assert "engine_dead" in rest[-4]
    child = app.state.metrics.requests.labels("m", "stub", "cot", "completions", "deadline")
    assert child._value.get() == 1


async def test_cancelled_request_is_counted_with_its_waste() -> None:
    app = stub_app(stub=StubConfig(tokens_per_second=50.0))
    async with listening(app) as url:
        async with long_stream(url):
            pass
        metrics = app.state.metrics
        child = metrics.cancelled.labels("m", "stub", "cot", "decode")
        async with asyncio.timeout(5):
            while child._value.get() == 0:
                await asyncio.sleep(0.01)
        assert metrics.wasted_tokens.labels("m", "stub", "cot")._value.get() >= 1


async def test_loading_server_is_alive_but_not_ready() -> None:
    release = asyncio.Event()

    async def load(metrics: Metrics) -> Service:
        await release.wait()
        raise StartupError("no such model")

    failures: list[object] = []
    config, metrics = ServeConfig(served_model_name="m"), make_metrics()
    app = create_app(config, load=load, metrics=metrics)
    app.state.on_loaded = failures.append
    transport = httpx.ASGITransport(app=app)
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as c:
            assert (await c.get("/health")).status_code == 200
            response = await c.get("/ready")
            assert response.status_code == 503
            assert response.headers["retry-after"]
            response = await c.post("/v1/completions", json={"prompt": "a"})
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "not_ready"
            assert metrics.rejections.labels("m", "stub", "loading")._value.get() == 1
        release.set()
        await asyncio.sleep(0.05)
    assert isinstance(failures[0], StartupError)


async def test_silent_phase_is_bridged_by_keep_alive_comments() -> None:
    app = stub_app(stub=StubConfig(ttft_seconds=0.3), keep_alive_seconds=0.05)
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as c:
        body = {"prompt": "abc", "max_tokens": 2, "stream": True}
        response = await c.post("/v1/completions", json=body)
        assert response.text.count(": keep-alive\n\n") >= 2
        assert response.text.endswith("data: [DONE]\n\n")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"


async def test_ignored_fields_of_tokenize_are_named(http: httpx.AsyncClient) -> None:
    response = await http.post("/tokenize", json={"prompt": "a", "foo": 1})
    assert response.headers["x-coconut-ignored-params"] == "foo"

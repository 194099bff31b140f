"""Clients cannot make series: every label comes from a closed list."""

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes import stub_app

_KNOWN = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT")


def series(app: FastAPI) -> set[str]:
    """Every series that a scrape shows."""
    samples = (s for family in app.state.metrics.registry.collect() for s in family.samples)
    return {f"{s.name}{sorted(s.labels.items())}" for s in samples}


def paths(app: FastAPI) -> list[str]:
    found = [path.replace("{name}", "x") for path in app.openapi()["paths"]]
    assert len(found) > 8
    return found


@pytest.mark.parametrize("api_keys", [(), ("secret",)])
async def test_invented_methods_paths_and_modes_add_no_series(api_keys: tuple[str, ...]) -> None:
    """4,000 invented methods without a key made 120,030 series and a page of 15.7 MB."""
    app = stub_app(api_keys=api_keys)
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        targets = [*paths(app), "/nowhere", "/openapi.json"]

        async def flood(first: int, count: int) -> None:
            for i in range(first, first + count):
                path = targets[i % len(targets)]
                headers = {"X-Reasoning-Mode": f"mode{i}", "X-Request-Id": f"id{i}"}
                await client.request(f"METHOD{i}", path, headers=headers)
                if i % 4 == 0:
                    body = {"prompt": "a", "model": f"model{i}", f"field{i}": 1}
                    await client.post("/v1/completions", json=body, headers=headers)
                    await client.get(f"/v1/models/name{i}")
                    await client.get(f"/path{i}")

        await flood(0, 3 * len(targets))
        before = series(app)
        await flood(1000, 4000)
        assert series(app) - before == set()


async def test_series_of_a_pod_are_bounded() -> None:
    """Whatever is asked of whichever route."""
    app = stub_app()
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        for path in (*paths(app), "/nowhere", "/openapi.json"):
            for method in _KNOWN:
                await client.request(method, path, content=b"{}")
        page = (await client.get("/metrics")).text
    shown = [s for family in text_string_to_metric_families(page) for s in family.samples]
    assert len(shown) < 3000
    assert not [s.name for s in shown if s.name.endswith("_created")]
    methods = {s.labels["method"] for s in shown if "method" in s.labels}
    assert methods == {"GET", "HEAD", "POST", "other"}


async def test_openmetrics_page_has_no_created_series_either() -> None:
    app = stub_app()
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        page = await client.get("/metrics", headers=accept)
    assert page.headers["content-type"].startswith("application/openmetrics-text")
    assert "coconut_requests_total" in page.text
    assert "_created{" not in page.text

"""Clients that do not read, and what waits for them."""

import asyncio
import json
import socket

import httpx

from coconut_serve.config import StubConfig
from tests.fakes import listening, stub_app


async def test_client_that_reads_nothing_is_dropped_and_its_places_are_free() -> None:
    app = stub_app(max_model_len=60_000, max_send_seconds=0.3)
    body: dict[str, object] = {"prompt": "abc", "max_tokens": 8_000, "stream": True}
    body["stream_options"] = {"continuous_usage_stats": True}  # makes chunks large
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n"
    async with listening(app) as url:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + payload)
            metrics, service = app.state.metrics, app.state.service
            drops = metrics.slow_drops.labels("m", "stub")
            async with asyncio.timeout(30):
                while drops._value.get() == 0 or service.admission.num_in_flight:
                    await asyncio.sleep(0.02)
        assert metrics.buffered.labels("m", "stub")._value.get() == 0
        async with httpx.AsyncClient(base_url=url) as http:
            answer = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert answer.status_code == 200
            text = (await http.get("/metrics")).text
            await http.request("PUT", "/nowhere")
            text = (await http.get("/metrics")).text
    assert 'route="/v1/completions",status="200"} 2.0' in text
    assert 'method="other",model_name="m",route="other",status="404"} 1.0' in text
    assert "coconut_config_info{" in text


async def test_full_server_refuses_before_it_reads_the_request() -> None:
    app = stub_app(max_num_seqs=1, max_queue=0)
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as http:
        places = app.state.service.admission.acquire(1, max_positions=8)
        refused = await http.post("/v1/completions", content=b"no json at all")
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "queue_full"
        app.state.service.admission.release(places)
        assert (await http.post("/v1/completions", content=b"no json")).status_code == 400
        text = (await http.get("/metrics")).text
    assert (
        'admission_rejections_total{engine="stub",model_name="m",reason="queue_full"} 1.0' in text
    )
    assert 'route="/v1/completions",status="429"} 1.0' in text


async def test_retry_after_tells_how_long_what_runs_will_take() -> None:
    """It was 1 as long as nothing had ended: clients came back in vain, ten times over."""
    app = stub_app(stub=StubConfig(tokens_per_second=40.0), max_num_seqs=1, max_queue=0)
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as http:
        body = {"prompt": "abc", "max_tokens": 400, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as running:
            lines = running.aiter_lines()  # dropped, it would close the response
            await anext(lines)
            refused = await http.post("/v1/completions", json=body)
            full = await http.get("/ready")
    assert (refused.status_code, full.status_code) == (429, 503)
    for answer in (refused, full):
        assert 8 <= int(answer.headers["retry-after"]) <= 10  # of 400 steps of 25 ms

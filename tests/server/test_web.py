"""What browsers, probes and line readers ask of HTTP."""

import json
from typing import Any

import httpx
import openai
import pytest

from coconut_serve.cli import parse_args
from coconut_serve.config import Settings
from coconut_serve.loading import serve_config
from tests.fakes import listening, stub_app

ORIGIN = "https://chat.example.com"
TEXT: dict[str, Any] = {"prompt": "abc", "max_tokens": 2}


async def test_web_page_may_ask_with_a_key() -> None:
    """A preflight carries no key, and was answered 401 or 405."""
    app = stub_app(api_keys=("secret",), allowed_origins=(ORIGIN,))
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as client:
        preflight = {
            "Origin": ORIGIN,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        }
        answer = await client.options("/v1/chat/completions", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert "POST" in answer.headers["access-control-allow-methods"]
        key = {"Origin": ORIGIN, "Authorization": "Bearer secret"}
        for body in (TEXT, {**TEXT, "stream": True}):
            answer = await client.post("/v1/completions", json=body, headers=key)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()


async def test_web_page_can_read_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the headers a script sees "Failed to fetch" instead of the error."""
    app = stub_app(api_keys=("secret",), allowed_origins=(ORIGIN,))
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as client:
        key = {"Origin": ORIGIN, "Authorization": "Bearer secret"}

        async def bug() -> None:
            raise RuntimeError("bug")

        monkeypatch.setattr(app.state.service.engine, "check_health", bug)
        asked = [
            await client.post("/v1/completions", json=TEXT, headers={"Origin": ORIGIN}),
            await client.post("/v1/completions", json={"prompt": 5.5}, headers=key),
            await client.get("/nowhere", headers=key),
            await client.get("/v1/completions", headers=key),
            await client.post("/v1/completions", json=TEXT, headers=key),
        ]
    assert [answer.status_code for answer in asked] == [401, 400, 404, 405, 500]
    for answer in asked:
        assert answer.headers["access-control-allow-origin"] == ORIGIN, answer.status_code
        assert answer.headers["x-request-id"], "one of a bug too"
        assert answer.json()["error"]["message"]


async def test_other_pages_and_servers_without_origins_say_nothing() -> None:
    headers = {"Origin": "https://elsewhere.example"}
    for origins in ((), (ORIGIN,)):
        async with listening(stub_app(allowed_origins=origins)) as url, httpx.AsyncClient() as c:
            answer = await c.post(f"{url}/v1/completions", json=TEXT, headers=headers)
            assert answer.status_code == 200
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "words",
    [
        ["--allowed-origins", '["https://a.example", "http://localhost:3000"]'],
        ["--allowed-origins", "https://a.example", "--allowed-origins=http://localhost:3000"],
        ["--allowed-origins=https://a.example,http://localhost:3000"],
    ],
)
def test_origins_are_given_as_to_vllm_or_one_by_one(words: list[str]) -> None:
    args = parse_args(["serve", *words], {})
    origins = ("https://a.example", "http://localhost:3000")
    assert serve_config(Settings.model_validate(args)).allowed_origins == origins
    environ = {"COCONUT_ALLOWED_ORIGINS": ",".join(origins)}
    assert parse_args(["serve"], environ).allowed_origins == list(origins)


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models", "/metrics"])
async def test_head_is_answered_as_get_without_a_body(http: httpx.AsyncClient, path: str) -> None:
    """Load balancers and uptime checks that send HEAD got 405."""
    head, get = await http.head(path), await http.get(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers.get("content-type") == get.headers.get("content-type")
    assert (await http.head("/v1/completions")).status_code == 405


async def test_events_hold_no_line_ends_of_unicode(http: httpx.AsyncClient) -> None:
    """Clients that split lines as str.splitlines does got half an event, which is no JSON."""
    prompt = "a\u2028b\u2029c\u0085d"
    body = {"prompt": prompt, "max_tokens": len(prompt.encode()), "stream": True}
    answer = await http.post("/v1/completions", json=body)
    lines = [line for line in answer.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(event["choices"][0]["text"] for event in events) == prompt


async def test_stock_client_reads_them_too(client: openai.AsyncOpenAI) -> None:
    prompt = "x\u2028y"
    stream = await client.completions.create(model="m", prompt=prompt, max_tokens=5, stream=True)
    assert "".join([event.choices[0].text async for event in stream]) == prompt

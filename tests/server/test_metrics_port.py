"""/metrics on a port of its own, and JSON logs."""

import json
import logging
import logging.config
import os

import httpx
import pytest

from coconut_serve.errors import StartupError
from coconut_serve.server.logs import VLLM_LOGS, set_format
from coconut_serve.server.metrics_port import add_metrics_port
from tests.fakes import free_port, listening, stub_app


async def test_metrics_port_needs_no_key_and_shows_the_same_page() -> None:
    app, port = stub_app(api_keys=("secret",)), free_port()
    add_metrics_port(app, host="127.0.0.1", port=port)
    async with listening(app) as url, httpx.AsyncClient() as http:
        assert (await http.get(f"{url}/metrics")).status_code == 401
        page = await http.get(f"http://127.0.0.1:{port}/metrics")
        assert page.status_code == 200
        assert "\ncoconut_engine_up{" in page.text
        other = await http.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "a"})
        assert other.status_code == 404


async def test_metrics_port_that_is_taken_is_a_startup_error() -> None:
    async with listening(stub_app()) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(StartupError, match="--metrics-port"):
            add_metrics_port(stub_app(), host="127.0.0.1", port=port)


async def test_json_log_has_an_object_a_line_with_the_request_id(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = logging.StreamHandler()  # to stderr as it is now
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setattr(os, "environ", {})
    logging.getLogger("coconut_serve").setLevel(logging.INFO)
    set_format("json")
    async with listening(stub_app()) as url, httpx.AsyncClient(base_url=url) as http:
        body = {"prompt": "abc", "max_tokens": 2, "request_id": "of-the-body"}
        await http.post("/v1/completions", json=body)
        await http.get("/nowhere", headers={"x-request-id": "of-the-header"})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    access = {line["path"]: line for line in lines if line["logger"] == "coconut_serve.access"}
    assert access["/v1/completions"]["request_id"] == "of-the-body"
    assert access["/nowhere"]["request_id"] == "of-the-header"
    assert access["/nowhere"]["status"] == 404
    assert access["/nowhere"]["level"] == "INFO"
    assert access["/nowhere"]["time"]
    assert os.environ == {"VLLM_LOGGING_CONFIG_PATH": str(VLLM_LOGS)}


def test_vllm_is_told_to_write_json(capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(VLLM_LOGS.read_text())
    told = config["loggers"].pop("vllm")
    assert told["level"].startswith("ext://vllm.envs.")  # only where there is vLLM
    config["loggers"]["like_vllm"] = told | {"level": "INFO"}
    logging.config.dictConfig(config)
    logging.getLogger("like_vllm.worker").info("loading %s", "weights")
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["message"]) == ("INFO", "loading weights")

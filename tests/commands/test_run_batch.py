"""`coconut-serve run-batch` against a stub server."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coconut_serve.cli import main
from coconut_serve.config import StubConfig
from tests.fakes import free_port, listening, stub_app

CHAT = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "abc", "max_tokens": 3},
    "/v1/responses": {"input": "abc", "reasoning": {"mode": "none"}, "max_output_tokens": 4},
}


def line(name: object, url: str = CHAT, **more: Any) -> str:
    body = BODIES.get(url, {}) | more.pop("body", {})
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body} | more)


class Files:
    """Input and output of a run."""

    def __init__(self, folder: Path) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"

    def write(self, *lines: str) -> None:
        self.input.write_text("\n".join(lines) + "\n")

    async def run(self, *words: str) -> int:
        files = ["-i", str(self.input), "-o", str(self.output)]
        return await asyncio.to_thread(main, ["run-batch", *files, *words])

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(row) for row in self.output.read_text().splitlines()]

    def by_name(self) -> dict[str, dict[str, Any]]:
        rows = self.rows()
        assert len({row["custom_id"] for row in rows}) == len(rows)
        return {row["custom_id"]: row for row in rows}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def test_every_endpoint_is_answered_in_openais_shape(files: Files) -> None:
    files.write(*(line(url, url) for url in BODIES), "", line("latent", body={"seed": 1}))
    async with listening(stub_app()) as url:
        assert await files.run("--url", url) == 0
    rows = files.by_name()
    assert rows.keys() == {*BODIES, "latent"}
    for row in rows.values():
        assert row.keys() == {"id", "custom_id", "response", "error"}
        assert row["error"] is None
        assert row["response"]["status_code"] == 200
        assert row["response"]["request_id"]
    assert rows[CHAT]["response"]["body"]["choices"][0]["message"]["content"]
    assert rows["/v1/completions"]["response"]["body"]["choices"][0]["text"] == "abc"
    assert rows["/v1/responses"]["response"]["body"]["output"]


async def test_wrong_lines_are_errors_of_their_line(files: Files) -> None:
    files.write(
        "{not json",
        "[]",
        line(7),
        line("stream", body={"stream": True}),
        line("method", method="GET"),
        line("url", "/v1/embeddings"),
        line("body", body={}).replace('"body": {', '"body": "x", "not": {'),
        line("nan", body={"temperature": float("nan")}),
        line("refused", body={"temperature": 9}),
        line("right"),
        line("right"),
    )
    async with listening(stub_app()) as url:
        assert await files.run("--url", url, "--concurrency", "1") == 1
    rows = files.rows()
    assert len(rows) == 11
    assert [row["custom_id"] for row in rows[:3]] == [None] * 3
    for row, word in zip(
        rows,
        ["line 1 is not JSON", "object", "custom_id", "stream", "POST", "url", "body"],
        strict=False,
    ):
        assert row["response"] is None
        assert row["error"]["code"] == "invalid_line"
        assert word in row["error"]["message"]
    assert rows[7]["error"]["code"] == "request_failed"
    assert rows[8]["response"]["status_code"] == 400
    assert rows[8]["response"]["body"]["error"]["param"] == "temperature"
    assert rows[9]["response"]["status_code"] == 200
    assert "an earlier line has the custom_id 'right'" in rows[10]["error"]["message"]


async def test_a_second_run_asks_only_what_has_no_answer(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    files.write(line("a"), line("b", body={"temperature": 9}))
    async with listening(stub_app()) as url:
        assert await files.run("--url", url) == 1
        first = files.by_name()
        with files.output.open("a") as output:
            output.write('{"id": "cut sho')
        files.write(line("a"), line("b"), line("c"))
        assert await files.run("--url", url) == 0
        assert "2 answered, 0 failed, 1 kept" in capsys.readouterr().err
    rows = files.by_name()
    assert rows.keys() == {"a", "b", "c"}
    assert rows["a"] == first["a"]
    assert set(files.output.parent.iterdir()) == {files.input, files.output}


async def test_a_full_server_is_waited_for(files: Files) -> None:
    files.write(*(line(str(number)) for number in range(6)))
    app = FastAPI()
    turns = iter([True, False] * 6)
    busy: list[int] = []

    @app.post(CHAT)
    async def answer(request: Request) -> Response:
        assert request.headers["authorization"] == "Bearer secret"
        busy.append(1)
        try:
            await asyncio.sleep(0)
            assert len(busy) <= 2
            if next(turns):
                return JSONResponse({}, status_code=429, headers={"Retry-After": "0"})
            return JSONResponse({"choices": []})
        finally:
            busy.pop()

    app.state.service = True
    async with listening(app) as url:
        assert await files.run("--url", url, "--concurrency", "2", "--api-key", "secret") == 0
    assert len(files.by_name()) == 6
    assert next(turns, None) is None


async def test_lost_connections_are_errors_of_their_line(files: Files) -> None:
    files.write(line("a"))
    assert await files.run("--url", f"http://127.0.0.1:{free_port()}", "--concurrency", "1") == 1
    assert files.by_name()["a"]["error"]["code"] == "request_failed"


async def test_wrong_calls_are_one_line(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    assert await files.run("--url", nobody) == 2
    assert "in.jsonl: No such file" in capsys.readouterr().err
    files.write(line("a"))
    assert await files.run("--url", nobody) == 2
    assert await files.run("--url", nobody, "demo") == 2
    assert await files.run("--url", nobody, "--", "--dtype", "float32") == 2
    files.output.write_text("my diary\n")
    assert await files.run("--url", nobody) == 2
    assert files.output.read_text() == "my diary\n"
    files.output = files.input
    assert await files.run("--url", nobody) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 5
    for each, word in zip(
        told, ["Connection", "not both", "--dtype", "no results", "is the input"], strict=True
    ):
        assert each.startswith("coconut-serve: ")
        assert word in each


async def test_ctrl_c_leaves_a_valid_file(files: Files) -> None:
    files.write(line("quick"), *(line(str(n), body={"max_tokens": 400}) for n in range(3)))
    async with listening(stub_app(stub=StubConfig(tokens_per_second=20))) as url:
        command = [sys.executable, "-m", "coconut_serve", "run-batch", "-i", str(files.input)]
        process = subprocess.Popen(
            [*command, "-o", str(files.output), "--url", url, "--concurrency", "4"],
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            async with asyncio.timeout(60):
                while not files.output.exists() or not files.output.stat().st_size:
                    await asyncio.sleep(0.02)
            os.kill(process.pid, signal.SIGINT)
            _, told = await asyncio.to_thread(process.communicate)
    assert process.returncode == 130
    assert "the same command goes on" in told
    assert "Traceback" not in told
    assert files.by_name().keys() == {"quick"}


async def test_a_model_is_served_meanwhile(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COCONUT_API_KEY", "secret,other")
    files.write(line("a"))
    assert await files.run("--", "--engine", "stub") == 0
    assert files.by_name()["a"]["response"]["status_code"] == 200

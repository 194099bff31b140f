"""What a start shows, and what it refuses before it loads anything."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import termios
import threading
from pathlib import Path

import httpx
import pytest

from coconut_serve import cli, loading

COMMAND = [sys.executable, "-m", "coconut_serve", "serve", "demo", "--port", "0"]
STAGES = [
    "starting the engine", "checking the model's files", "loading weights",
    "self-test: plain model", "packing weights", "self-test: paged model", "making the KV cache",
]  # fmt: skip


@pytest.mark.torch
def test_log_tells_each_stage_and_the_start_line_all_one_needs() -> None:
    """It was silent but for uvicorn's "Application startup complete", long before it was ready."""
    with subprocess.Popen(
        [*COMMAND, "--log-format", "json", "--dtype", "float32"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            lines: list[str] = []
            thread = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
            thread.start()
            listens, example = process.stdout.readline(), process.stdout.readline()
            *_, body = shlex.split(example)
            url = re.findall(r"http://\S+", example)[0]
            assert url in example
            assert f"listens on {url.removesuffix('/chat/completions')} - model demo" in listens
            assert "memory 1 MiB for weights, up to 40 MiB for the KV cache" in listens
            assert example.startswith("try: curl ")
            answer = httpx.post(url, content=body, timeout=60)
            assert answer.status_code == 200, answer.text
        finally:
            process.terminate()
            thread.join()
    records = [json.loads(line) for line in lines]
    assert [r["stage"] for r in records if "seconds" in r and "stage" in r] == STAGES
    before = records[: [r["message"] for r in records].index("making the KV cache")]
    assert not [r for r in before if r["logger"].startswith("uvicorn")]


@pytest.mark.torch
def test_terminal_shows_each_stage() -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    parts: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # all that could write have ended
            while True:
                parts.append(os.read(ours, 4096))

    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        thread = threading.Thread(target=read)
        thread.start()
        try:
            assert process.stdout is not None
            assert "listens on" in process.stdout.readline()
        finally:
            process.terminate()
    thread.join()
    os.close(ours)
    shown = b"".join(parts).decode()
    for name in STAGES:
        assert "Loading weights" in shown if name == "loading weights" else f"{name}: 0" in shown


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--default-reasoning-mode", "auto"], "'auto' is not one of none, cot, latent"),
        (["--allowed-reasoning-modes", "cot,auto"], "this model has no mode 'auto', but none, cot"),
        (["--kv-cache-memory", "lots"], "'lots' is not a size"),
        (["--block-size", "0"], "--block-size must be at least 1"),
    ],
)
def test_wrong_values_are_refused_before_an_engine_is_built(
    flags: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: object) -> None:
        raise AssertionError("an engine is built")

    monkeypatch.setattr(loading, "build_engine", build)
    assert cli.main(["serve", "demo", "--port", "0", *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.torch
def test_device_that_is_not_there_is_refused_before_a_model_is_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def fetch(*_: object) -> Path:
        raise AssertionError("a model is fetched")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "resolve_model", fetch)
    assert cli.main(["serve", "demo", "--port", "0", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.endswith("--device cuda: torch sees no CUDA device\n")

"""The command line in a process of its own: start, answer, drain, refuse."""

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from coconut_serve.cli import build_parser, main, parse_args
from coconut_serve.errors import StartupError

COMMAND = [sys.executable, "-m", "coconut_serve.cli"]


class Server:
    """A running `coconut-serve serve`."""

    def __init__(self, *flags: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", self.line)
        assert found, f"no address in {self.line!r}"
        self.url = found.group()


@contextlib.contextmanager
def ended(server: Server) -> Iterator[Server]:
    """Leave no server behind, whatever a test finds."""
    with server.process:  # closes the pipe and waits
        try:
            yield server
        finally:
            server.process.kill()


@pytest.fixture
def slow_stub() -> Iterator[Server]:
    with ended(Server("--engine", "stub", "--stub-tokens-per-second", "40")) as server:
        yield server


def test_sigterm_finishes_what_runs_and_takes_nothing_new(slow_stub: Server) -> None:
    assert "the KV cache holds" in slow_stub.line
    body = {"prompt": "abc", "max_tokens": 40}
    answers: list[httpx.Response] = []
    url = f"{slow_stub.url}/v1/completions"

    def ask() -> None:
        answers.append(httpx.post(url, json=body, timeout=30))

    with httpx.Client(base_url=slow_stub.url) as keep:
        assert keep.get("/ready").status_code == 200
        thread = threading.Thread(target=ask)
        thread.start()
        metric = 'coconut_requests_running{engine="stub",model_name="demo",reasoning_mode="cot"} 1'
        deadline = time.monotonic() + 10
        while metric not in keep.get("/metrics").text:
            assert time.monotonic() < deadline
        slow_stub.process.send_signal(signal.SIGTERM)
        while keep.get("/ready").status_code == 200:
            assert time.monotonic() < deadline
        refused = keep.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
    thread.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 40
    assert slow_stub.process.wait(timeout=10) == 0


def test_second_signal_ends_it_at_once(slow_stub: Server) -> None:
    body = {"prompt": "abc", "max_tokens": 1200, "stream": True}
    url = f"{slow_stub.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        lines = response.iter_lines()  # dropped, it would close the response
        next(lines)
        slow_stub.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{slow_stub.url}/ready").status_code == 200:
            pass
        slow_stub.process.send_signal(signal.SIGTERM)
        # Without it the answer would take half a minute, and so would the drain.
        assert slow_stub.process.wait(timeout=4) != 0


def test_client_that_hangs_up_early_does_not_kill_the_server(slow_stub: Server) -> None:
    """Two clients that closed before the answer was written once ended the process (SIGPIPE)."""
    host, port = slow_stub.url.removeprefix("http://").split(":")
    for _ in range(20):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert httpx.get(f"{slow_stub.url}/health").status_code == 200
    assert slow_stub.process.poll() is None


def children(pid: int) -> list[int]:
    """The processes that one has started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def engine_of(server: Server) -> int:
    metrics = httpx.get(f"{server.url}/metrics").text
    assert "coconut_engine_process_resident_memory_bytes" in metrics
    sizes = {
        int(Path(f"/proc/{pid}/statm").read_text().split()[0]): pid
        for pid in children(server.process.pid)
    }
    return sizes[max(sizes)]


@pytest.mark.torch
@pytest.mark.parametrize("end", ["killed", "told twice"])
def test_engine_ends_with_the_server(end: str) -> None:
    server = Server("demo", "--max-model-len", "256")
    with ended(server), httpx.Client(base_url=server.url, timeout=60) as client:
        own = children(server.process.pid)
        assert own
        body = {"prompt": [5, 6], "max_tokens": 200, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            if end == "killed":
                server.process.kill()
            else:
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
                server.process.send_signal(signal.SIGTERM)
            server.process.wait(timeout=10)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in own):
        assert time.monotonic() < deadline, "the engine outlives the server"
        time.sleep(0.05)


@pytest.mark.torch
def test_server_whose_engine_is_killed_says_so() -> None:
    server = Server("demo")
    with ended(server), httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/health").status_code == 200
        os.kill(engine_of(server), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while client.get("/health").status_code == 200:
            assert time.monotonic() < deadline
        refused = client.post("/v1/completions", json={"prompt": [5, 6]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["/no/such/dir"], "no such model directory"),
        (["--engine", "stub", "--max-num-seqs", "0"], "--max-num-seqs must be at least 1"),
        (["--port", "70000"], "--port must be in 0..65535"),
        (["--", "--enforce-eager"], "needs --engine vllm"),
        (["--allowed-reasoning-modes", "cot,foo"], "'foo' is not one of"),
        (["--config", "/no/such/file"], "cannot read --config"),
        (["--custom-histogram-buckets", "[1]"], "takes a JSON object"),
    ],
)
def test_wrong_start_is_one_line_and_a_status(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", *flags]) == 2
    told = capsys.readouterr().err
    last = told.strip().splitlines()[-1]
    assert last.startswith("coconut-serve: ")
    assert message in last
    assert "Traceback" not in told


def test_status_of_a_wrong_start_is_that_of_the_process() -> None:
    done = subprocess.run(
        [*COMMAND, "serve", "/no/such/dir"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"coconut-serve: .*no such model directory.*\n", done.stderr)


def test_directory_without_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "max_queue: 1\nport: 1111\nmax_n: 3\nstrict_params: true\napi_key: [a, b]\n"
        "custom_histogram_buckets: {latent_steps: [1, 2.5]}\n"
    )
    environ = {"COCONUT_MAX_QUEUE": "2", "COCONUT_PORT": "2222", "OTHER": "x"}
    args = parse_args(["serve", "m", "--config", str(file), "--port", "3333"], environ)
    assert (args.port, args.max_queue, args.max_n, args.max_num_seqs) == (3333, 2, 3, 64)
    assert args.strict_params is True
    assert args.api_key == ["a", "b"]
    assert args.custom_histogram_buckets == {"latent_steps": (1, 2.5)}
    assert args.model == "m"
    args = parse_args(["serve", "m", "--api-key", "c"], {"COCONUT_API_KEY": "a,b"})
    assert args.api_key == ["c"]
    file.write_text("max_n: 4\n")
    args = parse_args(["serve", "m"], {"COCONUT_CONFIG": str(file), "COCONUT_API_KEY": "a, b\n,"})
    assert (args.max_n, args.api_key) == (4, ["a", "b"])


def test_unknown_or_bad_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max_quue: 1\n")
    with pytest.raises(StartupError, match="unknown key 'max_quue'"):
        parse_args(["serve", "--config", str(file)], {})
    with pytest.raises(SystemExit):
        parse_args(["serve"], {"COCONUT_MAX_QUEUE": "many"})
    assert "--max-queue" in capsys.readouterr().err
    with pytest.raises(StartupError, match="not true or false"):
        parse_args(["serve"], {"COCONUT_STRICT_PARAMS": "perhaps"})
    for empty in ("", ",", " , "):  # what "${KEY_A},${KEY_B}" may come to
        with pytest.raises(StartupError, match="COCONUT_API_KEY is empty"):
            parse_args(["serve"], {"COCONUT_API_KEY": empty})
    file.write_text("api_key: ['', '']\n")
    with pytest.raises(StartupError, match="COCONUT_API_KEY is empty"):
        parse_args(["serve", "--config", str(file)], {})
    with pytest.raises(StartupError, match="did you mean COCONUT_API_KEY") as caught:
        parse_args(["serve"], {"COCONUT_API_KEYS": "sk-secret"})
    assert "sk-secret" not in caught.value.message
    parse_args(["serve"], {"COCONUT_MAX_QUUE": "sk-secret"})
    assert "COCONUT_MAX_QUUE" in caplog.text
    assert "sk-secret" not in caplog.text
    assert parse_args(["serve"], {"COCONUT_MAX_MODEL_LEN": ""}).max_model_len is None
    assert parse_args(["serve"], {"COCONUT_STRICT_PARAMS": "on"}).strict_params is True
    kubernetes = {"COCONUT_PORT": "tcp://10.0.0.1:80", "COCONUT_SERVICE_HOST": "10.0.0.1"}
    assert parse_args(["serve"], kubernetes).port == 8000
    args = parse_args(["serve", "--strict-params", "m"], {})
    assert (args.model, args.strict_params) == ("m", True)


def test_a_port_in_use_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--engine", "stub", "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(rf"coconut-serve: --port {port}: .*in use.*\n", told)


def test_help_names_every_flag_of_the_contract(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = build_parser().parse_args(["models"])
    assert text.command == "models"
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help"])
    assert not caught.value.code
    told = capsys.readouterr().out
    for flag in (
        "engine", "host", "port", "served-model-name", "api-key", "dtype", "device",
        "max-model-len", "max-num-seqs", "kv-cache-memory", "block-size",
        "max-num-batched-tokens", "no-prefix-caching", "max-queue", "default-reasoning-mode",
        "config",
    ):  # fmt: skip
        assert f"--{flag}" in told

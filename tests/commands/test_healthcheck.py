"""`coconut-serve healthcheck` against a stub server."""

import asyncio
import subprocess
import sys

import pytest

from coconut_serve.commands.healthcheck import main
from coconut_serve.reasoning.registry import mode_names
from tests.fakes import free_port, listening, stub_app


async def check(*words: str) -> int:
    return await asyncio.to_thread(main, ["healthcheck", *words])


async def test_living_and_ready_server_passes(capsys: pytest.CaptureFixture[str]) -> None:
    async with listening(stub_app()) as url:
        assert await check(url) == 0
        assert await check(f"{url}/v1", "--ready") == 0
    assert capsys.readouterr().out == "ok\nok\n"


async def test_asks_in_each_mode_and_without_a_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COCONUT_API_KEY", "secret,other")
    async with listening(stub_app(api_keys=("secret",))) as url:
        assert await check(url, "--ask") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*mode_names(), "without a key"]
    assert "secret" not in "".join(lines)


async def test_open_server_where_a_key_is_expected_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COCONUT_API_KEY", "secret")
    async with listening(stub_app()) as url:
        assert await check(url, "--ask") == 1
    assert "without a key" in capsys.readouterr().err


def test_absent_server_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["healthcheck", f"http://127.0.0.1:{free_port()}", "--timeout", "1"]) == 1
    assert main(["healthcheck", "file:///etc/passwd"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_check_imports_nothing_heavy() -> None:
    """A container runs it every few seconds."""
    code = (
        "import sys; sys.argv = ['x', 'healthcheck', 'http://127.0.0.1:1'];"
        "from coconut_serve.__main__ import main; assert main() == 1;"
        "assert not {'fastapi', 'openai', 'torch', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

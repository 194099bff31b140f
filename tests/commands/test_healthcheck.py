"""`coconut-serve healthcheck` against a stub server."""

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from coconut_serve.checkpoint.manifest import Manifest, Prompt
from coconut_serve.checkpoint.weights import resolve_model
from coconut_serve.commands.healthcheck import main
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.service.tokenizer import ByteTokenizer
from tests.fakes import free_port, listening, native_app, stub_app


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


@pytest.mark.parametrize(("expected", "status"), [("USER: who", 0), ("nobody", 1)])
async def test_asks_the_models_own_example_and_looks_at_the_answer(
    expected: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bug: any answer passed, "bern" to "What is 2+2?" among them."""
    prompt = Prompt(example="who?", example_answer=expected)
    async with listening(stub_app(manifest=Manifest(modes=["none"], prompt=prompt))) as url:
        assert await check(url, "--ask") == status
    said = capsys.readouterr()
    assert ("none: 'user: who?" in said.out) == (status == 0)
    assert ("none: 'nobody' is not in the answer 'user: who?" in said.err) == (status == 1)


async def test_an_empty_answer_fails(capsys: pytest.CaptureFixture[str]) -> None:
    class Mute(ByteTokenizer):
        def render_chat(self, messages: Any, **options: object) -> str:
            return " "

    async with listening(stub_app(tokenizer=Mute(), manifest=Manifest(modes=["none"]))) as url:
        assert await check(url, "--ask") == 1
    assert "none: the answer is empty" in capsys.readouterr().err


@pytest.mark.torch
async def test_the_demo_answers_its_example_in_every_mode() -> None:
    async with listening(native_app(resolve_model("demo"))) as url:
        assert await check(url, "--ask") == 0


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

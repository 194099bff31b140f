"""`coconut-serve chat` against a stub server: what is typed, asked and shown."""

import asyncio
import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from coconut_serve.cli import build_parser, main
from coconut_serve.commands.chat import _begin, converse, read_message
from coconut_serve.commands.conversation import Conversation
from coconut_serve.commands.screen import Screen, trace_line
from coconut_serve.config import StubConfig
from coconut_serve.engines import stub
from coconut_serve.loading import stub_manifest
from coconut_serve.types import ReasoningTrace
from tests.fakes import free_port, listening, stub_app


def reader(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """Like input() for somebody who types these lines, then Ctrl+D."""
    typed: Iterator[str | type[BaseException]] = iter(lines)

    def read(_: str) -> str:
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


class Terminal(io.StringIO):
    """A terminal as far as styles are concerned."""

    def isatty(self) -> bool:
        return True


class Session:
    """A conversation with a server, by what is typed and shown."""

    def __init__(self, url: str, *flags: str) -> None:
        self.out = io.StringIO()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
        args = build_parser().parse_args(["chat", *flags])
        self._args, self._client = args, client
        self.talk: Conversation | None = None

    async def enter(self, *lines: str | type[BaseException]) -> str:
        """Type lines, then Ctrl+D; returns what is shown after the greeting."""
        await asyncio.to_thread(self._converse, *lines)
        return self.out.getvalue().partition("ends\n")[2]

    def _converse(self, *lines: str | type[BaseException]) -> None:
        with self._client:
            self.talk = _begin(self._args, self._client, Screen(self.out, self.out, {}))
            converse(self.talk, reader(*lines))


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with listening(stub_app(manifest=stub_manifest())) as address:
        yield address


async def test_an_answer_is_followed_by_its_cost(url: str) -> None:
    session = Session(url, "--mode", "none", "--set", "max_tokens=5")
    shown = await session.enter("hello")
    assert shown.startswith("user:\n[none: first token ")
    assert " forward passes]\n" in shown
    assert session.talk is not None
    assert [turn["role"] for turn in session.talk.turns] == ["user", "assistant"]


async def test_thinking_text_comes_before_the_answer_on_lines_of_its_own(url: str) -> None:
    shown = await Session(url, "--set", "max_tokens=5").enter("/mode cot", "hello")
    assert shown.startswith("mode: cot\nuser: hello\nassi\nuser:\n[cot: first token ")
    assert "16 steps, halted by " in shown


async def test_commands_change_what_is_asked(url: str, tmp_path: Path) -> None:
    session = Session(url, "--system", "Be kind.")
    file = tmp_path / "talk.json"
    shown = await session.enter(
        "/mode latent", "/steps 3", "/set reasoning.halt.entropy_below 0.5", "/set max_tokens 4",
        "/set stop x", "/set stop", "hello", f"/save {file}", f"/save {file}", "/clear",
        "/system", "/help",
    )  # fmt: skip
    told = json.loads(file.read_text())
    halt = {"steps": 3, "halt": {"entropy_below": 0.5}}
    assert told["settings"] == {"reasoning_mode": "latent", "reasoning": halt, "max_tokens": 4}
    assert [turn["role"] for turn in told["messages"]] == ["system", "user", "assistant"]
    assert "[latent: " in shown
    assert "3 steps" in shown
    assert "File exists" in shown
    assert "/retry" in shown
    assert session.talk is not None
    assert session.talk.messages == []


async def test_mistakes_are_told_and_nothing_is_lost(url: str) -> None:
    session = Session(url, "--set", "max_tokens=4")
    shown = await session.enter(
        "/nothing", "/mode cod", "/steps many", "/set model x", "/set max_tokens.x 1", "/retry",
        "/save", "hello", "/set temperature 9", "and now", "/set temperature", "/retry",
    )  # fmt: skip
    for told in (
        "/nothing is no command", "'cod' is not one of none, cot", "/steps: invalid literal",
        "model cannot be set", "max_tokens is not a group", "no question to ask again",
        "error: temperature: must be",
    ):  # fmt: skip
        assert told in shown
    assert session.talk is not None
    asked = [turn["content"] for turn in session.talk.turns if turn["role"] == "user"]
    assert asked == ["hello", "and now"]


async def test_a_question_may_be_asked_again(url: str) -> None:
    session = Session(url, "--set", "max_tokens=4")
    await session.enter("first", "second", "/retry")
    assert session.talk is not None
    assert [turn["content"] for turn in session.talk.turns][::2] == ["first", "second"]


async def test_a_trace_is_shown_step_by_step(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = ReasoningTrace(
        entropy=1.5, max_prob=0.75, norm=1, cosine=1, retained_mass=1, top=((65, 0.75), (66, 0.001))
    )
    monkeypatch.setattr(stub, "_TRACE", trace)
    session = Session(url, "--mode", "latent", "--trace", "--set", "max_tokens=4")
    shown = await session.enter("/steps 2", "hello", "/trace", "hello")
    lines = shown.splitlines()
    assert lines[0] == "   0 latent   entropy 1.50  'A' 75%"
    assert lines[1].startswith("   1 latent")
    assert "traces are off" in lines
    assert shown.count("entropy") == 2


def test_a_step_without_names_or_tokens_is_a_line_too() -> None:
    top = [{"token_id": 7, "token": None, "prob": 0.5}]
    assert trace_line({"step": 3, "kind": "token", "entropy": 0.0}) == "   3 token    entropy 0.00"
    assert trace_line({"step": 3, "kind": "soft", "top": top}).endswith("id 7 50%")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("one", "two"), "one"),
        (("one\\", "two\\", "three"), "one\ntwo\nthree"),
        (('"""one', "", 'two"""'), "one\n\ntwo"),
        (('"""', "one", '"""'), "one"),
        (('"""one"""',), "one"),
    ],
)
def test_messages_may_have_several_lines(lines: tuple[str, ...], message: str) -> None:
    assert read_message(reader(*lines)) == message


async def test_ctrl_c_at_the_prompt_only_clears_the_line(url: str) -> None:
    shown = await Session(url, "--set", "max_tokens=4").enter(KeyboardInterrupt, "hello")
    assert "[cot: " in shown or "[none: " in shown


def test_only_terminals_get_styles_and_no_model_writes_them() -> None:
    for out, environ, shown in (
        (Terminal(), {}, "\x1b[2mhm \ufffd[31m\x1b[0m"),
        (Terminal(), {"NO_COLOR": "1"}, "hm \ufffd[31m"),
        (io.StringIO(), {}, "hm \ufffd[31m"),
    ):
        Screen(out, out, environ).thought("hm \x1b[31m")
        assert out.getvalue() == shown


async def test_a_pipe_gets_the_answer_alone(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(question: str, *words: str) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO(question))
        return main(["chat", url, *words])

    asked = ["--mode", "cot", "--set", "max_tokens=5"]
    assert await asyncio.to_thread(ask, "two\nlines\n", *asked) == 0
    said = capsys.readouterr()
    assert said.out == "user:\n"
    assert "\x1b" not in said.err
    assert said.err.count("[cot: ") == 1
    assert await asyncio.to_thread(ask, "hello", "--set", "temperature=9") == 1
    assert "error: temperature" in capsys.readouterr().err
    assert await asyncio.to_thread(ask, "") == 0
    assert await asyncio.to_thread(ask, "hello", "--mode", "none", "--", "--dtype", "float32") == 2


def test_an_absent_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", f"http://127.0.0.1:{free_port()}"]) == 2
    assert "name a MODEL" in capsys.readouterr().err


async def test_a_failing_answer_is_told() -> None:
    async with listening(stub_app(stub=StubConfig(fail_at_token=20))) as url:
        session = Session(url, "--mode", "none")
        assert "error: " in await session.enter("hello")
    assert session.talk is not None
    assert session.talk.turns[-1]["role"] == "assistant", "what was shown is kept"


class Screenful:
    """Reads a pseudo-terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.text = ""

    def wait_for(self, words: str) -> str:
        """Read on until the words are there; returns what came up to them."""
        while words not in self.text:
            self.text += os.read(self._fd, 4096).decode(errors="replace")
        before, _, self.text = self.text.partition(words)
        return before


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def test_in_a_terminal_ctrl_c_stops_an_answer_of_a_model_served_for_it(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = terminal
    monkeypatch.delenv("NO_COLOR", raising=False)
    flags: list[Any] = ["--", "--engine", "stub", "--stub-tokens-per-second", "50"]
    process = subprocess.Popen(
        [sys.executable, "-m", "coconut_serve", "chat", "demo", "--mode", "cot", *flags],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # it controls the group
    )
    os.close(theirs)
    screen = Screenful(ours)
    with process:
        try:
            screen.wait_for("> ")
            os.write(ours, b"/set max_tokens 4000\nhello\n")
            screen.wait_for("\x1b[2mu\x1b[0m")
            os.write(ours, b"\x03")
            screen.wait_for("[stopped]")
            screen.wait_for("> ")
            os.write(ours, b"/set max_tokens 4\nagain\n")
            assert "halted by" in screen.wait_for("forward passes") + screen.wait_for("]")
            screen.wait_for("> ")  # before it, readline would not see the end
            os.write(ours, b"\x04")
            assert process.wait(timeout=30) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)

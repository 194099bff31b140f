"""One simulated client a call: polite, impatient, slow, or wrong."""

import http.client
import json
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coconut_serve.commands.measure import CHAT, Record, Target, ask
from coconut_serve.evaluation.tasks import Question, find_extractor, is_right, load_task

QUESTIONS = (
    "What is 2+2?",
    "Which is larger, 9.11 or 9.9?",
    "Every wumpus is a yumpus. Max is a wumpus. Is Max a yumpus?",
    "A train leaves at nine and arrives at noon. How long does it take? Answer in a word.",
    "Name a colour.",
    "Tom has three apples, eats one and buys five. How many has he now?",
    "Is every bird able to fly? Give a reason and an example, and keep it to one sentence.",
    "Sort these numbers: 7, 3, 19, 2, 11.",
)
# A system prompt that many share, so that the prefix cache has something to find.
_SYSTEM = "You are a careful assistant. Answer briefly and only what was asked."


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Questions whose answers are looked at."""

    questions: list[Question]
    extract: Callable[[str], str]

    @classmethod
    def load(cls, path: Path, target: Target) -> "Task":
        """Read a task file; the server says where in a text its model's answer is."""
        status, text = target.get("/v1/models")
        assert status == 200, f"{target.url}/v1/models answers {status}"
        manifest = json.loads(text)["data"][0].get("manifest") or {}
        return cls(
            questions=load_task(path),
            extract=find_extractor((manifest.get("answer") or {}).get("extract")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What clients ask for, by weight."""

    modes: dict[str, float]
    scenarios: dict[str, float]
    max_tokens: int
    min_tokens: int
    steps: int  # 0: the model's own
    task: Task | None = None  # None: QUESTIONS, whatever is answered


_IDLE_SECONDS = 2.0  # less than any server waits for the next request of a connection


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledTarget(Target):
    """A server whose connections are kept for the next request, as clients and proxies do."""

    idle: list[tuple[float, http.client.HTTPConnection]] = field(default_factory=list)

    def connect(self) -> http.client.HTTPConnection:
        """Take the connection that was used last, or open one."""
        while self.idle:
            released, connection = self.idle.pop()
            if time.monotonic() - released < _IDLE_SECONDS:
                return connection
            connection.close()
        return Target.connect(self)

    def release(
        self, connection: http.client.HTTPConnection, rest: http.client.HTTPResponse | None
    ) -> None:
        """Keep it, once the answer is read to its end."""
        try:
            if rest is None or rest.will_close:
                raise OSError("of no more use")
            rest.read()
        except (OSError, http.client.HTTPException):
            connection.close()
        else:
            self.idle.append((time.monotonic(), connection))


def parse_weights(text: str) -> dict[str, float]:
    """Read "none=1,cot=2".

    Raises:
        ValueError: It has another form.
    """
    weights = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        weights[name.strip()] = float(weight or 1)
    return weights


def pick(weights: dict[str, float], rng: random.Random) -> str:
    """Draw a name by weight."""
    return rng.choices(list(weights), list(weights.values()))[0]


def body(mix: Mix, rng: random.Random, *, is_stream: bool) -> tuple[dict[str, Any], str | None]:
    """A request of the mix, and the right answer where it is known."""
    mode = pick(mix.modes, rng)
    expected = None
    if mix.task is not None:
        question = rng.choice(mix.task.questions)
        expected = question.answer
        asked: dict[str, Any] = {
            "messages": [{"role": "user", "content": question.text}],
            "temperature": 0.0,
        }
    else:
        text = f"{rng.choice(QUESTIONS)} (case {rng.randrange(10**6)})"
        asked = {
            "messages": [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}],
            "temperature": 0.7,
        }
    asked |= {
        "max_tokens": mix.max_tokens,
        "min_tokens": mix.min_tokens,
        "seed": rng.randrange(2**31),
        "reasoning_mode": mode,
        "return_token_ids": True,  # so that tokens can be counted, whatever their text
    }
    if mode != "none" and mix.steps:
        asked["reasoning"] = {"steps": mix.steps}
    if is_stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return asked, expected


def _go_on(_: int) -> bool:
    return True


def stream(
    target: Target,
    mix: Mix,
    rng: random.Random,
    *,
    scenario: str = "stream",
    on_chunk: Callable[[int], bool] = _go_on,
) -> Record:
    """Read a stream, or an answer in one piece, to its end."""
    asked, expected = body(mix, rng, is_stream=scenario != "whole")
    record = ask(target, asked, scenario=scenario, on_chunk=on_chunk)
    if mix.task is not None and expected is not None and record.is_ok:
        record.is_right = is_right(mix.task.extract, record.text, expected)
    return record


def whole(target: Target, mix: Mix, rng: random.Random) -> Record:
    """Wait for an answer in one piece."""
    return stream(target, mix, rng, scenario="whole")


def disconnect(target: Target, mix: Mix, rng: random.Random) -> Record:
    """Hang up after a few events."""
    last = rng.randrange(1, 6)
    return stream(target, mix, rng, scenario="disconnect", on_chunk=lambda number: number < last)


def slow(target: Target, mix: Mix, rng: random.Random) -> Record:
    """Read a stream with a pause at each event."""

    def wait(_: int) -> bool:
        time.sleep(0.05)
        return True

    return stream(target, mix, rng, scenario="slow", on_chunk=wait)


def bad(target: Target, mix: Mix, rng: random.Random) -> Record:
    """Send what must be refused with 400, 404 or 413, and at once."""
    del mix
    message = [{"role": "user", "content": "x"}]
    wrong: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": message, "reasoning_mode": "telepathy"}),
        (CHAT, {"messages": message, "temperature": 99}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": message, "model": "no-such-model"}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 5_000_000}]}),
        ("/v1/nowhere", {}),
    ]
    path, asked = rng.choice(wrong)
    return ask(target, asked, scenario="bad", path=path)


def half(target: Target, mix: Mix, rng: random.Random) -> Record:
    """Open a connection, send half a request, and go away."""
    del mix, rng
    record = Record(mode="default", started=time.time(), scenario="half", error="hung up")
    connection = target.connect()
    try:
        connection.connect()
        assert isinstance(connection.sock, socket.socket)
        connection.sock.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{".encode()
        )
    except OSError as error:
        record.error = str(error)
    finally:
        connection.close()
    return record


SCENARIOS: dict[str, Callable[[Target, Mix, random.Random], Record]] = {
    "stream": stream,
    "whole": whole,
    "disconnect": disconnect,
    "slow": slow,
    "bad": bad,
    "half": half,
}
POLITE = frozenset({"stream", "whole", "slow"})  # their answers are judged and counted
EXPECTED_OF_BAD = frozenset({400, 404, 413})

"""A conversation with a server: messages, settings of the next answer, and the answers."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import openai

from coconut_serve.commands.screen import Screen, timings, trace_line


@dataclass(kw_only=True)
class Conversation:
    """What has been said, and how the next answer is asked for."""

    client: openai.OpenAI
    screen: Screen
    model: str
    modes: tuple[str, ...]  # empty: the server tells none
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # fields of the body, nested
    shows_trace: bool = False
    turns: list[dict[str, str]] = field(default_factory=list)
    _last: tuple[int, str] | None = None  # the last question and its place in `turns`

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, the system's first."""
        own = [{"role": "system", "content": self.system}] if self.system else []
        return own + self.turns

    def ask(self, question: str) -> bool:
        """Ask and show the answer; returns whether there was one, in full or stopped by Ctrl+C.

        A question without any answer is forgotten, but for `retry`.
        """
        self._last = (len(self.turns), question)
        self.turns.append({"role": "user", "content": question})
        answer = _Answer(self.screen, shows_trace=self.shows_trace)
        is_answered = True
        try:
            answer.follow(self._stream())
        except KeyboardInterrupt:
            self.screen.note("[stopped]")
        except Exception as error:  # OpenAI's client passes on those of its transport, too
            is_answered = False
            self.screen.fault(f"error: {_message(error)}")
        if answer.text or answer.is_complete:
            self.turns.append({"role": "assistant", "content": answer.text})
        else:
            self.turns.pop()
        self.screen.end_line()
        return is_answered

    def retry(self) -> None:
        """Ask the last question again, in place of what came of it.

        Raises:
            ValueError: There is none.
        """
        if self._last is None:
            raise ValueError("there is no question to ask again")
        at, question = self._last
        del self.turns[at:]
        self.ask(question)

    def clear(self) -> None:
        """Forget what was said; settings and the system message stay."""
        self.turns.clear()
        self._last = None

    def set(self, path: str, value: Any) -> None:
        """Set a field of the body, such as reasoning.steps; None removes it.

        Raises:
            ValueError: It is not for the user to set.
        """
        *outer, name = path.split(".")
        if path in ("messages", "model", "stream", "stream_options"):
            raise ValueError(f"{path} cannot be set here")
        inside = self.settings
        for each in outer:
            inside = inside.setdefault(each, {})
            if not isinstance(inside, dict):
                raise ValueError(f"{each} is not a group of settings, but a value")
        if value is None:
            inside.pop(name, None)
        else:
            inside[name] = value

    def _stream(self) -> openai.Stream[Any]:
        body = dict(self.settings)
        if self.shows_trace:
            own = body.get("reasoning")
            body["reasoning"] = {"trace": "topk"} | (own if isinstance(own, dict) else {})
        create: Any = self.client.chat.completions.create  # messages are dicts of the right shape
        stream: openai.Stream[Any] = create(
            model=self.model,
            messages=self.messages,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=body,
        )
        return stream


class _Answer:
    """Shows a stream as it comes."""

    def __init__(self, screen: Screen, *, shows_trace: bool) -> None:
        self._screen = screen
        self._shows_trace = shows_trace
        self._started = time.perf_counter()
        self._first_seconds: float | None = None
        self._is_thinking = False
        self.text = ""
        self.is_complete = False

    def follow(self, stream: openai.Stream[Any]) -> None:
        """Show all of it, then timings and warnings."""
        reasoning: Mapping[str, Any] = {}
        with stream:  # closes the connection, and so ends the answer, after Ctrl+C too
            for chunk in stream:
                for choice in chunk.choices:
                    self._show(choice)
                reasoning = getattr(chunk.usage, "reasoning", None) or reasoning
        self.is_complete = True
        now = time.perf_counter() - self._started
        self._screen.note(timings(reasoning, self._first_seconds, now))
        for warning in reasoning.get("warnings", ()):
            self._screen.note(f"warning: {warning}")

    def _show(self, choice: Any) -> None:
        delta = choice.delta
        thought = getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None)
        if self._first_seconds is None and (thought or delta.content):
            self._first_seconds = time.perf_counter() - self._started
        if self._shows_trace:
            for step in getattr(choice, "reasoning_trace", None) or ():
                self._screen.note(trace_line(step))
        elif thought:
            self._is_thinking = True
            self._screen.thought(thought)
        if delta.content:
            if self._is_thinking:
                self._is_thinking = False
                self._screen.end_line()
            self.text += delta.content
            self._screen.answer(delta.content)


def _message(error: Exception) -> str:
    """The server's words, without the SDK's around them."""
    body = getattr(error, "body", None)
    told = body.get("message") if isinstance(body, dict) else None
    return str(told or error or type(error).__name__)

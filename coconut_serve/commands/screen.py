"""What `coconut-serve chat` writes to a terminal or a pipe."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model must not steer the terminal
_LEAST = 0.005  # probability that a trace shows: 1% when rounded
_DIM, _RED, _PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[0m"


class Screen:
    """Answers go to `out`; all else, dimmed on a terminal, goes to `notes`.

    Args:
        out: Such as stdout.
        notes: The same, or stderr if `out` is read by a program.
        environ: With NO_COLOR nothing is dimmed.
    """

    def __init__(self, out: TextIO, notes: TextIO, environ: Mapping[str, str]) -> None:
        self._out = out
        self._notes = notes
        self._has_style = notes.isatty() and not environ.get("NO_COLOR")
        self._open: TextIO | None = None  # where a line has no end yet

    def answer(self, text: str) -> None:
        """Write a piece of the answer."""
        self._write(self._out, text, "")

    def thought(self, text: str) -> None:
        """Write a piece of thinking text."""
        self._write(self._notes, text, _DIM)

    def note(self, text: str) -> None:
        """Write a line about the answer."""
        self.end_line()
        self._write(self._notes, text + "\n", _DIM)

    def fault(self, text: str) -> None:
        """Write a line about an error."""
        self.end_line()
        self._write(self._notes, text + "\n", _RED)

    def end_line(self) -> None:
        """Begin a new line, unless one has just begun."""
        if self._open is not None:
            self._write(self._open, "\n", "")

    def _write(self, stream: TextIO, text: str, style: str) -> None:
        shown = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
        if not shown:
            return
        line = shown.removesuffix("\n")
        end = shown[len(line) :]
        self._open = None if end else stream
        is_styled = style and line and self._has_style
        stream.write(f"{style}{line}{_PLAIN}{end}" if is_styled else shown)
        stream.flush()


def trace_line(step: Mapping[str, Any]) -> str:
    """A step of a trace as a line: number, kind, entropy and the likeliest tokens."""
    top: Iterable[Mapping[str, Any]] = step.get("top") or ()
    tokens = "  ".join(
        f"{_name(each)} {each['prob']:.0%}" for each in top if each["prob"] >= _LEAST
    )
    entropy = step.get("entropy")
    shown = "" if entropy is None else f"entropy {entropy:.2f}"
    return f"{step.get('step', 0):4} {step.get('kind', ''):8} {shown}  {tokens}".rstrip()


def _name(token: Mapping[str, Any]) -> str:
    text = token.get("token")
    return f"id {token['token_id']}" if text is None else repr(text)


def timings(reasoning: Mapping[str, Any], first_seconds: float | None, total_seconds: float) -> str:
    """The line after an answer; `reasoning` is of its usage, empty where a server tells none."""
    parts = []
    if first_seconds is not None:
        parts.append(f"first token {first_seconds:.2f} s")
    parts.append(f"total {total_seconds:.2f} s")
    if "forward_passes" in reasoning:
        parts.append(f"{reasoning['forward_passes']} forward passes")
    if reasoning.get("reasoning_steps"):
        halt = reasoning.get("halt_reason")
        parts.append(
            f"{reasoning['reasoning_steps']} steps" + (f", halted by {halt}" if halt else "")
        )
    mode = f"{reasoning['mode']}: " if "mode" in reasoning else ""
    return f"[{mode}{', '.join(parts)}]"

"""Joins the deltas of a generation into whole choices."""

from collections.abc import AsyncIterable
from dataclasses import dataclass, field

from coconut_serve.service.generation import Delta, TokenDelta, TraceStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """All choices of a finished call."""

    choices: tuple[Delta, ...]  # each as one delta
    ended: tuple[int, ...]  # their indices, in order of ending


@dataclass(slots=True)
class _Parts:
    """Deltas of one choice, joined once so that a long answer takes linear time."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tokens: list[TokenDelta] = field(default_factory=list)
    trace: list[TraceStep] = field(default_factory=list)
    last: Delta | None = None  # has the finish reason

    def add(self, delta: Delta) -> None:
        self.content.append(delta.content)
        self.reasoning.append(delta.reasoning)
        self.tokens += delta.tokens
        self.trace += delta.trace
        if delta.finish_reason is not None:
            self.last = delta

    def join(self, index: int) -> Delta:
        return Delta(
            index=index,
            content="".join(self.content),
            reasoning="".join(self.reasoning),
            tokens=tuple(self.tokens),
            trace=tuple(self.trace),
            finish_reason=self.last.finish_reason if self.last else None,
            stop_reason=self.last.stop_reason if self.last else None,
        )


async def collect(deltas: AsyncIterable[Delta], num_choices: int) -> Collected:
    """Join deltas until all choices have ended.

    Args:
        deltas: Of all choices, interleaved; each choice has one with a finish reason.
        num_choices: Their indices are [0, num_choices).

    Raises:
        CoconutError: A sequence failed.
    """
    parts = [_Parts() for _ in range(num_choices)]
    ended: list[int] = []
    async for delta in deltas:
        parts[delta.index].add(delta)
        if delta.finish_reason is not None:
            ended.append(delta.index)
    choices = tuple(each.join(index) for index, each in enumerate(parts))
    return Collected(choices=choices, ended=tuple(ended))

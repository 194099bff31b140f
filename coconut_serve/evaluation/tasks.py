"""Task files, and how answers are extracted and checked."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut_serve.errors import StartupError

BUILT_IN_TASKS = {"demo": Path(__file__).parents[1] / "models" / "demo" / "test.json"}
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of a task file."""

    text: str
    answer: str
    num_steps: int  # of the reference solution, 0 if it has none; groups the results


def load_task(path: Path, limit: int | None = None, seed: int = 0) -> list[Question]:
    """Read a task: COCONUT's JSON list (question, steps, answer) or the same as JSON lines.

    Args:
        path: The file.
        limit: Size of a random sample, stratified by number of steps.
        seed: Of that sample.

    Raises:
        StartupError: The file is malformed, the message says where; or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise StartupError(f"--limit {limit}: must be at least 1", param="--limit")
    try:
        text = path.read_text(encoding="utf-8")
        is_list = text.lstrip().startswith("[")
        items = json.loads(text) if is_list else [json.loads(x) for x in text.splitlines() if x]
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot read the task {path}: {error}", param="--task") from error
    if not items:
        raise StartupError(f"the task {path} holds no question", param="--task")
    questions = [_question(path, i, item) for i, item in enumerate(items)]
    return questions if limit is None else _sample(questions, limit, seed)


def _sample(questions: list[Question], count: int, seed: int) -> list[Question]:
    """Take evenly spaced questions, ordered by number of steps and shuffled within it."""
    draw, total = random.Random(seed), len(questions)
    order = sorted(range(total), key=lambda i: (questions[i].num_steps, draw.random()))
    count = min(count, total)
    taken = (order[(2 * n + 1) * total // (2 * count)] for n in range(count))
    return [questions[i] for i in sorted(taken)]


def _question(path: Path, index: int, item: Any) -> Question:
    for key in ("question", "answer"):
        if not isinstance(item, dict) or not isinstance(item.get(key), str):
            raise StartupError(f"{path}: item {index} has no text {key!r}", param="--task")
    steps = item.get("steps", ())
    return Question(
        text=item["question"],
        answer=item["answer"],
        num_steps=len(steps) if isinstance(steps, list) else 0,
    )


def _last_number(text: str) -> str:
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else ""


def _last_word(text: str) -> str:
    words = re.findall(r"\w+", text)
    return words[-1] if words else ""


def find_extractor(name: str | None) -> Callable[[str], str]:
    """Find the function that extracts the answer from a text.

    Args:
        name: `answer.extract`: `last_word`, `last_number`, `after:MARK`; None: the stripped text.

    Raises:
        StartupError: The name is unknown.
    """
    if name is None:
        return str.strip
    if name.startswith("after:"):
        mark = name.removeprefix("after:")
        return lambda text: text.rpartition(mark)[2].replace(",", "").strip()
    named = {"last_word": _last_word, "last_number": _last_number}
    if name not in named:
        known = ", ".join([*named, "after:MARK"])
        raise StartupError(f"answer.extract {name!r} is none of {known}", param="--extract")
    return named[name]


def is_right(extract: Callable[[str], str], text: str, answer: str) -> bool:
    """Compare the answers extracted from both texts: numbers by value, words without case."""
    given, expected = extract(text), extract(answer)
    try:
        return float(given) == float(expected)
    except ValueError:
        return given.casefold().rstrip(".") == expected.casefold().rstrip(".") != ""

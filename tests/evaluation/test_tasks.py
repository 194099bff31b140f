"""Task files of both forms, and what counts as right."""

import json
from collections import Counter
from pathlib import Path

import pytest

from coconut_serve.errors import StartupError
from coconut_serve.evaluation.runs import Run, plan_runs
from coconut_serve.evaluation.tasks import find_extractor, is_right, load_task

ITEMS = [
    {"question": "a?", "answer": "x", "steps": ["one", "two"], "other": 1},
    {"question": "b?", "answer": "y"},
]


def test_list_and_lines_read_alike(tmp_path: Path) -> None:
    whole, lines = tmp_path / "a.json", tmp_path / "b.jsonl"
    whole.write_text(json.dumps(ITEMS))
    lines.write_text("\n".join(json.dumps(item) for item in ITEMS) + "\n")
    assert load_task(whole) == load_task(lines)
    assert [q.num_steps for q in load_task(whole)] == [2, 0]
    assert len(load_task(whole, limit=1)) == 1


def test_limit_takes_a_sample_as_mixed_as_a_sorted_file(tmp_path: Path) -> None:
    """The bug: the first N of a file that is sorted by hops are all of the easiest kind."""
    path = tmp_path / "sorted.json"
    counts = {2: 60, 3: 20, 5: 20}
    steps = [hops for hops, count in counts.items() for _ in range(count)]
    items = [{"question": f"{i}", "answer": "x", "steps": ["s"] * n} for i, n in enumerate(steps)]
    path.write_text(json.dumps(items))
    sample = load_task(path, limit=10)
    assert Counter(q.num_steps for q in sample) == {2: 6, 3: 2, 5: 2}
    assert sample == load_task(path, limit=10, seed=0)
    assert sample != load_task(path, limit=10, seed=1), "chance of a false alarm: below 1e-9"
    assert [int(q.text) for q in sample] == sorted(int(q.text) for q in sample)
    assert len({q.text for q in sample}) == 10
    assert load_task(path, limit=500) == load_task(path)
    with pytest.raises(StartupError, match="--limit 0: must be at least 1"):
        load_task(path, limit=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no question"),
        ("[]", "holds no question"),
        ("{", "cannot read the task"),
        ('[{"question": "a"}]', "item 0 has no text 'answer'"),
        ('{"question": 3, "answer": "x"}', "item 0 has no text 'question'"),
        ("[1]", "item 0 has no text"),
    ],
)
def test_what_is_no_task_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(StartupError, match=message):
        load_task(path)
    with pytest.raises(StartupError, match="cannot read the task"):
        load_task(tmp_path / "none")


@pytest.mark.parametrize(
    ("how", "text", "answer", "expected"),
    [
        ("last_word", "oslo rome, rome lima, lima", "lima", True),
        ("last_word", "It is Lima.", "lima", True),
        ("last_word", "", "lima", False),
        ("last_word", "", "", False),
        ("last_number", "so 3 + 4 = 1,007.", "1007", True),
        ("last_number", "it is 7.0", "7", True),
        ("last_number", "none", "7", False),
        ("after:#", "steps 1 # 2 # 72", "### 72", True),
        ("after:###", "Tom is a lempus.", "### Tom is a lempus.", True),
        (None, " Tom is a lempus. ", "Tom is a lempus", True),
        (None, "Tom is a scrompus.", "Tom is a lempus.", False),
    ],
)
def test_answers_are_compared_as_the_manifest_says(
    how: str | None, text: str, answer: str, expected: bool
) -> None:
    assert is_right(find_extractor(how), text, answer) is expected


def test_unknown_extractor_names_those_there_are() -> None:
    with pytest.raises(StartupError, match="last_word, last_number, after:MARK"):
        find_extractor("guess")


def test_runs_are_modes_then_sweeps_then_controls() -> None:
    modes = ("none", "latent", "distribution")
    runs = plan_runs(modes, ["steps=0,2", "top_k=1,full"], has_controls=True)
    assert [run.name for run in runs] == [
        "none", "latent", "distribution", "latent, steps=0", "latent, steps=2",
        "distribution, steps=0", "distribution, steps=2", "distribution, top_k=1",
        "distribution, top_k=full", "latent, removed", "latent, constant",
    ]  # fmt: skip
    assert runs[7].settings == {"mixture": {"top_k": 1}}
    assert runs[8].settings == {"mixture": {"kind": "full"}}
    assert runs[9] == Run(mode="latent", settings={"steps": 0}, label="latent, removed")
    assert plan_runs(["none"], [], has_controls=True) == [Run(mode="none")]
    for modes_, sweep, message in (
        (modes, "steps", "none of steps=..., top_k=..."),
        (modes, "steps=many", "'many' is no count"),
        (modes, "speed=3", "none of steps=..., top_k=..."),
        (("cot",), "top_k=1", "needs one of the modes distribution"),
    ):
        with pytest.raises(StartupError, match=message):
            plan_runs(modes_, [sweep], has_controls=False)

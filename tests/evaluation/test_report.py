"""The figures of a report against numbers worked out elsewhere."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from coconut_serve.evaluation import report
from coconut_serve.evaluation.ask import Answer
from coconut_serve.evaluation.runs import Run
from coconut_serve.evaluation.tasks import Question


def answers(num: int, passes: int = 4) -> list[Answer]:
    return [Answer(text="", num_reasoning_steps=3, num_forward_passes=passes, seconds=0.1)] * num


def summary(right: list[bool], **more: Any) -> dict[str, Any]:
    questions = [Question(text="", answer="", num_steps=2 + i % 2) for i in range(len(right))]
    return report.summarise(
        Run(mode="latent"), questions, answers(len(right)), right, seconds=1.0, seconds_alone=None
    )


def test_wilson_interval_is_newcombes() -> None:
    """Newcombe 1998, table I, method 3: 81 of 263 -> 0.2553 to 0.3662; 0 of 20 -> 0 to 0.1611."""
    row = summary([True] * 81 + [False] * 182)
    assert row["accuracy_low"] == pytest.approx(0.2553, abs=1e-4)
    assert row["accuracy_high"] == pytest.approx(0.3662, abs=1e-4)
    none = summary([False] * 20)
    assert (none["accuracy_low"], none["accuracy_high"]) == (0.0, pytest.approx(0.1611, abs=1e-4))


def test_groups_are_by_number_of_steps() -> None:
    row = summary([True, False] * 10)
    assert row["by_num_steps"]["2"]["accuracy"] == 1.0
    assert row["by_num_steps"]["3"]["accuracy"] == 0.0
    assert row["by_num_steps"]["3"]["n"] == 10


def test_mcnemar_counts_what_only_one_got_right() -> None:
    """8 against 1 of 9: two-sided exact p = 2 * (1 + 9) / 2**9 = 0.0390625."""
    a = [True] * 8 + [False] + [True] * 5
    b = [False] * 8 + [True] + [True] * 5
    [row] = report.compare([Run(mode="cot"), Run(mode="latent")], [a, b])
    assert row == {"a": "cot", "b": "latent", "only_a": 8, "only_b": 1, "p_value": 0.0390625}
    [same] = report.compare([Run(mode="cot"), Run(mode="latent")], [a, a])
    assert same["p_value"] == 1.0


def test_report_is_written_with_its_plot(tmp_path: Path) -> None:
    whole = {"model": "m", "task": "t", "results": [summary([True, False] * 4)]}
    path = tmp_path / "out.json"
    assert report.save(whole, path) == [path, tmp_path / "out.png"]
    assert json.loads(path.read_text()) == whole
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    shown = report.table(whole)
    assert "latent  8     50.0%" in shown


def row(label: str, accuracy: float, **settings: Any) -> dict[str, Any]:
    figures = {"accuracy": accuracy, "accuracy_low": accuracy, "accuracy_high": accuracy}
    mode = label.partition(",")[0]
    return {
        "label": label,
        "mode": mode,
        "settings": settings,
        "forward_passes_mean": 10,
        **figures,
    }


def test_tests_between_modes_are_printed() -> None:
    """The bug: they were only in the JSON file."""
    rows = [row("cot", 0.5), row("latent", 1.0), row("latent, removed", 0.4, steps=0)]
    pairs = [
        {"a": a["label"], "b": b["label"], "only_a": 1, "only_b": 9, "p_value": 0.0214843}
        for a, b in combinations(rows, 2)
    ]
    lines = report.comparisons({"results": rows, "comparisons": pairs}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["cot", "latent", "1", "9", "0.021"],
        ["latent", "latent,", "removed", "1", "9", "0.021"],
    ]
    assert report.comparisons({"results": rows[:1], "comparisons": []}) == ""


def test_labels_of_a_plot_do_not_overlap() -> None:
    """The bug: each point had its label beside it, and points of one height wrote over another."""
    rows = [row(f"distribution, top_k={i}", 0.99) for i in range(16)]
    figure = report.plot({"model": "m", "task": "t", "results": rows})
    figure.draw_without_rendering()
    [legend] = figure.legends
    [axes] = figure.axes
    boxes = [text.get_window_extent() for text in legend.get_texts()]
    assert len(boxes) == 16
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert legend.get_window_extent().y0 >= 0, "all of it is in the picture"
    assert not axes.texts

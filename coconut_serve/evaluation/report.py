"""Report of an evaluation: accuracy with intervals, cost, and tests for differences."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from scipy.stats import binomtest

from coconut_serve.evaluation.ask import Answer
from coconut_serve.evaluation.runs import Run
from coconut_serve.evaluation.tasks import Question

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = dict[str, Any]
_MARKS = "os^Dv"  # one shape per ten runs


def summarise(
    run: Run,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    right: Sequence[bool],
    *,
    seconds: float,
    seconds_alone: float | None,
) -> dict[str, Any]:
    """Summarise one run.

    Args:
        run: The run.
        questions: The task.
        answers: One per question.
        right: Whether each answer is right.
        seconds: Wall time of all questions asked concurrently.
        seconds_alone: Mean time of one question asked alone; None: not measured.

    Returns:
        A row of the report; accuracies have Wilson 95% intervals (Wilson, 1927).
    """
    groups = sorted({question.num_steps for question in questions})
    figures = _figures(answers, right)
    return {
        "mode": run.mode,
        "label": run.name,
        "settings": run.settings,
        **figures,
        "seconds_per_answer": seconds / len(answers),
        "seconds_per_answer_alone": seconds_alone,
        "by_num_steps": {
            str(group): _figures(
                [a for a, q in zip(answers, questions, strict=True) if q.num_steps == group],
                [r for r, q in zip(right, questions, strict=True) if q.num_steps == group],
            )
            for group in groups
        },
    }


def _figures(answers: Sequence[Answer], right: Sequence[bool]) -> dict[str, Any]:
    n, hits = len(answers), sum(right)
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return {
        "n": n,
        "accuracy": hits / n,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "reasoning_steps_mean": fmean(a.num_reasoning_steps for a in answers),
        "forward_passes_mean": fmean(a.num_forward_passes for a in answers),
    }


def compare(runs: Sequence[Run], right: Sequence[Sequence[bool]]) -> list[dict[str, Any]]:
    """Compare each pair of runs on the same questions (McNemar's exact test, 1947)."""
    rows = []
    for (a, right_a), (b, right_b) in combinations(zip(runs, right, strict=True), 2):
        pairs = list(zip(right_a, right_b, strict=True))
        only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
        differing = only_a + only_b
        p = binomtest(only_a, differing).pvalue if differing else 1.0
        names = {"a": a.name, "b": b.name}
        rows.append({**names, "only_a": only_a, "only_b": only_b, "p_value": float(p)})
    return rows


def table(report: Report) -> str:
    """Format the results for a terminal."""
    head = ("run", "n", "accuracy", "95% interval", "steps", "passes", "s/answer", "alone")
    rows = [head]
    for row in report["results"]:
        alone = row["seconds_per_answer_alone"]
        rows.append(
            (
                row["label"],
                str(row["n"]),
                f"{row['accuracy']:.1%}",
                f"{row['accuracy_low']:.1%} - {row['accuracy_high']:.1%}",
                f"{row['reasoning_steps_mean']:.1f}",
                f"{row['forward_passes_mean']:.1f}",
                f"{row['seconds_per_answer']:.4f}",
                "-" if alone is None else f"{alone:.4f}",
            )
        )
    return _columns(rows)


def comparisons(report: Report) -> str:
    """Format, for a terminal, the tests between modes, and between a mode and its variations."""
    rows = {row["label"]: row for row in report["results"]}
    shown = [("a", "b", "only a right", "only b right", "p (McNemar)")]
    for pair in report["comparisons"]:
        a, b = rows[pair["a"]], rows[pair["b"]]
        if not a["settings"] and (not b["settings"] or a["mode"] == b["mode"]):
            counts = (str(pair["only_a"]), str(pair["only_b"]))
            shown.append((pair["a"], pair["b"], *counts, f"{pair['p_value']:.2g}"))
    return _columns(shown) if len(shown) > 1 else ""


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    )


def save(report: Report, path: Path) -> list[Path]:
    """Write the report as JSON and, beside it, the plot of accuracy against forward passes."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    picture = path.with_suffix(".png")
    plot(report).savefig(picture, dpi=120)
    return [path, picture]


def plot(report: Report) -> "Figure":
    """Plot accuracy against forward passes; a legend names the runs, as points may overlap."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(report["results"]):
        low = row["accuracy"] - row["accuracy_low"]
        high = row["accuracy_high"] - row["accuracy"]
        axes.errorbar(
            row["forward_passes_mean"],
            row["accuracy"],
            yerr=[[low], [high]],
            fmt=_MARKS[number // 10 % len(_MARKS)],
            color=f"C{number % 10}",  # of the ten in the default cycle
            capsize=3,
            label=row["label"],
        )
    axes.set(
        xlabel="forward passes per answer",
        ylabel="accuracy",
        title=f"{report['model']} on {report['task']}",
        ylim=(-0.02, 1.05),
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure

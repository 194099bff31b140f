"""Fills in the model card, card.md, from the training record."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from coconut_serve.training.evaluate import wilson_interval

_TEMPLATE: Final = Path(__file__).with_name("card.md")


def render_card(record: dict[str, Any]) -> str:
    """Render README.md from the result of `export.training_record`."""
    recipe, machine = record["recipe"], record["machine"]
    return _TEMPLATE.read_text(encoding="utf-8").format(
        parameters=record["parameters"],
        per_hop=record["test"]["per_hop"],
        accuracy_table=_accuracy_table(record["test"]),
        num_audited=record["shortcut_audit"]["per_hop"],
        audit_table=_audit_table(record["shortcut_audit"]["right"]),
        seed=recipe["seed"],
        steps=record["steps"],
        batch_size=recipe["batch_size"],
        minutes=record["seconds"] / 60,
        threads=machine["threads"],
        device=machine["device"],
        phase_table=_phase_table(recipe["phases"]),
    )


def _accuracy_table(test: dict[str, Any]) -> str:
    rows = (
        [name, *(_with_interval(ratio, test["per_hop"]) for ratio in ratios)]
        for name, ratios in test["accuracy"].items()
    )
    return _table(["mode", *(f"{hops} hops" for hops in test["hops"])], rows)


def _with_interval(ratio: float, count: int) -> str:
    low, high = (100 * bound for bound in wilson_interval(ratio, count))
    return f"{100 * ratio:.1f} [{low:.1f}, {high:.1f}]"


def _audit_table(by_hops: dict[str, dict[str, float]]) -> str:
    rules = next(iter(by_hops.values()))
    rows = (
        [rule.replace("_", " "), *(f"{100 * right[rule]:.1f} %" for right in by_hops.values())]
        for rule in rules
    )
    return _table(["", *(f"{hops} hops" for hops in by_hops)], rows)


def _phase_table(phases: Iterable[dict[str, Any]]) -> str:
    columns = ("name", "steps", "hops", "num_thoughts", "num_stages", "soft_ratio", "cot_weight")
    head = ["phase", "steps", "hops", "thoughts", "values of k a batch", "soft", "weight of cot"]
    return _table(head, ([_cell(phase, c) for c in columns] for phase in phases))


def _cell(phase: dict[str, Any], column: str) -> str:
    if phase["is_lookup"] and column not in ("name", "steps", "hops"):
        return "-"
    value = phase[column]
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

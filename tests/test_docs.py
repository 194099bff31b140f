"""Docs that lag behind the code fail; `python -m tests.test_docs` writes the generated parts."""

import argparse
import ast
import json
import os
import re
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from coconut_serve.cli import build_parser
from coconut_serve.declare import Setting
from coconut_serve.metrics import Metrics
from coconut_serve.params import ASKED
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.server import fields, reasoning_body, schemas
from coconut_serve.service.presets import EFFORTS, PRESETS
from tests.fakes import make_metrics

ROOT = Path(__file__).parents[1]
DOCS = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
ALL = "\n".join(DOCS.values())


_ACCEPTED = "Accepted without effect: "
_REJECTED = "Rejected with 400 `unsupported_parameter`, but for values in brackets: "
_HELP = {"serve": "api.md", "convert": "checkpoints.md", "eval": "evaluation.md"}


def command_help(command: str) -> str:
    os.environ["COLUMNS"] = "100"
    parser = build_parser()
    [commands] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    text: str = commands.choices[command].format_help().rstrip()
    return text


def metric_rows(metrics: Metrics) -> list[str]:
    rows = []
    for family in metrics.registry.collect():
        total = "_total" if family.type == "counter" else ""
        own = getattr(metrics.registry, "_names_to_collectors")[family.name]  # noqa: B009 (private)
        labels = [n for n in own._labelnames if n not in ("model_name", "engine")]
        shown = ", ".join("mode" if n == "reasoning_mode" else n for n in labels) or "-"
        rows.append(f"| `{family.name}{total}` | {family.type} | {shown} |")
    return rows


def test_help_in_the_docs_is_what_the_command_prints() -> None:
    for command, name in _HELP.items():
        assert command_help(command) in DOCS[name], "run python -m tests.test_docs"


def test_every_metric_is_in_the_docs_with_its_labels() -> None:
    for row in metric_rows(make_metrics()):
        assert row in DOCS["operations.md"], "run python -m tests.test_docs"


@pytest.mark.parametrize("mode", mode_names())
def test_every_mode_is_explained(mode: str) -> None:
    assert f"`{mode}`" in DOCS["README.md"]
    assert f"`{mode}`" in DOCS["methods.md"]


@pytest.mark.parametrize(
    "model",
    [
        schemas.ChatRequest,
        schemas.CompletionRequest,
        reasoning_body.ReasoningBody,
        reasoning_body.MixtureBody,
        reasoning_body.HaltBody,
        reasoning_body.SwitchBody,
        reasoning_body.AfterBody,
        reasoning_body.ReplayBody,
    ],
)
def test_every_request_field_is_in_the_docs(model: type[BaseModel]) -> None:
    for name in model.model_fields:
        assert re.search(rf"\b{name}\b", DOCS["api.md"]), name


def field_lists() -> list[str]:
    """What the docs say of fields that are not ours; in brackets values that ask for nothing."""

    def show(name: str) -> str:
        neutral = ", ".join(map(json.dumps, fields.REJECTED[name]))
        return f"`{name}`" + (f" ({neutral})" if neutral else "")

    accepted = ", ".join(f"`{name}`" for name in sorted(fields.ACCEPTED))
    rejected = ", ".join(map(show, sorted(fields.REJECTED)))
    return [f"{_ACCEPTED}{accepted}.", f"{_REJECTED}{rejected}."]


def test_accepted_and_rejected_fields_are_listed_as_such() -> None:
    for line in field_lists():
        assert line in DOCS["api.md"], "run python -m tests.test_docs"


_LISTED = {float: "numbers"}


def values_of(own: Setting) -> str:
    """What a setting takes, in words: choices, a range, or kinds of value."""
    kind = own.takes or own.type
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    names_tokens = any(
        get_origin(kind) is list and get_args(get_args(kind)[0]) == (int, str) for kind in kinds
    )
    shown: list[str] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            shown += map(str, get_args(kind))
        elif get_origin(kind) in (list, tuple):
            inner = get_args(kind)[0]
            is_choice = get_origin(inner) is Literal
            shown.append(
                "a list of " + _LISTED.get(inner, "those" if is_choice else "ids or texts")
            )
        elif kind is bool:
            shown += ["true", "false"]
        elif names_tokens:
            shown.append({int: "an id", str: "a text"}[kind])
        elif kind is str and own.usual != "-":
            shown.append("a name")
        elif kind in (int, float) and own.range:
            shown.append(own.range.removeprefix("in "))
    return ", ".join(shown) or "-"


def setting_rows() -> list[str]:
    """A row for each setting of `reasoning`."""
    scales = (f"{name} (x {scale:g})" for name, scale in EFFORTS.items())
    named = {
        "mode": ", ".join(mode_names()),
        "preset": ", ".join(PRESETS),
        "effort": ", ".join(["none", *scales]),
        "speed": "auto, at least 1",
    }
    rows = []
    for name, own in sorted(ASKED.items(), key=lambda item: item[0].count(".")):
        default = own.default if isinstance(own.default, bool | str | int | float) else "-"
        shown = own.usual or (str(default).lower() if isinstance(default, bool) else f"{default}")
        paper = f" (arXiv {own.paper})" if own.paper else ""
        values = named.get(name) or values_of(own)
        rows.append(f"| `{name}` | {values} | {shown} | {own.doc}{paper} |")
    return rows


def test_every_setting_of_reasoning_is_in_the_docs() -> None:
    table = "\n".join(["|---|---|---|---|", *setting_rows(), "\n"])
    assert table in DOCS["api.md"], "run python -m tests.test_docs"


def test_presets_are_in_the_docs() -> None:
    for name in PRESETS:
        assert f"`{name}`" in DOCS["methods.md"] or f'"{name}"' in DOCS["methods.md"], name


def test_every_error_code_is_in_the_docs() -> None:
    codes = set()
    for file in (ROOT / "coconut_serve").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "code":
                codes |= {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "code":
                codes |= {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
    named = {c for c in codes if isinstance(c, str) and re.fullmatch(r"[a-z_]{6,}", c)}
    assert len(named) > 12
    for code in named - {"startup_failed", "http_error", "missing"}:  # no client sees these
        assert f"`{code}`" in DOCS["api.md"], code


def test_places_that_the_design_names_exist() -> None:
    table = DOCS["design.md"].partition("## Where to find it")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| .* \| `(.*)` \| (.*) \|$", table, flags=re.M)
    assert len(rows) > 15
    for file, names in rows:
        text = (ROOT / "coconut_serve" / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", text), (file, name)


def test_links_between_documents_lead_somewhere() -> None:
    for name, text in DOCS.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)#]+)", text):
            if not target.startswith("http"):
                assert (folder / target).exists(), (name, target)


def test_changelog_and_decisions_have_their_form() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
    for file in (ROOT / "docs" / "decisions").glob("*.md"):
        text = file.read_text()
        assert text.startswith(f"# {file.name[:4]} ")
        for part in ("Status:", "Context:", "Decision:", "Rejected:", "Consequences:"):
            assert part in text, file.name


def write() -> None:
    """Put the generated parts into the docs."""
    for command, name in _HELP.items():
        page, new = ROOT / "docs" / name, command_help(command)
        block = re.compile(r"(## Flags\n\n```\n).*?(\n```)", flags=re.DOTALL)
        page.write_text(block.sub(lambda m, new=new: m[1] + new + m[2], page.read_text()))  # type: ignore[misc]  # new is bound at once
    api = ROOT / "docs" / "api.md"
    heads = "|".join(map(re.escape, (_ACCEPTED, _REJECTED)))
    lines = iter(field_lists())
    api.write_text(re.sub(rf"^({heads}).*", lambda _: next(lines), api.read_text(), flags=re.M))
    write_table(api, "| `reasoning.` | values | default | |\n|---|---|---|---|\n", setting_rows())
    operations = ROOT / "docs" / "operations.md"
    head = "| metric | type | more labels |\n|---|---|---|\n"
    write_table(operations, head, metric_rows(make_metrics()))


def write_table(page: Path, head: str, rows: list[str]) -> None:
    before, _, after = page.read_text().partition(head)
    rest = re.sub(r"^(\|.*\n)*", "", after)
    page.write_text(before + head + "\n".join(rows) + "\n" + rest)


if __name__ == "__main__":
    write()

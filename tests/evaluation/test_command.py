"""`coconut-serve eval` against servers that are really there."""

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coconut_serve.checkpoint.manifest import Manifest
from coconut_serve.errors import StartupError
from coconut_serve.evaluation import command
from coconut_serve.reasoning.registry import mode_names
from tests.fakes import listening, stub_app


def parse(*words: str, more: tuple[str, ...] = ()) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["eval", *words])
    args.more_flags = list(more)
    return args


def write_task(folder: Path) -> Path:
    path = folder / "task.json"
    items = [{"question": f"q{i}", "answer": "z", "steps": ["s"] * (i % 2)} for i in range(6)]
    path.write_text(json.dumps(items))
    return path


async def test_every_run_of_a_url_is_in_the_report(tmp_path: Path) -> None:
    latent = {"id": 5}
    manifest = Manifest.model_validate(
        {"modes": list(mode_names()), "variable_steps": True, "tokens": {"latent": latent}}
    )
    output = tmp_path / "out.json"
    async with listening(stub_app(manifest=manifest)) as url:
        args = parse(
            url, "--task", str(write_task(tmp_path)), "--controls", "--sweep", "steps=2",
            "--modes", "cot,latent", "--max-tokens", "4", "--output", str(output),
        )  # fmt: skip
        assert await asyncio.to_thread(command.run, args) == 0
    report: dict[str, Any] = json.loads(output.read_text())
    labels = [row["label"] for row in report["results"]]
    assert labels == ["cot", "latent", "latent, steps=2", "latent, removed", "latent, constant"]
    steps = {row["label"]: row["reasoning_steps_mean"] for row in report["results"]}
    assert steps["latent"] == 6
    assert steps["latent, steps=2"] == 2
    assert steps["latent, removed"] == 0
    assert {row["n"] for row in report["results"]} == {6}
    assert len(report["comparisons"]) == 10
    assert output.with_suffix(".png").exists()


async def test_what_cannot_be_asked_is_said(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    with pytest.raises(StartupError, match="needs a model, not a URL"):
        command.run(parse("http://127.0.0.1:9", "--task", str(task), more=("--dtype", "float32")))
    with pytest.raises(StartupError, match="--task FILE is needed"):
        command.run(parse("http://127.0.0.1:9"))
    nobody = parse("http://127.0.0.1:9", "--task", str(task))
    with pytest.raises(StartupError, match="http://127"):
        await asyncio.to_thread(command.run, nobody)
    async with listening(stub_app()) as url:
        args = parse(url, "--task", str(task), "--modes", "telepathy")
        with pytest.raises(StartupError, match=r"telepathy: .*must be one of"):
            await asyncio.to_thread(command.run, args)


def test_model_that_cannot_be_served_ends_the_command(tmp_path: Path) -> None:
    args = parse(str(tmp_path / "none"), "--task", str(write_task(tmp_path)))
    with pytest.raises(StartupError, match="could not be served"):
        command.run(args)


def test_model_is_served_for_the_evaluation(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    task = str(write_task(tmp_path))
    args = parse(
        "m",
        "--task",
        task,
        "--limit",
        "2",
        "--max-tokens",
        "3",
        "--output",
        str(output),
        more=("--engine", "stub"),
    )
    assert command.run(args) == 0
    report = json.loads(output.read_text())
    assert [row["mode"] for row in report["results"]] == list(mode_names())


def test_nothing_is_logged_over_the_bar(tmp_path: Path) -> None:
    """The bug: two lines a question, one of the client's and one of the server's."""
    words = ["--task", str(write_task(tmp_path)), "--modes", "none,cot", "--max-tokens", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "coconut_serve", "eval", "m", *words, "--", "--engine", "stub"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "INFO" not in done.stderr
    assert done.stdout.splitlines()[-1].split() == ["none", "cot", "0", "0", "1"], "is printed"

"""One way to check a refusal: a line of error, and nothing written."""

from pathlib import Path

import pytest

from coconut_serve.cli import main
from tests.convert.builders import Case

Capture = pytest.CaptureFixture[str]


def refuse(case: Case, folder: Path, capsys: Capture, *flags: str) -> str:
    """Run, expect one line of error and an untouched folder; the line."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert main([*case.command, *flags, str(folder / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sorted(folder.rglob("*")) == before, "nothing is written"
    message = captured.err
    assert message.startswith("coconut-serve: ")
    assert "Traceback" not in message
    return message

"""`coconut-serve completion`, as a shell uses it."""

import subprocess
import sys
from pathlib import Path

import pytest

from coconut_serve.cli import main


def test_bash_completes_commands_flags_and_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    file = tmp_path / "complete.bash"
    file.write_text(capsys.readouterr().out)
    for words, found in (
        ("coconut-serve ser", "serve"),
        ("coconut-serve run-b", "run-batch"),
        ("coconut-serve collect-env --j", "--json"),
        ("coconut-serve chat --mode lat", "latent"),
        ("coconut-serve serve --max-num-s", "--max-num-seqs"),
        ("coconut-serve serve --engine nat", "native"),
    ):
        asked = f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))"
        line = f'source {file}; {asked}; _shtab_coconut_serve; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [found]


def test_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "[completion]" in capsys.readouterr().err

"""`coconut-serve train`: its flags, and what it refuses."""

from pathlib import Path

import pytest

from coconut_serve import cli
from coconut_serve.training import export as export_module
from coconut_serve.training import trainer as trainer_module

pytestmark = pytest.mark.torch


def test_a_short_run_writes_a_servable_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (
        (trainer_module, "_DEV_PER_HOP"),
        (export_module, "_TEST_PER_HOP"),
        (export_module, "_QUESTIONS_PER_HOP"),
        (export_module, "_NUM_AUDITED"),
    ):
        monkeypatch.setattr(module, name, 2)
    flags = ["train", "demo", "--output", str(tmp_path), "--steps-scale", "0.0001", "--no-frontier"]
    assert cli.main(flags) == 0
    assert (tmp_path / "model.safetensors").is_file()
    assert cli.main(flags) == 2, "a checkpoint is not written over unasked"
    assert cli.main([*flags, "--resume"]) == 0
    assert cli.main([*flags, "--resume", "--no-prior"]) == 2


def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["train", "demo", "--output", str(tmp_path)]
    assert cli.main([*flags, "--steps-scale", "0"]) == 2
    assert "--steps-scale" in capsys.readouterr().err
    assert cli.main([*flags, "--resume"]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "gpt5", "--output", str(tmp_path)])

"""A start is not silent: a bar on a terminal, lines in a log."""

import logging

import pytest

from coconut_serve.checkpoint.stages import stage


def test_log_has_a_line_at_the_beginning_and_one_at_the_end(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    with stage("packing weights", show_progress=False):
        assert caplog.messages == ["packing weights"]
    assert caplog.messages[1:] == ["packing weights took 0.0 s"]
    assert vars(caplog.records[1])["stage"] == "packing weights"  # fields of a JSON line
    assert vars(caplog.records[1])["seconds"] == 0.0
    assert capsys.readouterr().err == ""


def test_terminal_has_a_bar_and_no_lines(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    with stage("packing weights", show_progress=True):
        assert "packing weights: 00:00" in capsys.readouterr().err
    with stage("loading weights", show_progress=True, has_own_bar=True):
        pass
    assert "loading weights" not in capsys.readouterr().err
    assert not caplog.messages


def test_stage_that_fails_took_no_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match="x"), stage("packing weights", show_progress=False):
        raise ValueError("x")
    assert caplog.messages == ["packing weights"]

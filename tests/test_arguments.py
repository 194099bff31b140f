"""The command line helps whoever mistypes or does not know it."""

import argparse

import pytest

from coconut_serve.cli import build_parser, main, parse_args

_MEANT = [
    (["srve"], "did you mean serve?"),
    (["--versoin"], "did you mean --version?"),
    (["serve", "--prot=3"], "did you mean --port?"),
    (["serve", "demo", "--max-queu", "3"], "did you mean --max-queue?"),
    (["serve", "--engine", "natvie"], "did you mean native?"),
    (["bench", "url", "--concurency", "3"], "did you mean --concurrency?"),
]


def parsers() -> dict[str, argparse.ArgumentParser]:
    [commands] = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(commands.choices)


@pytest.mark.parametrize(("words", "hint"), _MEANT)
def test_typo_gets_a_suggestion(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """argparse named every choice, or said no more than that it does not know the word."""
    with pytest.raises(SystemExit) as caught:
        parse_args(words, {})
    assert caught.value.code == 2
    assert hint in capsys.readouterr().err


def test_flag_is_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    """`--max-num-seq 5` was taken for --max-num-seqs, until another flag would begin so."""
    with pytest.raises(SystemExit):
        parse_args(["serve", "--max-num-seq", "5"], {})
    assert "did you mean --max-num-seqs?" in capsys.readouterr().err


def test_unlike_anything_gets_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["serve", "--zzzz"], {})
    assert "did you mean" not in capsys.readouterr().err


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """It ended with status 2 and "the following arguments are required: COMMAND"."""
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in parsers())


@pytest.mark.parametrize("command", parsers())
def test_help_tells_every_default(command: str) -> None:
    """No default was shown, so --help could not answer what a flag does unless it is given."""
    parser = parsers()[command]
    for action in parser._actions:
        if action.option_strings and not action.required and action.dest != "help":
            formatter = parser._get_formatter()
            formatter.add_argument(action)
            assert "default: " in " ".join(formatter.format_help().split()), action.option_strings


def test_help_of_serve_is_in_groups() -> None:
    groups = parsers()["serve"]._action_groups
    sizes = {group.title: len(group._group_actions) for group in groups}
    assert sizes["options"] == 2, "--help and --config; all others have a group that says what of"
    assert {"Model", "Engine", "Reasoning", "HTTP", "Limits"} < sizes.keys()

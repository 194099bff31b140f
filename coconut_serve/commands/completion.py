"""`coconut-serve completion`: a shell script that completes commands, flags and files."""

import argparse
from typing import Any

from coconut_serve.errors import StartupError

_PATHS = (
    "DIR",
    "DST",
    "FILE",
    "MODEL",
    "SRC",
    "URL|MODEL",
)  # metavars of arguments that may be paths


def add_parser(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    about = 'for this shell: eval "$(coconut-serve completion bash)"'
    parser = commands.add_parser("completion", help="print a completion script", epilog=about)
    parser.add_argument("shell", choices=["bash", "zsh"])


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Generate the script.

    Raises:
        StartupError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise StartupError(
            "completion needs shtab: install the extra [completion], or pip install shtab"
        ) from error
    for action in _actions(parser):
        if action.metavar in _PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab reads it
    return str(shtab.complete(parser, shell=shell))


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    found = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [each for command in action.choices.values() for each in _actions(command)]
    return found

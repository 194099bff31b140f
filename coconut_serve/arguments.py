"""Command-line parsing that shows every default in --help and suggests a fix for each typo."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the closest known name, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def option(name: str) -> str:
    """Return the command-line flag of a setting."""
    return f"--{name.replace('_', '-')}"


class HelpFormatter(argparse.HelpFormatter):
    """Appends each flag's default to its help, unless the text already states it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_plain = not action.option_strings or action.default is argparse.SUPPRESS
        if is_plain or action.required or "default:" in text:
            return text
        return f"{text} (default: {_shown(action.default)})"


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None or default in ("", [], {}):
        return "none"
    shown = ",".join(map(str, default)) if isinstance(default, list) else str(default)
    return shown.replace("%", "%%")  # argparse formats it


class Parser(argparse.ArgumentParser):
    """Suggests the closest name for a misspelt flag or choice; subcommands use this class too.

    Abbreviated flags are rejected: adding a flag could make them ambiguous.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)

    def parse_known_args(  # type: ignore[override]  # only one overload is used
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Reject unknown flags here, where the subcommand's flags are known."""
        parsed, rest = super().parse_known_args(args, namespace)
        if rest:
            flag = rest[0].partition("=")[0]
            hint = did_you_mean(flag, self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return parsed, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            hint = did_you_mean(str(value), known)
            raise argparse.ArgumentError(
                action, f"{value!r} is not one of {', '.join(known)}{hint}"
            )

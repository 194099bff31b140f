"""Command lines as users expect them: every default in the help, a suggestion for each typo."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known name that is nearest to a misspelt one, as the end of a message; or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def option(name: str) -> str:
    """A setting's name as users write it on the command line."""
    return f"--{name.replace('_', '-')}"


class HelpFormatter(argparse.HelpFormatter):
    """Ends the help of each flag with its default, unless the text tells it."""

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
    """Suggests the right name for a wrong one. Flags are not abbreviated: a new one would break it.

    Its subcommands are parsers of this kind too.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)

    def parse_known_args(  # type: ignore[override]  # of its overloads one is used
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse what is unknown here, where the flags of a subcommand are known."""
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

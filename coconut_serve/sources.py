"""Where settings come from: flags of the command line, the environment and a file."""

import argparse
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from coconut_serve.arguments import did_you_mean, option
from coconut_serve.config import Record, kind_of
from coconut_serve.errors import StartupError

logger = logging.getLogger(__name__)

# No flags, and looked at elsewhere; COCONUT_CONFIG is looked at here.
_NOT_FLAGS = frozenset({"cache", "commit", "config", "log_level", "vllm"})

# What Kubernetes sets in each container for a Service whose name begins with coconut.
_LINK_NAME = re.compile(
    r".*_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_[A-Z]+(_(ADDR|PORT|PROTO))?)"
)
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")


def add_flags(parser: argparse.ArgumentParser, settings: type[Record]) -> None:
    """Write the flags of settings into a parser, grouped; a default of None is told in the text."""
    flags = settings.flags()
    titles = dict.fromkeys(field.title for field in flags.values())
    groups = {title: parser.add_argument_group(title) for title in titles}
    for name, field in flags.items():
        kind, choices = kind_of(field)
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        text = (field.description or "").replace("%", "%%")  # argparse formats it
        options: dict[str, Any] = {"action": "store_true"}
        if choices:
            options = {"type": type(choices[0]), "choices": choices}
        elif kind is not bool:
            metavar = {int: "N", float: "X"}.get(kind, "VALUE")
            options = {"type": kind if kind in (int, float) else str, "metavar": metavar}
            options |= cast("dict[str, Any]", field.json_schema_extra or {})
        groups[field.title].add_argument(option(name), default=default, help=text, **options)


def read(args: argparse.Namespace, environ: Mapping[str, str], settings: type[Record]) -> list[str]:
    """Read the file that --config or COCONUT_CONFIG names, and the environment over it.

    They become words to put in front of those in `args`, so that they are checked as those are.

    Raises:
        StartupError: The file is unreadable or names an unknown setting; a key is misspelt.
    """
    known, path = settings.flags(), args.config or environ.get("COCONUT_CONFIG")
    layers = (_read_file(path, known) if path else {}) | _read_environment(environ, known)
    words: list[str] = []
    for name, text in sorted(layers.items()):
        values = _split_keys(text) if name == "api_key" else [text] if text else []
        if known[name].annotation is bool:
            words += [option(name)] if _is_true(name, text) else []
        elif not isinstance(known[name].default, tuple) or not getattr(args, name):
            words += [f"{option(name)}={value}" for value in values]  # a list is not added to
    return words


def _split_keys(text: str) -> list[str]:
    """Read API keys, comma-separated, or StartupError: without any, everybody would be let in."""
    keys = [key for key in map(str.strip, text.split(",")) if key]
    if not keys:
        raise StartupError("COCONUT_API_KEY is empty: set a key or unset it", param="--api-key")
    return keys


def _is_true(name: str, text: str) -> bool:
    """Read a boolean.

    Raises:
        StartupError: It is none.
    """
    words = dict.fromkeys(("1", "true", "yes", "on"), True)
    words |= dict.fromkeys(("0", "false", "no", "off", ""), False)
    if text.lower() not in words:
        raise StartupError(f"{name}: {text!r} is not true or false", param=name)
    return words[text.lower()]


def _read_environment(environ: Mapping[str, str], known: Iterable[str]) -> dict[str, str]:
    """Find settings in COCONUT_*; names that are none are logged, since they may be misspelt."""
    read = {}
    for name, value in environ.items():
        if not name.startswith("COCONUT_") or _is_link(name, value):
            continue
        key = name.removeprefix("COCONUT_").lower()
        hint = did_you_mean(key.upper(), map(str.upper, known)).replace("mean ", "mean COCONUT_")
        if key in known:
            read[key] = value
        elif "key" in key:
            hint = hint or "; did you mean COCONUT_API_KEY?"
            raise StartupError(f"{name} is no setting{hint}", param=name)
        elif key not in _NOT_FLAGS:  # the value may be a secret
            logger.warning("ignoring %s: it is no flag's variable%s", name, hint)
    return read


def _is_link(name: str, value: str) -> bool:
    """Whether Kubernetes set it for a Service, which may have any name: COCONUT_API_KEY_PORT."""
    is_address = name.endswith("_PORT") and _LINK_VALUE.match(value)  # else --port and the like
    return bool(is_address or _LINK_NAME.fullmatch(name))


def _read_file(path: str, known: Iterable[str]) -> dict[str, str]:
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StartupError(f"cannot read --config {path}: {error}", param="--config") from error
    if not isinstance(data, dict):
        raise StartupError(f"--config {path} must hold a mapping", param="--config")
    read = {}
    for key, value in data.items():
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise StartupError(f"--config {path}: unknown key {key!r}{hint}", param="--config")
        if value is not None:  # as if the key were not there
            joined = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            read[key] = json.dumps(value) if isinstance(value, dict) else joined
    return read

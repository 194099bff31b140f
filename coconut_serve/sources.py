"""Reads settings from command-line flags, the environment and a file."""

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

# COCONUT_* variables that are not flags; of these only COCONUT_CONFIG is read here.
_NOT_FLAGS = frozenset({"cache", "commit", "config", "log_level", "vllm"})

# Kubernetes sets these in each container for a Service whose name begins with coconut.
_LINK_NAME = re.compile(
    r".*_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_[A-Z]+(_(ADDR|PORT|PROTO))?)"
)
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")


def add_flags(parser: argparse.ArgumentParser, settings: type[Record]) -> None:
    """Add a flag for each setting, by group; the help text itself explains a default of None."""
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
    """Read the file named by --config or COCONUT_CONFIG, overridden by the environment.

    Returns command-line words to put before the user's own, so that all are checked alike.

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
            words += [f"{option(name)}={value}" for value in values]  # flags replace a list
    return words


def _split_keys(text: str) -> list[str]:
    """Split comma-separated API keys; StartupError if none, which would admit everybody."""
    keys = [key for key in map(str.strip, text.split(",")) if key]
    if not keys:
        raise StartupError("COCONUT_API_KEY is empty: set a key or unset it", param="--api-key")
    return keys


def _is_true(name: str, text: str) -> bool:
    """Parse a boolean; StartupError if it is not one."""
    words = dict.fromkeys(("1", "true", "yes", "on"), True)
    words |= dict.fromkeys(("0", "false", "no", "off", ""), False)
    if text.lower() not in words:
        raise StartupError(f"{name}: {text!r} is not true or false", param=name)
    return words[text.lower()]


def _read_environment(environ: Mapping[str, str], known: Iterable[str]) -> dict[str, str]:
    """Read COCONUT_* variables; warn of unknown names, refuse those that look like a key."""
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
        elif key not in _NOT_FLAGS:  # log no value: it may be a secret
            logger.warning("ignoring %s: it is no flag's variable%s", name, hint)
    return read


def _is_link(name: str, value: str) -> bool:
    """Whether Kubernetes set it for a Service, even one named coconut-api-key."""
    is_address = name.endswith("_PORT") and _LINK_VALUE.match(value)  # else a flag such as --port
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
        if value is not None:  # null: unset
            joined = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            read[key] = json.dumps(value) if isinstance(value, dict) else joined
    return read

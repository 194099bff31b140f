"""The client's types of settings are those that the server declares.

`python -m tests.client.test_settings` writes coconut_serve/client/settings.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from coconut_serve import client, params
from coconut_serve.params import ASKED, PARTS
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.server.reasoning_body import ReasoningBody, ReplayBody
from coconut_serve.server.reasoning_body import ReplayStep as ReplayStepBody

FILE = Path(client.__file__).with_name("settings.py")
HEAD = '''"""The settings of `reasoning` as types: what they do is in docs/api.md.

Written by `python -m tests.client.test_settings` from params.py and reasoning/registry.py.
"""

from typing import Literal, NotRequired, TypedDict

from coconut_serve.params import (
    {imports},
)

ReasoningMode = Literal[{modes}]


class ReplayStep(TypedDict):
    """A step of a trace with vectors."""

    vector: str
    token_id: NotRequired[int | None]


class Replay(TypedDict):
    """What an earlier answer fed: its system_fingerprint and steps of its trace."""

    fingerprint: str
    steps: list[ReplayStep]
'''
# Types with a name in params.py are imported.
_NAMED = {
    kind: name
    for name, kind in vars(params).items()
    if get_origin(kind) is Literal and not name.startswith("_")
}


def _quoted(values: tuple[str, ...]) -> str:
    return ", ".join(f'"{value}"' for value in values)


def _source(kind: Any) -> str:
    """A type as source; None is left out: a key is."""
    if kind in _NAMED:
        return _NAMED[kind]
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (UnionType, Union):
        return " | ".join(_source(part) for part in parts if part is not NoneType)
    if origin in (list, tuple):
        return f"list[{_source(parts[0])}]"
    return f"Literal[{_quoted(parts)}]" if origin is Literal else str(kind.__name__)


def _class(name: str, about: str, fields: Mapping[str, str]) -> str:
    lines = [f"    {field}: {kind}\n" for field, kind in fields.items()]
    return f'\n\nclass {name}(TypedDict, total=False):\n    """{about}"""\n\n{"".join(lines)}'


def written() -> str:
    """The text of the file."""
    kinds = {name: _source(own.takes or own.type) for name, own in ASKED.items()}
    kinds["mode"] = "ReasoningMode"
    body = ""
    for part in PARTS:
        own = {n.partition(".")[2]: kind for n, kind in kinds.items() if n.startswith(f"{part}.")}
        body += _class(part.title(), f"`reasoning.{part}`.", own)
    own = {name: kind for name, kind in kinds.items() if "." not in name}
    own |= {part: part.title() for part in PARTS} | {"replay": "Replay"}
    body += _class("Reasoning", "How the model thinks.", own)
    used = sorted(name for name in _NAMED.values() if re.search(rf"\b{name}\b", body))
    return HEAD.format(imports=",\n    ".join(used), modes=_quoted(mode_names())) + body


def test_types_of_settings_are_those_that_the_server_declares() -> None:
    assert FILE.read_text() == written(), "run python -m tests.client.test_settings"


def test_every_field_that_the_server_takes_is_typed() -> None:
    """The file is written from ASKED: what the bodies have beside it is compared here."""
    assert set(get_type_hints(client.Reasoning)) == set(ReasoningBody.model_fields)
    for part in PARTS:
        own = get_type_hints(client.Reasoning)[part]
        body = get_args(ReasoningBody.model_fields[part].annotation)[0]
        assert set(get_type_hints(own)) == set(body.model_fields)
    replay = get_type_hints(client.Reasoning)["replay"]
    assert set(get_type_hints(replay)) == set(ReplayBody.model_fields)
    [step] = get_args(get_type_hints(replay)["steps"])
    assert set(get_type_hints(step)) == set(ReplayStepBody.model_fields)


def test_modes_are_those_of_the_registry() -> None:
    assert get_args(client.ReasoningMode) == mode_names()


if __name__ == "__main__":
    FILE.write_text(written())

"""The `reasoning` object of a request, and its settings by dotted name."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from coconut_serve.errors import InvalidRequestError
from coconut_serve.params import ASKED, MAX_STEPS, PARTS
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.server.body import Body, Items, body_of, say
from coconut_serve.server.fields import Path, paths_of, unknown_error
from coconut_serve.service.presets import PRESETS


def _part(name: str) -> Any:
    """The body of an object in `reasoning`."""
    own = {key.partition(".")[2]: each for key, each in ASKED.items() if key.startswith(f"{name}.")}
    return body_of(f"{name.title()}Body", PARTS[name], own)


class ReplayStep(Body):
    """A step of `reasoning_trace`; what else it says is not looked at."""

    vector: str = Field(description="What was fed: float32, little-endian, base64.")
    token_id: Annotated[int, Field(ge=0)] | None = say("The text of the step.")


class ReplayBody(Body):
    """reasoning.replay: what an earlier answer fed, instead of own vectors."""

    fingerprint: str = Field(description="system_fingerprint of that answer.")
    steps: Annotated[Items[ReplayStep], Field(min_length=1, max_length=MAX_STEPS)] = Field(
        description="Steps of its trace with vectors."
    )


_PARTS = {name: _part(name) for name in PARTS}
MixtureBody, HaltBody, SwitchBody, AfterBody = _PARTS.values()
_Settings: Any = body_of(
    "_Settings",
    "Settings of `reasoning`.",
    {name: own for name, own in ASKED.items() if "." not in name},
    examples={"mode": [*mode_names()], "preset": [*PRESETS]},
    **_PARTS,
)


class ReasoningBody(_Settings):  # type: ignore[misc]  # made from params.py
    """The `reasoning` object of chat and completions: how the model thinks."""

    replay: ReplayBody | None = say("Vectors to feed, from an earlier answer.")


REASONING_PATHS = tuple(Path(f"reasoning.{each.path}") for each in paths_of(ReasoningBody))


def flatten_reasoning(body: ReasoningBody | None) -> dict[str, Any]:
    """Explicit settings by dotted name, e.g. "mixture.top_k".

    Raises:
        InvalidRequestError: A setting is unknown.
    """
    asked: dict[str, Any] = {}
    if body is not None:
        _flatten(body, "", asked)
    _check_values(asked)
    return asked


def _flatten(part: Body, prefix: str, asked: dict[str, Any]) -> None:
    for name, value in part:  # declared fields, then unknown ones
        dotted = prefix + name
        if isinstance(value, Body):
            _flatten(value, f"{dotted}.", asked)
        elif value is not None:
            if name not in type(part).model_fields:
                raise unknown_error(f"reasoning.{dotted}", REASONING_PATHS)
            asked[dotted] = value


def _check_values(asked: Mapping[str, Any]) -> None:
    preset = asked.get("preset")
    if preset is not None and preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise InvalidRequestError(
            f"reasoning.preset must be one of {known}", param="reasoning.preset"
        )
    speed = asked.get("speed", "auto")
    if speed != "auto" and (isinstance(speed, str) or speed < 1):
        raise InvalidRequestError(
            "reasoning.speed must be 'auto' or a whole number from 1", param="reasoning.speed"
        )

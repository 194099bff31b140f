"""OpenAI's clients, whose calls take `reasoning_mode` and `reasoning`."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, cast

from openai import NotGiven, Omit

from coconut_serve.client.settings import Reasoning, ReasoningMode

if TYPE_CHECKING:
    import coconut_serve.client.calls as stock
else:
    import openai as stock

_FIELDS = ("reasoning_mode", "reasoning")
_CALLS = ("create", "stream", "parse")
R = TypeVar("R")


class _Thinking:
    """What both clients have beyond OpenAI's."""

    _reasoning: Mapping[str, Any] = {}  # fields of calls in no other mode

    def with_reasoning_mode(self, mode: ReasoningMode, /, **settings: Unpack[Reasoning]) -> Self:
        """Return a client whose calls think in `mode`, with these settings of `reasoning`.

        What a call says itself comes first; a call in another mode gets none of the settings.
        """
        made = cast(Self, self.copy())  # type: ignore[attr-defined]  # of the client beside it
        made._reasoning = {"reasoning_mode": mode} | ({"reasoning": settings} if settings else {})
        return made

    if not TYPE_CHECKING:  # their signatures are OpenAI's

        def copy(self, **options: Any) -> Self:
            """Return a client with other options."""
            made = super().copy(**options)
            made._reasoning = self._reasoning
            return made

        with_options = copy

        @functools.cached_property
        def chat(self) -> Any:
            """Chats."""
            chat = super().chat
            self._extend(chat.completions)
            return chat

        @functools.cached_property
        def completions(self) -> Any:
            """Raw prompts."""
            return self._extend(super().completions)

        @functools.cached_property
        def responses(self) -> Any:
            """OpenAI's Responses, whose `reasoning` has a mode of its own."""
            return self._extend(super().responses, has_mode=True)

        @functools.cached_property
        def beta(self) -> Any:
            """The same under older or newer names."""
            beta = super().beta
            self._extend(beta.chat.completions)
            if hasattr(beta, "responses"):  # since openai 2
                self._extend(beta.responses, has_mode=True)
            return beta

    def _extend(self, resource: R, *, has_mode: bool = False) -> R:
        """Make the calls of a resource take our fields."""
        for name in _CALLS:
            if (call := getattr(resource, name, None)) is not None:
                setattr(resource, name, self._extended(call, has_mode))
        return resource

    def _extended(self, call: Callable[..., R], has_mode: bool) -> Callable[..., R]:
        @functools.wraps(call)
        def extended(*args: Any, **options: Any) -> R:
            return call(*args, **_with_body(options, self._reasoning, has_mode))

        return extended


class OpenAI(_Thinking, stock.OpenAI):
    """openai.OpenAI, whose calls take `reasoning_mode` and `reasoning`."""


class AsyncOpenAI(_Thinking, stock.AsyncOpenAI):
    """openai.AsyncOpenAI, whose calls take `reasoning_mode` and `reasoning`."""


def _with_body(
    options: dict[str, Any], default: Mapping[str, Any], has_mode: bool
) -> dict[str, Any]:
    """The arguments of OpenAI's call: our fields are in extra_body.

    Raises:
        TypeError: A field is given twice, differently.
    """
    ours = {name: options.pop(name) for name in _FIELDS if name in options}
    asked = {k: v for k, v in ours.items() if v is not None and not isinstance(v, NotGiven | Omit)}
    body = _merged(_shaped(asked, has_mode), options.get("extra_body") or {})
    if _mode_of(body) in (None, _mode_of(default)):
        body = _merged(body, _shaped(default, has_mode), first_wins=True)
    return options | {"extra_body": body} if body else options


def _shaped(fields: Mapping[str, Any], has_mode: bool) -> Mapping[str, Any]:
    """Fields as an endpoint names them: Responses have the mode inside `reasoning`."""
    if not has_mode or "reasoning_mode" not in fields:
        return fields
    mode = {"mode": fields["reasoning_mode"]}
    return {"reasoning": _merged(mode, fields.get("reasoning", {}), "reasoning.")}


def _mode_of(fields: Mapping[str, Any]) -> Any:
    """The mode that a call asks for; None: it does not say."""
    settings = fields.get("reasoning")
    inner = settings.get("mode") if isinstance(settings, Mapping) else None
    return fields.get("reasoning_mode") or inner


def _merged(
    first: Mapping[str, Any], second: Mapping[str, Any], path: str = "", *, first_wins: bool = False
) -> dict[str, Any]:
    """Both, deeply.

    Raises:
        TypeError: A field differs and the first does not win.
    """
    merged = {**second, **first}
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            merged[name] = _merged(one, other, f"{path}{name}.", first_wins=first_wins)
        elif one != other and not first_wins:
            raise TypeError(f"{path}{name} is given twice: as {one!r} and as {other!r}")
    return merged

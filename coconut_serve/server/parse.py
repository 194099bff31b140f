"""Parses HTTP requests: body, model name, reasoning mode, unknown fields."""

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from coconut_serve.config import ServeConfig
from coconut_serve.errors import InvalidRequestError, NotFoundError, PayloadTooLargeError
from coconut_serve.reasoning.registry import NO_THINKING, mode_names
from coconut_serve.server.errors import from_validation
from coconut_serve.server.fields import ignored_fields
from coconut_serve.server.reasoning_body import flatten_reasoning
from coconut_serve.server.schemas import (
    OTHERS,
    SAMPLING_FIELDS,
    GenerationBody,
    NamedBody,
    check_effort,
    check_mode_name,
)
from coconut_serve.service.ask import GenerateCall, SamplingFields
from coconut_serve.service.presets import NO_EFFORT
from coconut_serve.service.replay import ReplayInput

BodyT = TypeVar("BodyT", bound=NamedBody)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFields:
    """Reasoning fields of a request, from body, header or model name."""

    mode: str | None
    effort: str | None
    explains: bool
    settings: dict[str, Any]
    replay: ReplayInput | None = None


def request_id(request: Request) -> str:
    """The client's X-Request-Id if it is well formed, else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def read_body(
    request: Request, kind: type[BodyT], config: ServeConfig
) -> tuple[BodyT, list[str]]:
    """Read and check a JSON body and the model it names.

    Returns:
        The body, and the names of unknown fields that were ignored.

    Raises:
        PayloadTooLargeError: It is larger than `config.max_body_bytes`.
        InvalidRequestError: It is not a JSON object, or a field is wrong.
        NotFoundError: The model is not served here.
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if not media_type.lower().endswith("json"):
        error = InvalidRequestError(
            f"Content-Type {media_type!r}: send application/json", code="unsupported_media_type"
        )
        error.status = 415
        raise error
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > config.max_body_bytes:
            raise PayloadTooLargeError(f"the body is larger than {config.max_body_bytes} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except ValueError as error:
        raise _not_json(error) from None
    return parse_body(text, kind, config)


def parse_body(text: str, kind: type[BodyT], config: ServeConfig) -> tuple[BodyT, list[str]]:
    """Parse and check a JSON text; results and errors are those of `read_body`."""
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:  # a lone surrogate is not text
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _not_json(error) from None
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object", code="invalid_json")
    try:
        # Clients send null for fields they leave out.
        body = kind.model_validate({k: v for k, v in data.items() if v is not None})
    except ValidationError as error:
        raise from_validation(error) from None
    except RecursionError:
        raise InvalidRequestError("the body is nested too deep", code="invalid_json") from None
    check_model(body.model, config)
    return body, _check_unknown(body, config)


def _not_json(error: Exception) -> InvalidRequestError:
    return InvalidRequestError(f"the body is not JSON: {error}", code="invalid_json")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def read_reasoning(
    body: GenerationBody, config: ServeConfig, header: str | None = None
) -> ReasoningFields:
    """Find the reasoning mode and its settings; `header` is the value of X-Reasoning-Mode.

    A mode may come from the body, `reasoning.mode`, the X-Reasoning-Mode header or a suffix of the
    model name. Two that disagree are an error, never a guess.

    Raises:
        InvalidRequestError: A value is wrong, or two places disagree.
    """
    settings = flatten_reasoning(body.reasoning)
    efforts = {
        "reasoning_effort": body.reasoning_effort,
        "reasoning.effort": settings.pop("effort", None),
    }
    places = {
        "reasoning_mode": body.reasoning_mode,
        "reasoning.mode": settings.pop("mode", None),
        "X-Reasoning-Mode": header,
        "model": split_model(body.model, config)[1],
    }
    effort: str | None = None
    for param, value in efforts.items():
        if effort is not None and value is not None and value != effort:
            raise InvalidRequestError(
                f"{param}={value!r}, but reasoning_effort={effort!r}", param=param
            )
        effort = check_effort(value, param) or effort
    if effort == NO_EFFORT:
        places["reasoning_effort"], effort = NO_THINKING, None
    said = {param: check_mode_name(v, param) for param, v in places.items() if v is not None}
    if len(set(said.values())) > 1:
        detail = ", ".join(f"{param}={value!r}" for param, value in said.items())
        raise InvalidRequestError(
            f"two different reasoning modes: {detail}",
            param=next(iter(said)),
            code="reasoning_mode_conflict",
        )
    mode = next(iter(said.values()), None)
    return ReasoningFields(
        mode=mode,
        effort=effort,
        explains=settings.pop("explain", False),
        settings=settings,
        replay=_pop_replay(settings),
    )


def _pop_replay(settings: dict[str, Any]) -> ReplayInput | None:
    """Take the vectors out of the settings, since answers repeat the settings."""
    fingerprint, steps = (settings.pop(f"replay.{name}", None) for name in ("fingerprint", "steps"))
    if steps is None:
        return None
    return ReplayInput(
        fingerprint=fingerprint,
        vectors=tuple(step.vector for step in steps),
        token_ids=tuple(step.token_id for step in steps),
    )


def split_model(model: str | None, config: ServeConfig) -> tuple[str, str | None]:
    """Split "name:mode"; the exact served name wins, since names may hold a colon."""
    name = config.served_model_name
    if model is None or model == name:
        return name, None
    base, _, suffix = model.rpartition(":")
    if base == name and suffix in mode_names():
        return name, suffix
    return model, None


def check_model(model: str | None, config: ServeConfig) -> None:
    """Refuse a model that is not served here.

    Raises:
        NotFoundError: With code model_not_found.
    """
    if split_model(model, config)[0] != config.served_model_name:
        raise NotFoundError(
            f"the model {model!r} does not exist; served here: {config.served_model_name}",
            param="model",
            code="model_not_found",
        )


def _check_unknown(body: NamedBody, config: ServeConfig) -> list[str]:
    """Name ignored unknown fields; with --strict-params they are errors.

    Raises:
        InvalidRequestError: A field is rejected, misspelt, or unknown in strict mode.
    """
    unknown = ignored_fields(body, OTHERS.get(type(body), frozenset()))
    if unknown and config.strict_params:
        raise InvalidRequestError(
            f"unknown field {unknown[0]!r}", param=unknown[0], code="unknown_parameter"
        )
    return unknown


def generate_call(
    body: GenerationBody,
    asked: ReasoningFields,
    *,
    num_logprobs: int | None,
    max_tokens: tuple[str, int | None],
    max_positions: int | None = None,
    num_prompt_logprobs: int | None = None,
    **own: Any,
) -> GenerateCall:
    """Build a call, of HTTP or not.

    Args:
        body: Of any endpoint.
        asked: Its reasoning fields.
        num_logprobs: Rivals of each answer token to tell; None: no log-probabilities.
        max_tokens: Most answer tokens, behind the name that the endpoint has for them.
        max_positions: Most positions of thinking and answer together.
        num_prompt_logprobs: Rivals of each prompt token to tell.
        own: Fields of GenerateCall that the endpoint alone has.

    Raises:
        InvalidRequestError: Fields that exclude each other.
    """
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
    settings = asked.settings
    if max_positions is not None:
        asked_for = settings.get("max_total_steps", max_positions)
        settings = settings | {"max_total_steps": min(asked_for, max_positions)}
    is_picked = settings.get("branches", 1) > 1 and settings.get("select") != "all"
    if body.stream and is_picked:
        raise InvalidRequestError(
            "reasoning.select must be 'all' in a stream: a pick is known at the end alone",
            param="reasoning.select",
        )
    return GenerateCall(
        mode=asked.mode,
        effort=asked.effort,
        explains=asked.explains,
        reasoning=settings,
        replay=asked.replay,
        add_special_tokens=body.add_special_tokens,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        sampling=sampling_fields(
            body,
            max_tokens=max_tokens,
            num_logprobs=num_logprobs,
            num_prompt_logprobs=num_prompt_logprobs,
        ),
        **own,
    )


def sampling_fields(
    body: GenerationBody,
    *,
    max_tokens: tuple[str, int | None],
    num_logprobs: int | None,
    num_prompt_logprobs: int | None,
) -> SamplingFields:
    """The sampling fields of a body."""
    return SamplingFields(
        max_tokens=max_tokens[1],
        max_tokens_field=max_tokens[0],
        params={
            name: value for name in SAMPLING_FIELDS if (value := getattr(body, name)) is not None
        },
        logit_bias=body.bias(),
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
        bad_words=tuple(body.bad_words or ()),
        stop=body.stop_strings(),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        seed=body.seed,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
    )

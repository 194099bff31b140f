"""The reference at /openapi.json: what each route takes, returns and rejects.

Routes parse bodies and build responses by hand, so FastAPI learns of both here.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from coconut_serve.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from coconut_serve.server.usage import ReasoningInfo

_REF = "#/components/schemas/{model}"
Responses = dict[int | str, dict[str, Any]]


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str = Field(description="In words.")
    type: str = Field(description="OpenAI's kind of error, such as invalid_request_error.")
    param: str | None = Field(description="The field that it is about.")
    code: str | None = Field(description="For programs; docs/api.md lists them.")


class ErrorResponse(BaseModel):
    """Every error, whatever its status."""

    error: ErrorObject = Field(description="The error.")


class ModelList(BaseModel):
    """GET /v1/models."""

    object: str = Field(description="list")
    data: list[Model] = Field(description="The served model, and one for each of its modes.")


class ResponseObject(BaseModel):
    """OpenAI's response object; `output` holds reasoning and message items."""

    model_config = ConfigDict(extra="allow")

    id: str = Field(description="resp_ and the request's id.")
    status: str = Field(description="completed, incomplete, in_progress or failed.")
    output: list[dict[str, Any]] = Field(description="What was thought, then the answer.")
    usage: dict[str, Any] | None = Field(description="Tokens in and out, and usage.reasoning.")


class ResponseEvent(BaseModel):
    """An event of a stream; which fields it has depends on its type, as OpenAI defines them."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="Such as response.output_text.delta.")
    sequence_number: int = Field(description="From 0, in order.")


class Version(BaseModel):
    """GET /version."""

    version: str = Field(description="Of coconut-serve.")
    commit: str = Field(description="Of its source, where the image knows it.")
    engine: str = Field(description="native, vllm or stub.")
    device: str = Field(description="Where the model runs.")
    dtype: str = Field(description="Of weights and cache.")
    modes: list[str] = Field(description="Reasoning modes of the model.")
    limits: dict[str, int] = Field(description="Of requests, by the names of flags.")


class Tokens(BaseModel):
    """POST /tokenize."""

    count: int = Field(description="How many there are.")
    max_model_len: int = Field(description="How many the context holds.")
    tokens: list[int] = Field(description="Their ids.")
    token_strs: list[str] | None = Field(None, description="Their texts, if asked for.")


class Text(BaseModel):
    """POST /detokenize."""

    prompt: str = Field(description="The text.")


_ERRORS = {
    400: "A field is wrong; `param` names it.",
    401: "The API key is missing or wrong.",
    404: "No such model.",
    413: "The body is larger than the server reads.",
    415: "The body is not JSON.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "The server failed.",
    503: "The model loads, the server stops, or the engine is dead; see Retry-After.",
}


def _content(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": _REF.format(model=model.__name__)}}


def errors(*statuses: int) -> Responses:
    """Error responses of a route."""
    content = {"application/json": _content(ErrorResponse)}
    return {each: {"description": _ERRORS[each], "content": content} for each in statuses}


def answers(
    model: type[BaseModel], *statuses: int, events: type[BaseModel] | None = None
) -> Responses:
    """Responses of a route: its answer, as events too if it streams, and errors."""
    content, about = {"application/json": _content(model)}, f"{model.__name__}"
    if events is not None:
        content["text/event-stream"] = _content(events)
        about += (
            ". With `stream: true` server-sent events: each `data:` is one object of that schema, "
            "the last is `[DONE]`; an error after the first is an event of ErrorResponse."
        )
    return {200: {"description": about, "content": content}, **errors(*statuses)}


def plain(about: str, *statuses: int, media_type: str | None = None) -> Responses:
    """Responses of a route that answers text or nothing."""
    content = {media_type: {"schema": {"type": "string"}}} if media_type else {}
    return {200: {"description": about, "content": content}, **errors(*statuses)}


def takes(body: type[BaseModel], **headers: str) -> dict[str, Any]:
    """The body and the headers that a route reads."""
    return {
        "requestBody": {"required": True, "content": {"application/json": _content(body)}},
        "parameters": [
            {
                "name": name.replace("_", "-"), "in": "header", "schema": {"type": "string"},
                "description": about,
            }
            for name, about in headers.items()
        ],
    }  # fmt: skip


def takes_generation(body: type[BaseModel]) -> dict[str, Any]:
    """The same for a route that generates."""
    mode, name = "As reasoning_mode.", "What the response and the log call the request."
    return takes(body, X_Reasoning_Mode=mode, X_Request_Id=name)


GENERATION_ERRORS = (400, 401, 404, 413, 415, 429, 500, 503)
_BODIES = (ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest)
_ANSWERS = (
    ChatCompletion, ChatCompletionChunk, Completion, Model, ModelList, Version, Tokens, Text,
    ReasoningInfo, ErrorResponse, ResponseObject, ResponseEvent,
)  # fmt: skip
_TEXT = {"type": "string", "description": "What was thought in words."}
_IDS = {"type": "array", "items": {"type": "integer"}, "description": "With return_token_ids."}
_INFO = {"$ref": _REF.format(model=ReasoningInfo.__name__)}
_STEPS = {"type": "array", "items": {"type": "object"}, "description": "Steps of thinking."}
_CHOICE = {
    "token_ids": _IDS,
    "reasoning_trace": _STEPS,
    "stop_reason": {"type": ["string", "integer", "null"], "description": "What ended it."},
}
_THOUGHT = {"reasoning": _TEXT, "reasoning_content": _TEXT}
# What answers hold beyond OpenAI's classes: the end of a schema's name -> fields.
_EXTRA: dict[str, dict[str, Any]] = {
    "ChatCompletion": {"reasoning_info": _INFO, "prompt_token_ids": _IDS},
    "ChatCompletionChunk": {"reasoning_info": _INFO},
    "ChatCompletionMessage": _THOUGHT,
    "ChoiceDelta": _THOUGHT,
    "Choice": _CHOICE,
    "Completion": {"reasoning_info": _INFO},
    "CompletionChoice": {**_CHOICE, **_THOUGHT, "prompt_token_ids": _IDS},
    "CompletionUsage": {"reasoning": _INFO},
}


def build(app: FastAPI) -> dict[str, Any]:
    """Build the document once; every $ref in it resolves, and no route answers FastAPI's 422."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes
    )
    _, defined = models_json_schema(
        [
            *((body, "validation") for body in _BODIES),
            *((answer, "serialization") for answer in _ANSWERS),
        ],
        ref_template=_REF,
    )
    document["components"] = {
        "schemas": defined["$defs"],
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    document["security"] = [{}, {"key": []}]  # a key only with --api-key
    for name, schema in defined["$defs"].items():
        schema.get("properties", {}).update(_EXTRA.get(name.rpartition("__")[2], {}))
    for route in document["paths"].values():
        for operation in route.values():
            operation["responses"].pop("422", None)
    app.openapi_schema = document
    return document

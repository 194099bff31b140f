"""Everything but generation: models, health, readiness, version, metrics, tokens."""

import asyncio
import functools
from typing import Annotated, Any

from fastapi import APIRouter, Path
from openai.types import Model
from prometheus_client import exposition
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import coconut_serve
from coconut_serve.errors import EngineDeadError, InvalidRequestError, NotFoundError, NotReadyError
from coconut_serve.reasoning.registry import NO_THINKING, mode_names
from coconut_serve.server.chat import clean_message
from coconut_serve.server.openapi import ModelList, Text, Tokens, Version, answers, plain, takes
from coconut_serve.server.parse import check_model, read_body, split_model
from coconut_serve.server.schemas import DetokenizeRequest, TokenizeRequest
from coconut_serve.server.state import get_service, ignored_header
from coconut_serve.server.usage import token_text
from coconut_serve.service.presets import EFFORTS, NO_EFFORT
from coconut_serve.service.service import Service
from coconut_serve.service.tokenizer import Tokenizer, require_tokenizer

router = APIRouter()
_NAME = Path(description="The served name, alone or with a mode: NAME:latent.")
_TEXT_ERRORS = (400, 401, 404, 413, 415, 503)


@router.get("/health", responses=plain("It works or loads.", 503), response_class=Response)
async def health(request: Request) -> Response:
    """200 while the process can work or is loading; 503 once the engine is dead."""
    service: Service | None = getattr(request.app.state, "service", None)
    if service is not None:
        await service.engine.check_health()
    return Response(status_code=200)


@router.get("/ready", responses=plain("It takes work.", 503), response_class=Response)
async def ready(request: Request) -> Response:
    """200 while new work is taken; 503 when loading, draining, full or dead."""
    service = get_service(request)
    await service.engine.check_health()
    admission = service.admission
    if admission.is_draining:
        raise NotReadyError("the server is shutting down", retry_after_seconds=5)
    if not admission.has_room:
        retry_after = admission.retry_after_seconds()
        raise NotReadyError("the queue is full", retry_after_seconds=retry_after)
    return Response(status_code=200)


@router.get("/version", responses=answers(Version, 401, 503))
async def version(request: Request) -> Response:
    """What runs here and within which limits."""
    service = get_service(request)
    info, config = service.engine.info, service.config
    return JSONResponse(
        {
            "version": coconut_serve.__version__,
            "commit": config.commit,
            "engine": info.engine,
            "device": info.device,
            "dtype": info.dtype,
            "modes": list(service.model.modes),
            "limits": {
                "max_model_len": info.max_model_len,
                "max_num_seqs": config.max_num_seqs,
                "max_queue": config.max_queue,
                "max_n": config.max_n,
                "max_body_bytes": config.max_body_bytes,
                "kv_cache_positions": info.kv_cache_positions,
            },
        }
    )


@router.get("/v1/models", responses=answers(ModelList, 401, 503))
async def list_models(request: Request) -> Response:
    """The served model and one entry for each of its modes."""
    service = get_service(request)
    name = service.config.served_model_name
    names = [name, *(f"{name}:{mode}" for mode in service.model.modes)]
    data = [_model(service, each).model_dump() for each in names]
    return JSONResponse({"object": "list", "data": data})


@router.get("/v1/models/{name:path}", responses=answers(Model, 401, 404, 503))
async def retrieve_model(name: Annotated[str, _NAME], request: Request) -> Response:
    """One model, with its modes, defaults and manifest."""
    service = get_service(request)
    check_model(name, service.config)
    _, mode = split_model(name, service.config)
    if mode is not None and mode not in service.model.modes:
        raise NotFoundError(
            f"the model does not support {mode!r}", param="model", code="model_not_found"
        )
    return JSONResponse(_model(service, name).model_dump())


def _model(service: Service, name: str) -> Model:
    _, mode = split_model(name, service.config)
    manifest = service.manifest
    extra: dict[str, Any] = {
        "root": service.config.served_model_name,
        "max_model_len": service.engine.info.max_model_len,
        "reasoning_mode": mode or service.model.default_mode,
        "reasoning_modes": list(service.model.modes),
        "unsupported_modes": [m for m in mode_names() if m not in service.model.modes],
        "unsupported_features": list(service.engine.info.unsupported_features),
        "reasoning_effort": {NO_EFFORT: f"mode {NO_THINKING}", **EFFORTS},
        "example": manifest.prompt.example if manifest else None,
        "sampling_defaults": {  # of requests that set none
            name: {"value": value, "source": "generation_config"}
            for name, value in service.prompts.sampling_defaults.items()
        },
        "manifest": manifest.model_dump(by_alias=True) if manifest else None,
    }
    return Model(
        id=name, created=service.created, object="model", owned_by="coconut-serve", **extra
    )


@router.get(
    "/metrics",
    responses=plain("Prometheus text format.", 401, 503, media_type="text/plain"),
    response_class=Response,
)
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    collected = getattr(request.app.state, "metrics", None)
    if collected is None:
        raise NotReadyError("the model is loading", retry_after_seconds=2)
    service: Service | None = getattr(request.app.state, "service", None)
    if service is not None:
        await _refresh(service)
    encode, content_type = exposition.choose_encoder(request.headers.get("accept", ""))
    return Response(encode(collected.registry), headers={"Content-Type": content_type})


async def _refresh(service: Service) -> None:
    """Set the gauges that nothing else updates."""
    m = service.metrics
    try:
        await service.engine.check_health()
        is_up = 1
    except EngineDeadError:
        is_up = 0
    is_ready = is_up and not service.admission.is_draining and service.admission.has_room
    m.set(m.engine_up, is_up)
    m.set(m.ready, int(is_ready))
    m.observe_restarts(service.engine.num_restarts)


@router.post(
    "/tokenize", openapi_extra=takes(TokenizeRequest), responses=answers(Tokens, *_TEXT_ERRORS)
)
async def tokenize(request: Request) -> Response:
    """Text or messages to token ids."""
    service = get_service(request)
    body, ignored = await read_body(request, TokenizeRequest, service.config)
    tokenizer = require_tokenizer(service.tokenizer)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give either prompt or messages", param="prompt")
    # Off the event loop: a long text must not block other streams.
    if body.messages is not None:
        messages = [clean_message(m, i) for i, m in enumerate(body.messages)]
        render = functools.partial(
            service.prompts.tokenise_chat,
            options=body.template_options(),
            add_special_tokens=body.add_special_tokens,
        )
        ids = list(await asyncio.to_thread(render, messages))
    else:
        special = body.add_special_tokens is not False
        ids = await asyncio.to_thread(
            tokenizer.encode, body.prompt or "", add_special_tokens=special
        )
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": service.engine.info.max_model_len,
        "tokens": ids,
    }
    if body.return_token_strs:
        answer["token_strs"] = await asyncio.to_thread(_name_all, ids, tokenizer)
    return JSONResponse(answer, headers=ignored_header(service, ignored))


def _name_all(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    names = {token_id: token_text(token_id, tokenizer) for token_id in set(ids)}
    return [names[token_id] for token_id in ids]


@router.post(
    "/detokenize", openapi_extra=takes(DetokenizeRequest), responses=answers(Text, *_TEXT_ERRORS)
)
async def detokenize(request: Request) -> Response:
    """Token ids to text."""
    service = get_service(request)
    body, ignored = await read_body(request, DetokenizeRequest, service.config)
    size = service.engine.info.vocab_size
    if any(i >= size for i in body.tokens):
        raise InvalidRequestError(f"tokens: ids must be below {size}", param="tokens")
    tokenizer = require_tokenizer(service.tokenizer)
    text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
    return JSONResponse({"prompt": text}, headers=ignored_header(service, ignored))

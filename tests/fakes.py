"""Builders with every argument defaulted, tiny seeded models, servers on a free port."""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from coconut_serve.checkpoint.manifest import Manifest, load_manifest
from coconut_serve.config import EngineConfig, ServeConfig, StubConfig
from coconut_serve.engines.base import Engine
from coconut_serve.engines.stub import StubEngine
from coconut_serve.metrics import Metrics
from coconut_serve.params import Phase, ReasoningParams, SamplingParams
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.server.app import create_app
from coconut_serve.service.service import Service
from coconut_serve.service.tokenizer import ByteTokenizer, Tokenizer
from coconut_serve.types import Request, RequestOutput, StepStats

GOLDEN = Path(__file__).parent / "golden" / "coconut_reference"
START, END, LATENT = 125, 126, 127  # of the golden models
DEVICE = os.environ.get("COCONUT_TEST_DEVICE", "cpu")  # where native engines of tests run
# One step of the tiny models, from the same inputs, in float32: a chain of some 20 sums of at most
# 128 terms, each right to a few 2^-24 of values below 8, and temperatures down to 0.1 after it.
# Under AVX-512, AVX2 and SSE kernels and one thread or two, 2.5e-6 was the most.
ROUNDING = 2e-5


def make_request(
    request_id: str = "r",
    prompt: tuple[int, ...] = (5, 6, 7, 8, 9),
    mode: str = "none",
    steps: int = 0,
    end: tuple[int, ...] = (),
    max_tokens: int = 8,
    group_id: str | None = None,
    reasoning: dict[str, Any] | None = None,
    thinking: dict[str, Any] | None = None,
    **sampling: Any,
) -> Request:
    sampling = {"temperature": 0.0, "max_tokens": max_tokens, **sampling}
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**sampling),
        thinking=None if thinking is None else SamplingParams(**(sampling | thinking)),
        reasoning=ReasoningParams(
            mode=mode,
            steps=steps,
            end_token_ids=end,
            **({"is_fixed": mode == "latent"} | (reasoning or {})),
        ),
        group_id=group_id,
    )


class Result:
    """All outputs of one request."""

    def __init__(self, outputs: list[RequestOutput]) -> None:
        self.outputs = outputs
        self.token_ids = [
            o.token_id for o in outputs if o.phase is Phase.ANSWER and o.token_id is not None
        ]
        self.thinking_ids = [o.token_id for o in outputs if o.phase is Phase.THINK]
        self.vectors = [o.trace.vector for o in outputs if o.trace is not None and o.trace.vector]
        self.counts = outputs[-1].counts
        self.finish_reason = outputs[-1].finish_reason
        self.stop_reason = outputs[-1].stop_reason


async def run(engine: Engine, request: Request) -> Result:
    outputs: list[RequestOutput] = []
    async with contextlib.aclosing(engine.generate(request)) as stream:
        outputs.extend([output async for output in stream])
    endings = [o for o in outputs if o.finish_reason is not None]
    assert len(endings) == 1, "a request ends exactly once"
    assert outputs[-1] is endings[0], "and nothing follows"
    return Result(outputs)


async def run_all(engine: Engine, requests: list[Request]) -> list[Result]:
    return list(await asyncio.gather(*(run(engine, request) for request in requests)))


def drift(step: int) -> float:
    """How far two right runs may be apart at a thinking step, the first being 0.

    Each feeds what the one before gave, so an error is carried on: a step of a random model makes
    it 1.6 times as large, measured over twelve; it is taken for twice.
    """
    return float(ROUNDING * 2**step)


@contextlib.asynccontextmanager
async def native_engine(
    model: Path,
    on_step: Callable[[StepStats], None] = lambda _: None,
    *,
    has_own_process: bool = False,
    **config: Any,
) -> AsyncIterator[Any]:
    """A started native engine in float32 with small blocks."""
    from coconut_serve.engines.native.engine import NativeEngine

    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": DEVICE,
        "block_size": 4,
        "max_num_seqs": 16,
        "max_model_len": 100,
    }
    engine = NativeEngine(
        EngineConfig(model=model, **(settings | config)),
        mode_names(),
        on_step,
        has_own_process=has_own_process,
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def core_of(engine: Any) -> Any:
    """What works in a native engine that has no process of its own: to look inside."""
    from coconut_serve.engines.native.hosts import ThreadHost

    host = engine._host
    assert isinstance(host, ThreadHost)
    return host.core


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_metrics() -> Metrics:
    return Metrics(CollectorRegistry(), model_name="m", engine="stub", modes=mode_names())


def stub_app(
    *,
    stub: StubConfig | None = None,
    tokenizer: Tokenizer | None = None,
    manifest: Manifest | None = None,
    max_model_len: int = 512,
    vocab_size: int = ByteTokenizer.VOCAB_SIZE,
    sampling_defaults: dict[str, Any] | None = None,
    **config: Any,
) -> FastAPI:
    """An app over the stub engine, loaded when its lifespan starts."""
    metrics = make_metrics()
    serve = ServeConfig(served_model_name="m", **config)
    tokenizer = tokenizer or ByteTokenizer()
    manifest = manifest or Manifest(modes=list(mode_names()), variable_steps=True)

    async def load(metrics: Metrics) -> Service:
        engine = StubEngine(
            stub or StubConfig(),
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=serve.max_num_seqs,
            on_step=metrics.observe_step,
        )
        await engine.start()
        return Service.build(
            serve,
            engine=engine,
            tokenizer=tokenizer,
            manifest=manifest,
            eos_token_ids=(ByteTokenizer.EOS,),
            metrics=metrics,
            sampling_defaults=sampling_defaults or {},
        )

    return create_app(serve, load=load, metrics=metrics)


def native_app(model: Path, *, config: dict[str, Any] | None = None, **engine: Any) -> FastAPI:
    """An app over the native engine and a directory without a tokenizer."""
    from coconut_serve.checkpoint.tokenizer import load_tokenizer, read_eos_token_ids
    from coconut_serve.engines.native.engine import NativeEngine

    metrics = make_metrics()
    settings: dict[str, Any] = {"dtype": "float32", "device": DEVICE, "max_num_seqs": 16}
    settings |= engine
    serve = ServeConfig(
        served_model_name="m", max_num_seqs=settings["max_num_seqs"], **(config or {})
    )

    async def load(metrics: Metrics) -> Service:
        built = NativeEngine(
            EngineConfig(model=model, **settings), mode_names(), metrics.observe_step
        )
        await built.start()
        tokenizer = load_tokenizer(model)
        return Service.build(
            serve,
            engine=built,
            tokenizer=tokenizer,
            manifest=load_manifest(model),
            eos_token_ids=tokenizer.eos_token_ids if tokenizer else read_eos_token_ids(model),
            metrics=metrics,
        )

    return create_app(serve, load=load, metrics=metrics)


@contextlib.asynccontextmanager
async def listening(app: FastAPI) -> AsyncGenerator[str, None]:
    """Run the app under a real uvicorn on a free port; yields its address once it is loaded."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]  # tests own them
    task = asyncio.create_task(server._serve())
    try:
        async with asyncio.timeout(60):
            while not server.started or app.state.service is None:
                assert not task.done(), "the server ended before it was ready"
                await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


def write_golden(name: str, into: Path) -> Path:
    """Build a servable directory of a golden model: links to its files and a manifest."""
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        (into / file).symlink_to(GOLDEN / name / file)
    manifest = {
        "schema": 1,
        "method": "coconut",
        "modes": ["none", "cot", "latent", "distribution"],
        "default_mode": "latent",
        "tokens": {"start": {"id": START}, "end": {"id": END}, "latent": {"id": LATENT}},
        "steps": 3,
        "max_steps": 16,
        "variable_steps": True,
    }
    (into / "latent_config.json").write_text(json.dumps(manifest))
    return into

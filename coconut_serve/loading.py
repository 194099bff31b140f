"""Loads a model and what runs it: the only code that knows which engines exist."""

import asyncio
import functools
import os
import sys
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry

from coconut_serve.checkpoint.files import check_files
from coconut_serve.checkpoint.generation_config import read_sampling_defaults
from coconut_serve.checkpoint.manifest import Manifest, Token, Tokens, load_manifest
from coconut_serve.checkpoint.weights import BUILT_IN_MODELS, resolve_model
from coconut_serve.config import EngineConfig, ServeConfig, Settings, StubConfig
from coconut_serve.engines.base import Engine
from coconut_serve.metrics import Metrics
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.server import logs, observe
from coconut_serve.service.model import choose_modes
from coconut_serve.service.service import Service
from coconut_serve.service.tokenizer import ByteTokenizer, Tokenizer


def serve_config(settings: Settings) -> ServeConfig:
    """Build the HTTP side's settings."""
    model = settings.model
    path = Path(model).expanduser()
    name = path.resolve().name if path.exists() and model not in BUILT_IN_MODELS else model
    return settings.part(
        ServeConfig,
        served_model_name=settings.served_model_name or name,
        commit=os.environ.get("COCONUT_COMMIT") or "unknown",
    )


def make_metrics(settings: Settings, config: ServeConfig) -> Metrics:
    """Make the metrics of one served model, in a registry of their own."""
    return Metrics(
        CollectorRegistry(),
        model_name=config.served_model_name,
        engine=settings.engine,
        modes=mode_names(),
        buckets=settings.custom_histogram_buckets,
    )


def check_engine(settings: Settings) -> None:
    """Check that the engine can run here, before a model is fetched.

    Raises:
        StartupError: Something the engine needs is missing.
    """
    if settings.engine == "native" and settings.device == "cuda":
        from coconut_serve.engines.native.device import resolve_device

        resolve_device("cuda")
    elif settings.engine == "vllm":
        from coconut_serve.engines.vllm.plugin import check_version

        check_version()


def build_engine(
    model: Path | None, settings: Settings, metrics: Metrics, *, has_own_process: bool = True
) -> Engine:
    """Build the chosen engine: the one place that imports engines.

    `has_own_process` is for the native one: whether it runs in a child process, or in a thread.
    """
    match settings.engine:
        case "stub":
            from coconut_serve.engines.stub import StubEngine

            return StubEngine(
                settings.part(StubConfig),
                vocab_size=ByteTokenizer.VOCAB_SIZE,
                max_model_len=settings.max_model_len or 8192,
                max_num_seqs=settings.max_num_seqs,
                on_step=metrics.observe_step,
            )
        case "vllm":
            from coconut_serve.engines.vllm.plugin import check_version

            check_version()  # before importing anything that needs it
            from coconut_serve.engines.vllm.engine import VllmEngine

            metrics.include(REGISTRY, prefix="vllm:")
            config = _engine_config(model, settings)
            return VllmEngine(config, mode_names(), metrics.observe_step, settings.more_flags)
        case _:
            from coconut_serve.engines.native.engine import NativeEngine

            engine = NativeEngine(
                _engine_config(model, settings),
                mode_names(),
                metrics.observe_step,
                has_own_process=has_own_process,
                prepare=functools.partial(logs.prepare, settings.log_format),
            )
            if has_own_process:
                observe.watch_process(metrics, lambda: engine.pid)
            return engine


def _engine_config(model: Path | None, settings: Settings) -> EngineConfig:
    return settings.part(
        EngineConfig,
        model=model,
        enable_prefix_caching=not settings.no_prefix_caching,
        show_progress=_shows_progress(settings),
    )


def _shows_progress(settings: Settings) -> bool:
    return sys.stderr.isatty() and settings.log_format == "text"


def _load_text(directory: Path | None) -> tuple[Tokenizer | None, tuple[int, ...]]:
    """Load the tokenizer, if there is one, and the end-of-sequence ids; None: the stub's."""
    if directory is None:
        return ByteTokenizer(), ByteTokenizer().eos_token_ids
    from coconut_serve.checkpoint.tokenizer import load_tokenizer, read_eos_token_ids

    tokenizer = load_tokenizer(directory)
    return tokenizer, tokenizer.eos_token_ids if tokenizer else read_eos_token_ids(directory)


def stub_manifest() -> Manifest:
    """Describe the stub: every mode, with text thinking between two tokens."""
    bounds = Tokens(
        think_start=Token(id=ByteTokenizer.THINK_START), think_end=Token(id=ByteTokenizer.THINK_END)
    )
    return Manifest(modes=list(mode_names()), variable_steps=True, tokens=bounds)


async def load_service(
    settings: Settings, config: ServeConfig, metrics: Metrics, *, has_own_process: bool = True
) -> Service:
    """Load tokenizer, manifest and engine; `has_own_process` is as for `build_engine`."""
    directory: Path | None = None
    manifest: Manifest | None = stub_manifest()
    own: dict[str, Any] = {}
    if settings.engine != "stub":
        directory = await asyncio.to_thread(
            resolve_model, settings.model, _shows_progress(settings)
        )
        # With --load-format, only vLLM knows which weight files it reads.
        formats = ("--load-format", "--load_format")
        is_own = any(flag.startswith(formats) for flag in settings.more_flags)
        await asyncio.to_thread(check_files, directory, needs_weights=not is_own)
        manifest = load_manifest(directory)
        choose_modes(
            manifest,
            mode_names(),
            allowed_modes=config.allowed_reasoning_modes,
            default_mode=config.default_reasoning_mode,
        )
        if settings.generation_config == "auto":
            own = read_sampling_defaults(directory)
    engine = build_engine(directory, settings, metrics, has_own_process=has_own_process)
    try:
        text = asyncio.to_thread(_load_text, directory)
        if settings.engine == "vllm" or not has_own_process:
            # Both would import the same modules at once.
            tokenizer, eos = await text
            await engine.start()
        else:
            (tokenizer, eos), _ = await asyncio.gather(text, engine.start())
        return Service.build(
            config,
            engine=engine,
            tokenizer=tokenizer,
            manifest=manifest,
            eos_token_ids=eos,
            metrics=metrics,
            sampling_defaults=own,
        )
    except BaseException:
        await engine.stop()
        raise

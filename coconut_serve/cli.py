"""The command line: flags, logging, and the only code that knows which engines exist."""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry

import coconut_serve
from coconut_serve import sources
from coconut_serve.arguments import Parser
from coconut_serve.checkpoint.files import check_files
from coconut_serve.checkpoint.generation_config import read_sampling_defaults
from coconut_serve.checkpoint.manifest import Manifest, Token, Tokens, load_manifest
from coconut_serve.checkpoint.weights import BUILT_IN_MODELS, DEFAULT_MODEL, resolve_model
from coconut_serve.commands import bench, completion, healthcheck, models
from coconut_serve.config import EngineConfig, ServeConfig, Settings, StubConfig
from coconut_serve.convert import command as convert
from coconut_serve.engines.base import Engine
from coconut_serve.errors import CoconutError
from coconut_serve.evaluation import command as evaluation
from coconut_serve.metrics import Metrics
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.server import logs, observe
from coconut_serve.server.app import create_app
from coconut_serve.server.draining import DrainingServer
from coconut_serve.server.listen import listen_for
from coconut_serve.service.model import choose_modes
from coconut_serve.service.service import Service
from coconut_serve.service.tokenizer import ByteTokenizer, Tokenizer
from coconut_serve.training import command as train

_COMMANDS: dict[str, Any] = {  # modules with add_parser and run
    "bench": bench,
    "convert": convert,
    "eval": evaluation,
    "healthcheck": healthcheck,
    "models": models,
    "train": train,
}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = Parser(prog="coconut-serve", description=coconut_serve.__doc__)
    parser.add_argument("--version", action="version", version=coconut_serve.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        usage="%(prog)s [-h] [flags] [MODEL] [-- flags of vLLM]",
        epilog="Each flag may also come from the environment (COCONUT_MAX_QUEUE=8) or from the "
        "file given by --config (max_queue: 8); the command line wins, then the environment.",
    )
    names = ", ".join(BUILT_IN_MODELS)
    about = f"directory, hub name or built-in ({names}); default: {DEFAULT_MODEL}"
    serve.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=about)
    serve.add_argument("--config", metavar="FILE", help="YAML file with flags as keys")
    sources.add_flags(serve, Settings)
    for command in (*_COMMANDS.values(), completion):
        command.add_parser(commands)
    return parser


def parse_args(argv: Sequence[str] | None, environ: Mapping[str, str]) -> argparse.Namespace:
    """Parse the command line, layered over environment, config file and defaults.

    Raises:
        StartupError: The file is unreadable or names an unknown flag.
    """
    parser = build_parser()
    words = list(argv if argv is not None else sys.argv[1:])
    at = words.index("--") if "--" in words else len(words)
    words, more_flags = words[:at], words[at + 1 :]
    args = parser.parse_args(words)
    if args.command == "serve":
        given = sources.read(args, environ, Settings)
        args = parser.parse_args([words[0], *given, *words[1:]])
    args.more_flags = more_flags
    return args


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


def build_engine(model: Path | None, settings: Settings, metrics: Metrics) -> Engine:
    """Build the chosen engine: the one place that imports engines."""
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
                has_own_process=True,
                prepare=functools.partial(logs.prepare, settings.log_format),
            )
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


def _load_text(directory: Path) -> tuple[Tokenizer | None, tuple[int, ...]]:
    """Load the directory's tokenizer, if it has one, and its end-of-sequence ids."""
    from coconut_serve.checkpoint.tokenizer import load_tokenizer, read_eos_token_ids

    tokenizer = load_tokenizer(directory)
    return tokenizer, tokenizer.eos_token_ids if tokenizer else read_eos_token_ids(directory)


def stub_manifest() -> Manifest:
    """Describe the stub: every mode, with text thinking between two tokens."""
    bounds = Tokens(
        think_start=Token(id=ByteTokenizer.THINK_START), think_end=Token(id=ByteTokenizer.THINK_END)
    )
    return Manifest(modes=list(mode_names()), variable_steps=True, tokens=bounds)


async def load_service(settings: Settings, config: ServeConfig, metrics: Metrics) -> Service:
    """Load tokenizer, manifest and engine."""
    tokenizer: Tokenizer | None = None
    own: dict[str, Any] = {}
    if settings.engine == "stub":
        tokenizer = ByteTokenizer()
        eos = tokenizer.eos_token_ids
        manifest: Manifest | None = stub_manifest()
        engine = build_engine(None, settings, metrics)
        await engine.start()
    else:
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
        engine = build_engine(directory, settings, metrics)
        text = asyncio.to_thread(_load_text, directory)
        if settings.engine == "vllm":  # both would import the same modules at once
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


def run_serve(args: argparse.Namespace) -> int:
    """Serve until stopped and return the exit status."""
    settings = Settings.model_validate(args)
    config = serve_config(settings)
    check_engine(settings)
    metrics = Metrics(
        CollectorRegistry(),
        model_name=config.served_model_name,
        engine=settings.engine,
        modes=mode_names(),
        buckets=settings.custom_histogram_buckets,
    )
    tracer = observe.prepare(config, metrics)

    async def load(metrics: Metrics) -> Service:
        service = await load_service(settings, config, metrics)
        return dataclasses.replace(service, tracer=tracer)

    app = create_app(config, load=load, metrics=metrics)
    observe.attach(app, config)
    server = DrainingServer(config, app)
    listener = listen_for(config)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if config.uds is not None:
        Path(config.uds).unlink(missing_ok=True)
    tracer.stop()
    if server.failure is not None:
        raise server.failure
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a command; errors that users can fix print one line, not a traceback."""
    logs.prepare()
    try:
        args = parse_args(argv, os.environ)
        if args.command == "serve":
            return run_serve(args)
        if args.command in _COMMANDS:
            return int(_COMMANDS[args.command].run(args))
        parser = build_parser()
        is_completion = args.command == "completion"
        print(completion.script(parser, args.shell) if is_completion else parser.format_help())
        return 0
    except CoconutError as error:
        print(f"coconut-serve: {error.message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""The command line: flags, logging, and the server's life."""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import coconut_serve
from coconut_serve import sources
from coconut_serve.arguments import Parser
from coconut_serve.checkpoint.weights import BUILT_IN_MODELS, DEFAULT_MODEL
from coconut_serve.commands import (
    bench,
    chat,
    collect_env,
    completion,
    healthcheck,
    models,
    run_batch,
)
from coconut_serve.config import Settings
from coconut_serve.convert import command as convert
from coconut_serve.errors import CoconutError
from coconut_serve.evaluation import command as evaluation
from coconut_serve.loading import check_engine, load_service, make_metrics, serve_config
from coconut_serve.metrics import Metrics
from coconut_serve.server import logs, observe
from coconut_serve.server.app import create_app
from coconut_serve.server.draining import DrainingServer
from coconut_serve.server.listen import listen_for
from coconut_serve.service.service import Service
from coconut_serve.training import command as train

_COMMANDS: dict[str, Any] = {  # modules with add_parser and run
    "bench": bench,
    "chat": chat,
    "collect-env": collect_env,
    "convert": convert,
    "eval": evaluation,
    "healthcheck": healthcheck,
    "models": models,
    "run-batch": run_batch,
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


def run_serve(args: argparse.Namespace) -> int:
    """Serve until stopped and return the exit status."""
    settings = Settings.model_validate(args)
    config = serve_config(settings)
    check_engine(settings)
    metrics = make_metrics(settings, config)
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

"""`coconut-serve models`: lists what can be served offline."""

import argparse
from typing import Any

from coconut_serve.checkpoint.manifest import load_manifest
from coconut_serve.checkpoint.weights import BUILT_IN_MODELS, DEFAULT_MODEL, resolve_model
from coconut_serve.service.model import declared_modes


def add_parser(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    commands.add_parser("models", help="list what can be served offline here")


def run(args: argparse.Namespace) -> int:
    """List built-in models and return the exit status."""
    del args
    for name, text in BUILT_IN_MODELS.items():
        mark = " (default)" if name == DEFAULT_MODEL else ""
        # The others have no manifest.
        manifest = load_manifest(resolve_model(name)) if name == "demo" else None
        print(f"{name:10}{text}{mark}\n{'':10}modes: {', '.join(declared_modes(manifest))}")
    print("DIRECTORY any Hugging Face directory; modes from its latent_config.json")
    return 0

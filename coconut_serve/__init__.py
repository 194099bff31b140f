"""Serve latent reasoning: an OpenAI-compatible server whose clients pick how the model thinks."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """LLM, AsyncLLM and SamplingParams, imported when they are first used: __init__.pyi."""
    if name not in ("LLM", "AsyncLLM", "SamplingParams"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("coconut_serve.llm"), name)

"""OpenAI's clients, whose calls take `reasoning_mode` and `reasoning`: docs/client.md.

Of other packages this needs openai alone.
"""

from coconut_serve.client.answers import (
    ReasoningInfo,
    TopToken,
    TraceStep,
    reasoning_info,
    reasoning_trace,
)
from coconut_serve.client.clients import AsyncOpenAI, OpenAI
from coconut_serve.client.settings import Reasoning, ReasoningMode

__all__ = [
    "AsyncOpenAI",
    "OpenAI",
    "Reasoning",
    "ReasoningInfo",
    "ReasoningMode",
    "TopToken",
    "TraceStep",
    "reasoning_info",
    "reasoning_trace",
]

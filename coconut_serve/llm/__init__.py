"""The engines without HTTP, in the shape of vLLM's offline classes: docs/python.md."""

from coconut_serve.llm.calls import SamplingParams
from coconut_serve.llm.models import LLM, AsyncLLM
from coconut_serve.llm.outputs import CompletionOutput, RequestOutput, TraceStep

__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "RequestOutput", "SamplingParams", "TraceStep"]

from coconut_serve.llm import LLM as LLM
from coconut_serve.llm import AsyncLLM as AsyncLLM
from coconut_serve.llm import SamplingParams as SamplingParams

__version__: str

"""The composition root: a loaded model and everything that serves it."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from coconut_serve.checkpoint.manifest import Manifest
from coconut_serve.config import ServeConfig
from coconut_serve.engines.base import Engine
from coconut_serve.errors import StartupError
from coconut_serve.metrics import Metrics
from coconut_serve.service.admission import Admission
from coconut_serve.service.ask import GenerateCall
from coconut_serve.service.generation import Generation
from coconut_serve.service.model import ModelReasoning
from coconut_serve.service.prompt import PromptBuilder
from coconut_serve.service.tokenizer import Tokenizer
from coconut_serve.service.tracing import NoTracer, Tracer

_MAX_INLINE_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A loaded model and everything that serves it."""

    config: ServeConfig
    engine: Engine
    tokenizer: Tokenizer | None
    manifest: Manifest | None
    model: ModelReasoning
    prompts: PromptBuilder
    admission: Admission
    metrics: Metrics
    tracer: Tracer = field(default_factory=NoTracer)
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def build(
        cls,
        config: ServeConfig,
        *,
        engine: Engine,
        tokenizer: Tokenizer | None,
        manifest: Manifest | None,
        eos_token_ids: tuple[int, ...],
        metrics: Metrics,
        sampling_defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> "Service":
        """Put the parts together; the engine has started.

        `sampling_defaults` are the model's own, by the names of SamplingParams.

        Raises:
            StartupError: The manifest names token ids that the model does not have.
        """
        size = engine.info.vocab_size
        if any(token_id >= size for token_id in (manifest or Manifest()).token_ids):
            raise StartupError(f"latent_config.json names token ids of {size} and above")
        model = ModelReasoning.read(
            manifest,
            tokenizer,
            engine_modes=engine.info.modes,
            allowed_modes=config.allowed_reasoning_modes,
            default_mode=config.default_reasoning_mode,
            max_model_len=engine.info.max_model_len,
            adapters=engine.info.adapters,
            eos_token_ids=tuple(i for i in eos_token_ids if i < size),
        )
        admission = Admission(
            max_running=config.max_num_seqs,
            max_queue=config.max_queue,
            step_seconds=lambda: metrics.mean_step_seconds,
        )
        prompts = PromptBuilder(
            tokenizer=tokenizer,
            model=model,
            info=engine.info,
            max_n=config.max_n,
            trace_bounds=(config.min_trace, config.max_trace),
            check_size=admission.check_size,
            sampling_defaults=sampling_defaults,
        )
        return cls(
            config=config,
            engine=engine,
            tokenizer=tokenizer,
            manifest=manifest,
            model=model,
            prompts=prompts,
            admission=admission,
            metrics=metrics,
        )

    async def generate(self, ask: GenerateCall) -> Generation:
        """Check a request, take its places and return its (not yet started) generation.

        Raises:
            CoconutError: It cannot be served, or not now.
        """
        await self.engine.check_health()
        # Long texts are tokenised off the event loop: other streams must not wait for them.
        if ask.num_characters > _MAX_INLINE_CHARACTERS:
            prepared = await asyncio.to_thread(self.prompts.prepare, ask)
        else:
            prepared = self.prompts.prepare(ask)
        return Generation(
            prepared,
            engine=self.engine,
            tokenizer=self.tokenizer,
            admission=self.admission,
            metrics=self.metrics,
            span=self.tracer.start(prepared),
        )

    @property
    def fingerprint(self) -> str:
        """system_fingerprint: what produced an answer."""
        return self.engine.info.system_fingerprint

"""Real vLLM engines on the CPU, shared between tests: each start takes many seconds."""

import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from coconut_serve.config import EngineConfig
from coconut_serve.engines.base import Engine
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.types import StepStats

_MAX_LIVE = 2


class Engines:
    """Starts engines on demand and keeps a few."""

    def __init__(self) -> None:
        self._live: dict[str, Any] = {}
        self._listeners: dict[str, Callable[[StepStats], None]] = {}

    @contextlib.asynccontextmanager
    async def open(
        self,
        model: Path,
        on_step: Callable[[StepStats], None] = lambda _: None,
        *flags: str,
        kernels: str = "torch",
        **settings: Any,
    ) -> AsyncIterator[Any]:
        """An engine with these settings, new or used before.

        `kernels` is "torch" for the stand-ins of tests/vllm_cpu, "triton" for the interpreter.
        """
        from coconut_serve.engines.vllm.engine import VllmEngine

        key = json.dumps([str(model), flags, kernels, settings], sort_keys=True)
        self._listeners[key] = on_step
        engine = self._live.pop(key, None)
        if engine is None or engine._death is not None:
            while len(self._live) >= _MAX_LIVE:
                await self._live.pop(next(iter(self._live))).stop()
            own: dict[str, Any] = {
                "dtype": "float32",
                "block_size": 32,
                "max_num_seqs": 16,
                "max_model_len": 96,
                "kv_cache_memory": "64MiB",
            }
            engine = VllmEngine(
                EngineConfig(model=model, **(own | settings)),
                mode_names(),
                lambda stats: self._listeners[key](stats),
                ("--enforce-eager", *flags),
            )
            os.environ["COCONUT_TEST_KERNELS"] = kernels
            await engine.start()
        self._live[key] = engine
        yield engine

    async def close(self) -> None:
        for engine in self._live.values():
            await engine.stop()
        self._live.clear()


class Borrowed:
    """A shared engine that its user cannot stop."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def start(self) -> None:
        """It has started."""

    async def stop(self) -> None:
        """It goes on."""


def widen_heads(source: Path, target: Path) -> Path:
    """Write the same function with attention heads twice as wide.

    vLLM's CPU attention takes no heads of 16. Zeros fill the new components; rotary pairs (i, i +
    d/2) move to (2i, 2i + d), where the frequencies of a head of 2d are those of i in a head of d.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_text())
    old = config["head_dim"]
    dims = torch.arange(old)
    places = torch.where(dims < old // 2, 2 * dims, old + 2 * (dims - old // 2))
    weights = load_file(source / "model.safetensors")
    has_norm = any("q_norm" in name for name in weights)
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            wide = weight.new_zeros(weight.shape[0] // old, 2 * old, weight.shape[1])
            wide[:, places] = weight.view(-1, old, weight.shape[1])
            # Scores are divided by the root of the head size; a norm makes up for that by itself.
            scale = 2**0.5 if "q_proj" in name and not has_norm else 1.0
            weights[name] = (wide * scale).reshape(-1, weight.shape[1]).contiguous()
        elif name.endswith("o_proj.weight"):
            wide = weight.new_zeros(weight.shape[0], weight.shape[1] // old, 2 * old)
            wide[:, :, places] = weight.view(weight.shape[0], -1, old)
            weights[name] = wide.reshape(weight.shape[0], -1).contiguous()
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            wide = weight.new_zeros(2 * old)
            wide[places] = weight * (1.0 if "q_norm" in name else 2**-0.5)
            weights[name] = wide
    config["head_dim"] = 2 * old
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config))
    for file in ("generation_config.json", "latent_config.json"):
        if (source / file).exists():
            (target / file).write_text((source / file).read_text())
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


EngineOpener = Callable[..., contextlib.AbstractAsyncContextManager[Engine]]

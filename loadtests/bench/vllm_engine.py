"""Measure vLLM with our hooks beside stock vLLM, on one model, in one run.

Both engines are up at once and take turns, so that a busy machine slows both; ratios are medians
over repetitions, those of tokens a second from the time of a whole batch, those of a step from the
median step of a batch. The last line of stdout is one JSON object. On a machine without a GPU give
--cpu: vLLM's GPU code then runs with the stand-in kernels of tests/vllm_cpu, for both sides.

    python -m loadtests.bench.vllm_engine [--cpu] [--eager] [--batch-sizes 1,8,16] [--repeats 15]
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

from coconut_serve.params import MixtureParams, ReasoningParams, SamplingParams
from coconut_serve.types import Request
from loadtests.bench.samples import Sample, ratio
from tests import vllm_cpu

KINDS = ("stock", "none", "cot", "latent", "distribution")


def prepare(*, is_cpu: bool) -> None:
    """Set what must be set before vLLM is imported."""
    os.environ.update(VLLM_USE_V2_MODEL_RUNNER="1", VLLM_NO_USAGE_STATS="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if is_cpu:
        vllm_cpu.prepare()
        os.environ["COCONUT_TEST_KERNELS"] = "torch"


def request(kind: str, prompt: tuple[int, ...], positions: int) -> Request:
    """A request of ours that takes `positions` steps in one mode."""
    reasoning = ReasoningParams()
    num_tokens = positions
    if kind in ("cot", "latent", "distribution"):
        reasoning = ReasoningParams(
            mode=kind,
            steps=positions - 1,
            is_fixed=kind == "latent",
            mixture=MixtureParams(top_k=10),
        )
        num_tokens = 1
    return Request(
        request_id=kind,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0),
        reasoning=reasoning,
    )


class Bench:
    """A stock vLLM and one with our hooks, over the same weights."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    async def start(self) -> None:
        """Start both; the stock one first, while nothing asks for the hooks."""
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from coconut_serve.checkpoint.weights import resolve_model
        from coconut_serve.config import EngineConfig
        from coconut_serve.engines.vllm.engine import VllmEngine
        from coconut_serve.reasoning.registry import mode_names

        args = self.args
        model = await asyncio.to_thread(resolve_model, args.model)
        shared: dict[str, Any] = {
            "max_model_len": args.prompt + args.positions + 16,
            "max_num_seqs": max(args.batch_sizes),
            "dtype": args.dtype,
            "enable_prefix_caching": False,
            "block_size": 32 if args.cpu else None,
        }
        memory = {"kv_cache_memory_bytes": args.kv_cache_bytes}
        eager = {"enforce_eager": True} if args.eager else {}
        stock = AsyncEngineArgs(
            model=str(model), skip_tokenizer_init=True,
            **{k: v for k, v in (shared | memory | eager).items() if v is not None},
        )  # fmt: skip
        self.stock = await asyncio.to_thread(AsyncLLM.from_engine_args, stock)
        self.vocab_size = self.stock.vllm_config.model_config.get_vocab_size()
        config = EngineConfig(model=model, kv_cache_memory=str(args.kv_cache_bytes), **shared)
        flags = ("--enforce-eager",) if args.eager else ()
        self.hooked = VllmEngine(config, mode_names(), lambda _: None, flags)
        await self.hooked.start()

    async def stop(self) -> None:
        """Shut both down."""
        await self.hooked.stop()
        await asyncio.to_thread(self.stock.shutdown)

    def prompts(self, batch_size: int) -> list[tuple[int, ...]]:
        """Prompts of equal length that differ."""
        length = self.args.prompt
        return [
            tuple(100 + (i * 7919 + j * 104729) % (self.vocab_size - 100) for j in range(length))
            for i in range(batch_size)
        ]

    def _stream(self, kind: str, prompt: tuple[int, ...], index: int) -> AsyncIterator[Any]:
        if kind != "stock":
            stream: AsyncIterator[Any] = self.hooked.generate(
                request(kind, prompt, self.args.positions)
            )
            return stream
        from vllm import SamplingParams as VllmSamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = VllmSamplingParams(
            max_tokens=self.args.positions,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        found: AsyncIterator[Any] = self.stock.generate(
            {"prompt_token_ids": list(prompt)}, params, f"stock-{index}"
        )
        return found

    async def measure(self, kind: str, batch_size: int) -> Sample:
        """Time one batch; from the first result of all on, so that prefill is left out."""

        async def one(index: int, prompt: tuple[int, ...]) -> list[float]:
            return [time.perf_counter() async for _ in self._stream(kind, prompt, index)]

        rows = await asyncio.gather(*(one(i, p) for i, p in enumerate(self.prompts(batch_size))))
        started = max(times[0] for times in rows)
        times = [t for t in rows[-1] if t >= started]
        steps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return Sample(time.perf_counter() - started, statistics.median(steps))

    async def run(self) -> dict[str, object]:
        """Measure everything and build the report."""
        import torch
        from tqdm import tqdm

        from coconut_serve.engines.vllm.plugin import vllm_version

        await self.start()
        args, results = self.args, {}
        with tqdm(total=len(args.batch_sizes) * (args.repeats + 1) * len(KINDS)) as bar:
            for size in args.batch_sizes:
                samples: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
                for repeat in range(args.repeats + 1):  # the first is warm-up
                    # Each time in another order: what a machine does to the first, it does to all.
                    for kind in KINDS[repeat % len(KINDS) :] + KINDS[: repeat % len(KINDS)]:
                        sample = await self.measure(kind, size)
                        bar.update()
                        if repeat:
                            samples[kind].append(sample)
                results[str(size)] = self.summary(size, samples)
        await self.stop()
        is_cuda = torch.cuda.is_available()
        return {
            "bench": "vllm",
            "model": args.model,
            "dtype": args.dtype,
            "device": torch.cuda.get_device_name() if is_cuda else "cpu",
            "kernels": "torch stand-ins on the CPU" if args.cpu else "vLLM's own",
            "eager": args.eager,
            "machine": platform.machine(),
            "num_cpus": os.cpu_count(),
            "torch": torch.__version__,
            "vllm": vllm_version(),
            "prompt_tokens": args.prompt,
            "positions": args.positions,
            "repeats": args.repeats,
            "batch": results,
        }

    def summary(self, size: int, samples: dict[str, list[Sample]]) -> dict[str, object]:
        """Medians and ratios of one batch size."""
        seconds = {kind: [s.seconds for s in runs] for kind, runs in samples.items()}
        steps = {kind: [s.step_seconds for s in runs] for kind, runs in samples.items()}
        report: dict[str, object] = {
            f"{kind}_step_ms": round(statistics.median(values) * 1e3, 3)
            for kind, values in steps.items()
        }
        report["stock_tokens_per_second"] = round(
            size * (self.args.positions - 1) / statistics.median(seconds["stock"]), 1
        )
        report["hooks_over_stock_none"] = ratio(seconds["stock"], seconds["none"])
        report["hooks_over_stock_cot"] = ratio(seconds["stock"], seconds["cot"])
        report["latent_step_over_cot"] = ratio(steps["latent"], steps["cot"])
        report["distribution_step_over_cot"] = ratio(steps["distribution"], steps["cot"])
        return report


def main() -> None:
    """Parse flags, run, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cpu", action="store_true", help="run vLLM's GPU code on this CPU")
    parser.add_argument("--eager", action="store_true", help="no compilation, no CUDA graphs")
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens")
    parser.add_argument("--positions", type=int, default=32, help="positions after the prompt")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--kv-cache-bytes", type=int, default=1 << 30)
    parser.add_argument(
        "--batch-sizes", type=lambda text: [int(x) for x in text.split(",")], default=[1, 8, 16]
    )
    args = parser.parse_args()
    prepare(is_cpu=args.cpu)
    report = asyncio.run(Bench(args).run())
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""Measure the native engine beside transformers' generate, on one model, in one run.

Every figure of a repetition is taken one after another, so that a busy machine slows all of them;
ratios are medians over repetitions. The last line of stdout is one JSON object.

    python -m loadtests.bench.engine [--model smollm2] [--batch-sizes 1,8,16] [--repeats 5]
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from coconut_serve.checkpoint.weights import resolve_model
from coconut_serve.config import EngineConfig
from coconut_serve.engines.native.device import default_num_threads, resolve_device, resolve_dtype
from coconut_serve.engines.native.engine import NativeEngine
from coconut_serve.params import MixtureParams, ReasoningParams, SamplingParams, SwitchParams
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.types import Request, StepStats
from loadtests.bench.samples import Sample, ratio

MODES = ("cot", "latent", "distribution", "mixed")


def reasoning(mode: str, index: int, positions: int) -> ReasoningParams:
    """Think for all positions but the last, so that a run is pure in its mode.

    "mixed" gives each row of a batch another method.
    """
    steps = positions - 1
    if mode == "mixed":
        return _methods(steps)[index % len(_methods(steps))]
    if mode == "cot":
        return ReasoningParams(mode="none")
    return ReasoningParams(mode=mode, steps=steps, mixture=MixtureParams(top_k=10))


def _methods(steps: int) -> list[ReasoningParams]:
    """Every method that needs no trained weights, once."""
    free = {"temperature": 1.0, "top_p": 1.0, "filter_top_k": 0, "min_p": 0.0}

    def soft(**mixture: Any) -> ReasoningParams:
        return ReasoningParams(
            mode="distribution", steps=steps, mixture=MixtureParams(**(free | mixture))
        )

    return [
        ReasoningParams(mode="none"),
        ReasoningParams(mode="latent", steps=steps),
        soft(top_k=10),
        ReasoningParams(mode="cot", steps=steps),
        soft(kind="moi", top_k=20),
        ReasoningParams(mode="latent", steps=steps, noise_std=0.1),
        soft(top_k=15, noise="gumbel"),
        ReasoningParams(mode="auto", steps=steps),
        soft(kind="multiplex", top_k=3),
        ReasoningParams(mode="latent", steps=steps, adapter="realign"),
        soft(kind="full"),
        ReasoningParams(
            mode="auto", steps=steps, switch=SwitchParams(rule="confidence"),
            mixture=MixtureParams(top_k=10),
        ),
    ]  # fmt: skip


class Bench:
    """A loaded engine and a loaded transformers model over the same weights."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = resolve_device(args.device)
        self.dtype = resolve_dtype(args.dtype, self.device)
        # The same number of threads for both; more is not faster for either where cores are shared.
        torch.set_num_threads(default_num_threads())
        directory = resolve_model(args.model)
        self.plain = AutoModelForCausalLM.from_pretrained(directory, dtype=self.dtype)
        self.plain = self.plain.to(self.device).eval()
        self.steps: list[StepStats] = []
        config = EngineConfig(
            model=directory,
            dtype=str(self.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # a torch name
            device=args.device,
            max_model_len=args.prompt + args.positions + 16,
            max_num_seqs=max(args.batch_sizes),
            max_num_batched_tokens=max(args.batch_sizes) * args.prompt,
            enable_prefix_caching=False,
        )
        self.engine = NativeEngine(config, mode_names(), self.steps.append)

    def prompts(self, batch_size: int) -> list[tuple[int, ...]]:
        """Random prompts of equal length: a static batch then has no padding to lose time on."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, self.args.prompt)
        ids = torch.randint(100, self.plain.config.vocab_size, shape, generator=generator)
        return [tuple(row) for row in ids.tolist()]

    async def native(self, mode: str, batch_size: int) -> Sample:
        """Time one batch through the engine."""
        positions = self.args.positions
        self.steps.clear()

        async def one(index: int, prompt: tuple[int, ...]) -> None:
            thinking = reasoning(mode, index, positions)
            request = Request(
                request_id=f"{mode}-{index}",
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=positions - thinking.steps, temperature=0.0),
                reasoning=thinking,
            )
            async for _ in self.engine.generate(request):
                pass

        started = time.perf_counter()
        await asyncio.gather(*(one(i, p) for i, p in enumerate(self.prompts(batch_size))))
        seconds = time.perf_counter() - started
        full = [
            s.seconds
            for s in self.steps
            if s.num_prefill_positions == 0 and sum(s.num_rows.values()) == batch_size
        ]
        return Sample(seconds, statistics.median(full))

    def transformers(self, batch_size: int) -> Sample:
        """Time the same work through a static-batch generate."""
        ids = torch.tensor(self.prompts(batch_size), device=self.device)
        positions = self.args.positions
        started = time.perf_counter()
        with torch.inference_mode():
            self.plain.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=positions,
                min_new_tokens=positions,
                do_sample=False,
                pad_token_id=0,
            )
        return Sample(time.perf_counter() - started, 0.0)

    async def run(self) -> dict[str, object]:
        """Measure everything and build the report."""
        await self.engine.start()
        sizes, repeats = self.args.batch_sizes, self.args.repeats
        results = {}
        with tqdm(total=len(sizes) * (repeats + 1) * (1 + len(MODES)), file=sys.stderr) as bar:
            for size in sizes:
                samples: dict[str, list[Sample]] = {}
                for repeat in range(repeats + 1):  # the first is warm-up
                    runs = {"transformers": self.transformers(size)}
                    bar.update()
                    for mode in MODES:
                        runs[mode] = await self.native(mode, size)
                        bar.update()
                    if repeat:
                        for name, sample in runs.items():
                            samples.setdefault(name, []).append(sample)
                results[str(size)] = self.summary(size, samples)
        await self.engine.stop()
        return {
            "bench": "engine",
            "model": self.args.model,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "cpu": platform.processor() or platform.machine(),
            "num_cpus": os.cpu_count(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "prompt_tokens": self.args.prompt,
            "positions": self.args.positions,
            "repeats": repeats,
            "batch": results,
        }

    def summary(self, size: int, samples: dict[str, list[Sample]]) -> dict[str, object]:
        """Medians and ratios of one batch size."""
        total = size * self.args.positions
        seconds = {name: [s.seconds for s in runs] for name, runs in samples.items()}
        steps = {name: [s.step_seconds for s in runs] for name, runs in samples.items()}
        report: dict[str, object] = {
            f"{name}_tokens_per_second": round(total / statistics.median(values), 1)
            for name, values in seconds.items()
        }
        for mode in MODES:
            report[f"{mode}_step_ms"] = round(statistics.median(steps[mode]) * 1e3, 2)
        report["native_over_transformers"] = ratio(seconds["transformers"], seconds["cot"])
        report["latent_step_over_cot"] = ratio(steps["latent"], steps["cot"])
        report["distribution_step_over_cot"] = ratio(steps["distribution"], steps["cot"])
        report["mixed_steps_over_cot"] = ratio(steps["cot"], steps["mixed"])  # steps a second
        return report


def main() -> None:
    """Parse flags, run, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompt", type=int, default=37, help="prompt tokens")
    parser.add_argument("--positions", type=int, default=64, help="positions after the prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--batch-sizes", type=lambda text: [int(x) for x in text.split(",")], default=[1, 8, 16]
    )
    args = parser.parse_args()
    report = asyncio.run(Bench(args).run())
    print(json.dumps(report))


if __name__ == "__main__":
    main()

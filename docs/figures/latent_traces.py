"""What the demo's latents hold, against the true search frontier: makes the figure and table of
docs/latent-traces.md from a server's own traces.

    coconut-serve serve demo --max-trace vectors --dtype float32
    python docs/figures/latent_traces.py http://127.0.0.1:8000 [--questions 400]
"""

import argparse
import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import openai
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

mpl.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "coconut_serve" / "models" / "demo"


def frontiers(question: str, num_steps: int) -> list[set[str]]:
    """Places that are 1, 2, ... edges from the root; the last level stays, as in training."""
    *edges, asked = question.removesuffix("?").split(", ")
    children: dict[str, list[str]] = {}
    for edge in edges:
        parent, child = edge.split(" > ")
        children.setdefault(parent, []).append(child)
    level, found = {asked.split(" from ")[1]}, []
    for _ in range(num_steps):
        level = {child for place in level for child in children.get(place, [])} or level
        found.append(level)
    return found


async def ask(client: openai.AsyncOpenAI, question: str) -> list[dict[str, Any]]:
    """The trace of one latent answer."""
    reply = await client.chat.completions.create(
        model=(await client.models.list()).data[0].id,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        extra_body={
            "reasoning_mode": "latent",
            "reasoning": {"trace": "vectors", "trace_top_k": 20},
        },
    )
    trace: list[dict[str, Any]] = (reply.choices[0].model_extra or {})["reasoning_trace"]
    return trace


def readings(
    trace: list[dict[str, Any]], table: torch.Tensor, names: list[str]
) -> list[tuple[dict[str, float], list[str]]]:
    """For each step: the logit lens by name, and the names by inner product, best first."""
    vocabulary = Tokenizer.from_file(str(DEMO / "tokenizer.json")).get_vocab()
    ids = torch.tensor([vocabulary[name] for name in names])
    found = []
    for step in trace:
        lens = {top["token"]: top["prob"] for top in step["top"]}
        vector = torch.frombuffer(bytearray(base64.b64decode(step["vector"])), dtype=torch.float32)
        scores = table[ids] @ vector
        found.append((lens, [names[i] for i in scores.argsort(descending=True).tolist()]))
    return found


def draw(question: str, reading: list[tuple[dict[str, float], list[str]]], path: Path) -> None:
    """One question's logit lens, step by step, with its frontiers framed."""
    levels = frontiers(question, len(reading))
    shown = list(dict.fromkeys(name for level in levels for name in sorted(level)))
    others = [n for lens, _ in reading for n, p in lens.items() if p > 0.02 and n not in shown]
    shown += list(dict.fromkeys(others))
    figure, axes = pyplot.subplots(figsize=(7, 0.35 * len(shown) + 1.6), layout="constrained")
    image = axes.imshow(
        [[lens.get(name, 0.0) for lens, _ in reading] for name in shown],
        cmap="Blues", vmin=0, vmax=1, aspect="auto",
    )  # fmt: skip
    for x, level in enumerate(levels):
        for y, name in enumerate(shown):
            if name in level:
                box = (x - 0.47, y - 0.47)
                axes.add_patch(pyplot.Rectangle(box, 0.94, 0.94, fill=False, ec="tab:red", lw=1.5))
    axes.set_xticks(range(len(reading)), [f"latent {i + 1}" for i in range(len(reading))])
    axes.set_yticks(range(len(shown)), shown)
    axes.set_title("logit lens of each latent (red: the true frontier)")
    figure.colorbar(image, label="probability")
    figure.savefig(path, dpi=120)


async def main() -> None:
    """Ask, read, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--questions", type=int, default=400)
    args = parser.parse_args()
    items = json.loads((DEMO / "test.json").read_text())
    items = items[:: max(1, len(items) // args.questions)][: args.questions]
    table = load_file(DEMO / "model.safetensors")["model.embed_tokens.weight"]
    names = [
        n for n in Tokenizer.from_file(str(DEMO / "tokenizer.json")).get_vocab() if n.isalpha()
    ]
    names = [name for name in names if name not in ("or", "from")]
    gate = asyncio.Semaphore(32)

    async def one(client: openai.AsyncOpenAI, question: str) -> list[dict[str, Any]]:
        async with gate:
            return await ask(client, question)

    async with openai.AsyncOpenAI(base_url=f"{args.url}/v1", api_key="-") as client:
        traces = await asyncio.gather(*(one(client, item["question"]) for item in items))
    rows: list[dict[str, float]] = []
    for step in range(len(traces[0])):
        mass, size, ranked = [], [], []
        for item, trace in zip(items, traces, strict=True):
            level = frontiers(item["question"], len(trace))[step]
            lens, order = readings(trace, table, names)[step]
            mass.append(sum(lens.get(name, 0.0) for name in level))
            size.append(len(level))
            ranked.append(len(set(order[: len(level)]) & level) / len(level))
        n = len(items)
        rows.append(
            {
                "latent": step + 1,
                "frontier_size_mean": sum(size) / n,
                "lens_mass_on_frontier_mean": sum(mass) / n,
                "inner_product_hits_mean": sum(ranked) / n,
            }
        )
        print(rows[-1])
    (HERE / "latent-traces.json").write_text(json.dumps({"n": len(items), "rows": rows}, indent=1))
    deepest = [i for i, item in enumerate(items) if item["hops"] == 5]
    widest = max(
        deepest, key=lambda i: sum(len(level) for level in frontiers(items[i]["question"], 6))
    )
    question = items[widest]["question"]
    print(question, "->", items[widest]["answer"])
    draw(question, readings(traces[widest], table, names), HERE / "latent-traces.png")


if __name__ == "__main__":
    asyncio.run(main())

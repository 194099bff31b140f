"""`coconut-serve bench`: latency and throughput of each mode, side by side."""

import argparse
import contextlib
import json
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from coconut_serve.commands.connect import first_key, is_url
from coconut_serve.commands.measure import Record, Target, ask, summarise
from coconut_serve.errors import StartupError
from coconut_serve.evaluation.local import serving
from coconut_serve.evaluation.tasks import BUILT_IN_TASKS, load_task
from coconut_serve.reasoning.registry import properties_of

_QUESTION = "What is {number} plus {number}? Think about it, then answer in a sentence."


def add_parser(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser(
        "bench", help="latency and throughput per mode; the last line is JSON"
    )
    about = "server to ask, or a model, which is served meanwhile"
    parser.add_argument("target", metavar="URL|MODEL", help=about)
    parser.add_argument("--modes", metavar="A,B", help="default: all the model has")
    parser.add_argument(
        "--concurrency", type=_counts, default=[1, 4], metavar="N,N", help="requests at once"
    )
    parser.add_argument(
        "--requests", type=int, default=16, metavar="N", help="of each mode and concurrency"
    )
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of an answer")
    parser.add_argument("--steps", type=int, metavar="N", help="of thinking; default: the model's")
    about = "{number} is put in, so prompts differ; default: what the model answers, or a sum"
    parser.add_argument("--prompt", help=about)
    parser.add_argument("--engine", help="of a MODEL; flags of serve come from COCONUT_*")


def _counts(text: str) -> list[int]:
    """Parse comma-separated integers >= 1."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers from 1, comma-separated")
    return [int(word) for word in words]


def run(args: argparse.Namespace) -> int:
    """Measure each mode and return the exit status.

    Raises:
        StartupError: The server does not start or does not answer.
    """
    with _server(args.target, args.engine) as url:
        target = Target(url=url.rstrip("/").removesuffix("/v1"), api_key=first_key())
        model = _model(target)
        modes = args.modes.split(",") if args.modes else model["reasoning_modes"]
        prompts = _prompts(args, model)
        results = []
        for concurrency in args.concurrency:
            _run(target, args, modes[0], 1, prompts[:2])  # warm-up, not counted
            for mode in modes:
                records = _run(target, args, mode, concurrency, prompts)
                results.append({"mode": mode, "concurrency": concurrency, **summarise(records)})
                _print_row(results[-1], is_first=len(results) == 1)
    failed = sum(row["requests"] - row["ok"] for row in results)
    machine = {"python": platform.python_version(), "cpus": os.cpu_count()}
    settings = {"max_tokens": args.max_tokens, "steps": args.steps, "requests": args.requests}
    told = {"model": model["id"], "settings": settings, "machine": machine, "results": results}
    print(json.dumps(told))
    return 1 if failed else 0


def _prompts(args: argparse.Namespace, model: dict[str, Any]) -> list[str]:
    """List the prompts: --prompt, else the model's own questions, else its example, else sums."""
    prompt = args.prompt
    if prompt is None and model["root"] in BUILT_IN_TASKS:
        questions = [q.text for q in load_task(BUILT_IN_TASKS[model["root"]], args.requests)]
        return [questions[n % len(questions)] for n in range(args.requests)]
    example = ((model.get("manifest") or {}).get("prompt") or {}).get("example")
    prompt = prompt or example or _QUESTION
    return [prompt.replace("{number}", str(n)) for n in range(args.requests)]


def _run(
    target: Target, args: argparse.Namespace, mode: str, concurrency: int, prompts: list[str]
) -> list[Record]:
    def one(prompt: str) -> Record:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": args.max_tokens,
            "temperature": 0,
            "reasoning_mode": mode,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if args.steps is not None and properties_of(mode).is_steady:
            body["reasoning"] = {"steps": args.steps}
        return ask(target, body)

    with ThreadPoolExecutor(concurrency) as pool:
        records = list(pool.map(one, prompts))
    for record in records:
        if not record.is_ok:
            print(f"{mode}: {record.status} {record.error}", file=sys.stderr)
    return records


def _print_row(row: dict[str, Any], *, is_first: bool) -> None:
    if is_first:
        names = ("req/s", "tok/s", "steps/s", "ttft ms", "ttfot ms", "itl ms", "e2e ms")
        print(f"{'mode':13} at once     ok " + " ".join(f"{name:>8}" for name in names))

    def median(name: str) -> str:
        return f"{row[name].get('p50', float('nan')) * 1e3:8.1f}"

    print(
        f"{row['mode']:13} {row['concurrency']:7} {row['ok']:6} "
        f"{row['requests_per_second']:8.2f} {row['answer_tokens_per_second']:8.1f} "
        f"{row['reasoning_steps_per_second']:8.1f} "
        f"{median('ttft')} {median('ttfot')} {median('itl')} {median('e2e')}",
        flush=True,
    )


def _model(target: Target) -> dict[str, Any]:
    try:
        status, text = target.get("/v1/models")
    except OSError as error:
        raise StartupError(f"{target.url}: {error}", param="URL") from error
    if status != 200:
        raise StartupError(f"{target.url}/v1/models answers {status}: {text[:200]}", param="URL")
    first: dict[str, Any] = json.loads(text)["data"][0]
    return first


def _server(target: str, engine: str | None) -> contextlib.AbstractContextManager[str]:
    """Yield the URL of the given server, or of a temporary one for the given model."""
    if is_url(target):
        return contextlib.nullcontext(target)
    return serving(target, ("--engine", engine) if engine else ())

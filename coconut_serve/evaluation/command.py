"""`coconut-serve eval`: the evaluation command."""

import argparse
import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

from coconut_serve.errors import StartupError
from coconut_serve.evaluation.ask import Answer, Asker
from coconut_serve.evaluation.local import serving
from coconut_serve.evaluation.runs import Run, plan_runs
from coconut_serve.evaluation.tasks import (
    BUILT_IN_TASKS,
    Question,
    find_extractor,
    is_right,
    load_task,
)

_NUM_ALONE = 16  # questions asked one at a time, to time an answer without concurrent requests


def add_parser(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser(
        "eval",
        help="accuracy, steps and time by mode on a task file",
        usage="%(prog)s [-h] [flags] TARGET [-- flags of serve]",
    )
    add = parser.add_argument
    add("target", metavar="TARGET", help="a model, served for this, or the URL of a server")
    add("--task", metavar="FILE", help="COCONUT's JSON or JSON lines; default: the model's own")
    add("--modes", metavar="M,M", help="comma-separated; default: all the model supports")
    sweep = "steps=0,1,2 or top_k=1,5,full; more than once"
    add("--sweep", action="append", default=[], metavar="NAME=V,V", help=sweep)
    add("--controls", action="store_true", help="add latents removed, and replaced by a constant")
    add("--limit", type=int, metavar="N", help="take a sample of N questions, as mixed as the file")
    add("--seed", type=int, default=0, metavar="N", help="of that sample")
    add("--max-tokens", type=int, default=128, metavar="N", help="answer tokens of a request")
    add("--concurrency", type=int, default=64, metavar="N", help="requests under way at once")
    add("--extract", metavar="HOW", help="last_word, last_number, after:MARK; or the manifest's")
    add("--api-key", default="-", metavar="KEY", help="of the server")
    add("--output", type=Path, metavar="FILE", help="write JSON there, and a plot beside it")


def run(args: argparse.Namespace) -> int:
    """Evaluate and return the exit status.

    Raises:
        StartupError: A flag is invalid, a package is missing, or the server refuses.
    """
    try:
        from coconut_serve.evaluation import report
    except ImportError as error:
        raise StartupError(f"eval: {error}: pip install matplotlib scipy") from error
    serve_flags = tuple(args.more_flags)
    is_url = args.target.startswith(("http://", "https://"))
    if is_url and serve_flags:
        raise StartupError(f"{serve_flags[0]} after -- needs a model, not a URL", param="--")
    task = BUILT_IN_TASKS.get(args.target) if args.task is None else Path(args.task)
    if task is None:
        raise StartupError("--task FILE is needed", param="--task")
    questions = load_task(task, args.limit, args.seed)
    name = args.target if task in BUILT_IN_TASKS.values() else task.name
    with contextlib.ExitStack() as stack:
        url = args.target if is_url else stack.enter_context(serving(args.target, serve_flags))
        result = asyncio.run(_evaluate(args, url.rstrip("/"), questions, name))
    print(report.table(result), report.comparisons(result), sep="\n\n")
    if args.output is not None:
        for path in report.save(result, args.output):
            print(f"wrote {path}")
    return 0


async def _evaluate(
    args: argparse.Namespace, url: str, questions: list[Question], task: str
) -> dict[str, Any]:
    from coconut_serve.evaluation import report

    base_url = url if url.endswith("/v1") else f"{url}/v1"
    async with openai.AsyncOpenAI(
        base_url=base_url, api_key=args.api_key, timeout=600, max_retries=8
    ) as client:
        asker = Asker(client, max_tokens=args.max_tokens, concurrency=args.concurrency)
        model = await asker.look()
        extract = find_extractor(args.extract or model.extract)
        modes = args.modes.split(",") if args.modes else model.modes
        runs = plan_runs(modes, args.sweep, has_controls=args.controls)
        rows, right = [], []
        num_alone = min(_NUM_ALONE, len(questions))
        total = len(runs) * (len(questions) + num_alone)
        with tqdm(total=total, unit=" answers", disable=None) as bar:
            for each in runs:
                bar.set_description(each.name)
                run_answers, timing = await _measure(
                    asker, model.name, each, questions, num_alone, bar
                )
                hits = [
                    is_right(extract, a.text, q.answer)
                    for a, q in zip(run_answers, questions, strict=True)
                ]
                right.append(hits)
                rows.append(report.summarise(each, questions, run_answers, hits, **timing))
    return {
        "model": model.name,
        "task": task,
        "limit": args.limit,
        "seed": args.seed,
        "concurrency": args.concurrency,
        "results": rows,
        "comparisons": report.compare(runs, right),
    }


async def _measure(
    asker: Asker, model: str, each: Run, questions: list[Question], num_alone: int, bar: "tqdm[Any]"
) -> tuple[list[Answer], dict[str, float]]:
    """Ask all questions concurrently, then a few one at a time."""
    started = time.perf_counter()
    answers = await asker.ask_all(model, each, questions, on_answer=bar.update)
    seconds = time.perf_counter() - started
    some = questions[:: max(1, len(questions) // num_alone)][:num_alone]
    alone = await asker.ask_all(model, each, some, concurrency=1, on_answer=bar.update)
    return answers, {
        "seconds": seconds,
        "seconds_alone": sum(a.seconds for a in alone) / len(alone),
    }

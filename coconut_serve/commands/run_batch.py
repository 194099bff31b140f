"""`coconut-serve run-batch`: a file of requests in OpenAI's batch format, answered into another."""

import argparse
import asyncio
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

from coconut_serve.checkpoint.weights import DEFAULT_MODEL
from coconut_serve.commands.batch_file import Job, Output, count_lines, read_jobs
from coconut_serve.commands.connect import api_key, base_url, is_url
from coconut_serve.errors import StartupError

_TIMEOUT_SECONDS = 24 * 3600  # of an answer: a queue may be long
_CONCURRENCY = 16  # where the server does not tell how many sequences it runs at once
_INTERRUPTED = 130  # the exit status that shells give for Ctrl+C
_Outcome = tuple[dict[str, Any] | None, dict[str, Any] | None]  # response and error of a row


def add_parser(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser(
        "run-batch",
        help="answer a JSONL file of requests (OpenAI's batch format)",
        usage="%(prog)s [-h] -i FILE -o FILE [flags] [MODEL] [-- flags of serve]",
        epilog="With the same files it goes on where it stopped: lines that have an answer are "
        "kept, the others are asked again. The exit status is 1 if a line failed.",
    )
    add = parser.add_argument
    about = f"served meanwhile, without --url; default: {DEFAULT_MODEL}"
    add("model", nargs="?", metavar="MODEL", help=about)
    about = "requests, an object a line: custom_id, method, url, body"
    add("-i", "--input-file", type=Path, required=True, metavar="FILE", help=about)
    about = "results, as they come: id, custom_id, response, error"
    add("-o", "--output-file", type=Path, required=True, metavar="FILE", help=about)
    add("--url", type=_url, metavar="URL", help="server to ask, such as http://127.0.0.1:8000")
    add("--api-key", metavar="KEY", help="of the server; default: the first of COCONUT_API_KEY")
    about = "requests under way at once; default: as many as the server runs"
    add("--concurrency", type=_count, metavar="N", help=about)


def _url(text: str) -> str:
    if not is_url(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no http address")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Answer the file and return the exit status.

    Raises:
        StartupError: A file cannot be read or written, or the server does not answer.
    """
    if args.url and args.model:
        raise StartupError("give a MODEL or --url, not both", param="--url")
    if args.output_file.resolve() == args.input_file.resolve():
        raise StartupError("--output-file is the input", param="-o")
    num_lines = count_lines(args.input_file)
    with Output(args.output_file) as output:
        try:
            with base_url(args.url or args.model or DEFAULT_MODEL, args.more_flags) as url:
                asyncio.run(_answer(args, url, output, num_lines))
        except KeyboardInterrupt:
            _tell("stopped; the same command goes on from here")
            return _INTERRUPTED
    _tell(f"{output.num_answered} answered, {output.num_failed} failed, {len(output.done)} kept")
    return 1 if output.num_failed else 0


def _tell(text: str) -> None:
    print(f"coconut-serve run-batch: {text}", file=sys.stderr)


async def _answer(args: argparse.Namespace, url: str, output: Output, num_lines: int) -> None:
    """Answer every line that has no answer."""
    key, jobs = api_key(args.api_key), read_jobs(args.input_file, output.done)
    pause = 0.1 if sys.stderr.isatty() else 30  # seconds between two states of the bar
    total = max(0, num_lines - len(output.done))
    async with openai.AsyncOpenAI(
        base_url=url, api_key=key, timeout=_TIMEOUT_SECONDS, max_retries=0
    ) as client:
        concurrency = args.concurrency or await _num_running(client, url)
        try:
            with tqdm(total=total, unit=" lines", mininterval=pause) as bar:
                async with asyncio.TaskGroup() as group:
                    for _ in range(concurrency):
                        group.create_task(_work(client, jobs, output, bar))
        except* StartupError as errors:
            raise errors.exceptions[0] from errors


async def _work(
    client: openai.AsyncOpenAI, jobs: Iterator[Job], output: Output, bar: "tqdm[Any]"
) -> None:
    """Take one line after another; the workers share `jobs`."""
    for job in jobs:
        if job.error:
            output.write(job, None, {"code": "invalid_line", "message": job.error})
        else:
            output.write(job, *await _ask(client, job))
        bar.update()


async def _ask(client: openai.AsyncOpenAI, job: Job) -> _Outcome:
    """Send a request, and again for as long as the server is full."""
    request_id = f"batch-{uuid.uuid4().hex}"
    path, headers = job.url.removeprefix("/v1"), {"x-request-id": request_id}
    while True:
        status = 200
        try:
            body = await client.post(
                path, cast_to=object, body=job.body, options={"headers": headers}
            )
        except openai.APIStatusError as error:
            retry_after = error.response.headers.get("retry-after", "")
            if error.status_code == 429 and retry_after.isdecimal():
                await asyncio.sleep(int(retry_after))
                continue
            status, body = error.status_code, _body_of(error)
        except (openai.APIError, ValueError) as error:  # ValueError: NaN, or half a character
            told = f"{error} {error.__cause__ or ''}".strip()
            return None, {"code": "request_failed", "message": told}
        return {"status_code": status, "request_id": request_id, "body": body}, None


def _body_of(error: openai.APIStatusError) -> object:
    """The body of an error, in OpenAI's shape also where a proxy sent it."""
    try:
        return error.response.json()
    except ValueError:
        return {"error": {"message": error.response.text, "type": "", "param": None, "code": None}}


async def _num_running(client: openai.AsyncOpenAI, url: str) -> int:
    """How many sequences the server runs at once.

    Raises:
        StartupError: It does not answer, or refuses the key.
    """
    address = f"{url.removesuffix('/v1')}/version"
    try:
        told: Any = await client.get(address, cast_to=object)
        return int(told["limits"]["max_num_seqs"])
    except (openai.AuthenticationError, openai.APIConnectionError) as error:
        raise StartupError(f"{url}: {error}", param="--url") from error
    except (openai.APIError, KeyError, TypeError, ValueError):  # not our server
        return _CONCURRENCY

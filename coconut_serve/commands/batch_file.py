"""The files of `run-batch`: OpenAI's batch format, a JSON object a line."""

import json
import os
import uuid
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from coconut_serve.errors import StartupError

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A line of the input; `error` is what is wrong with it, in words."""

    custom_id: str | None
    url: str = ""
    body: Any = None
    error: str = ""


def count_lines(path: Path) -> int:
    """Count the lines of the input that hold something.

    Raises:
        StartupError: It cannot be read.
    """
    try:
        with path.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    except OSError as error:
        raise StartupError(f"--input-file {path}: {error.strerror}", param="-i") from error


def read_jobs(path: Path, done: Set[str]) -> Iterator[Job]:
    """Read the input, without the lines whose custom_id is `done`."""
    seen: set[str] = set()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            job = _parse(line, number)
            if job.custom_id is not None and job.custom_id in seen:
                told = f"line {number}: an earlier line has the custom_id {job.custom_id!r}"
                yield Job(custom_id=job.custom_id, error=told)
            elif job.custom_id is None or job.custom_id not in done:
                yield job
            seen |= {job.custom_id} if job.custom_id is not None else set()


def _parse(line: bytes, number: int) -> Job:
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Job(custom_id=None, error=f"line {number} is not JSON: {error}")
    if not isinstance(told, dict):
        return Job(custom_id=None, error=f"line {number} is not an object")
    name = told.get("custom_id")
    if not isinstance(name, str) or not name:
        return Job(custom_id=None, error=f"line {number}: custom_id must be a text")
    url, body, fault = told.get("url"), told.get("body"), ""
    if told.get("method") != "POST":
        fault = "method must be POST"
    elif url not in ENDPOINTS:
        fault = f"url must be one of {', '.join(ENDPOINTS)}"
    elif not isinstance(body, dict):
        fault = "body must be an object"
    elif body.get("stream"):
        fault = "stream must be false: a line is one whole answer"
    if fault:
        return Job(custom_id=name, error=f"line {number}: {fault}")
    return Job(custom_id=name, url=str(url), body=body)


class Output:
    """Appends results, each line in one write, so the file is valid whenever the run stops.

    At the start, rows of earlier runs that hold no 2xx response are dropped: they are asked again.

    Args:
        path: The file; created if needed.

    Raises:
        StartupError: It cannot be read or written, or holds something else than results.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.num_answered = 0
        self.num_failed = 0
        try:
            self.done = frozenset(self._keep()) if path.exists() else frozenset[str]()
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(
        self, job: Job, response: dict[str, Any] | None, error: dict[str, Any] | None
    ) -> None:
        """Append the outcome of a line."""
        is_answer = response is not None and _is_success(response)
        self.num_answered += is_answer
        self.num_failed += not is_answer
        row = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": job.custom_id,
            "response": response,
            "error": error,
        }
        data = json.dumps(row).encode() + b"\n"
        try:
            if self._file.write(data) != len(data):
                raise OSError("no space left")
        except OSError as failure:
            raise self._refused(failure.strerror or str(failure)) from failure

    def _keep(self) -> Iterator[str]:
        """Keep the answered rows of an earlier run; yields their custom_ids."""
        kept = self._path.with_name(f"{self._path.name}.tmp")
        try:
            with self._path.open("rb") as old, kept.open("wb") as new:
                for line in old:
                    row = self._row(line)
                    if row is not None and _is_success(row["response"]):
                        new.write(line)
                        yield row["custom_id"]
            os.replace(kept, self._path)
        finally:
            kept.unlink(missing_ok=True)

    def _row(self, line: bytes) -> dict[str, Any] | None:
        """Parse a row; None if it was cut short."""
        if not line.endswith(b"\n"):
            return None
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"custom_id", "response", "error"} <= row.keys():
            raise self._refused("exists and holds no results of run-batch")
        return row

    def _refused(self, reason: str) -> StartupError:
        return StartupError(f"--output-file {self._path}: {reason}", param="-o")


def _is_success(response: Any) -> bool:
    return isinstance(response, dict) and 200 <= response.get("status_code", 0) < 300

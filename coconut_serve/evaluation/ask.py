"""Sends the questions of a run to a server concurrently and records the cost of each answer."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import openai

from coconut_serve.errors import StartupError
from coconut_serve.evaluation.runs import Run
from coconut_serve.evaluation.tasks import Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to one question, and its cost."""

    text: str
    num_reasoning_steps: int
    num_forward_passes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A server's description of its model."""

    name: str
    modes: tuple[str, ...]
    extract: str | None  # the manifest's answer.extract


class Asker:
    """A client of one server.

    Args:
        client: From the openai package.
        max_tokens: Limit of answer tokens per request; None: what the context leaves.
        concurrency: Concurrent requests.
    """

    def __init__(
        self, client: openai.AsyncOpenAI, *, max_tokens: int | None, concurrency: int
    ) -> None:
        self._client = client
        self._max_tokens = max_tokens
        self._concurrency = concurrency

    async def look(self) -> ServedModel:
        """Find out which model is served.

        Raises:
            StartupError: No coconut-serve server answers.
        """
        try:
            listed = await self._client.models.list()
            model = await self._client.models.retrieve(listed.data[0].id)
        except openai.OpenAIError as error:
            raise StartupError(f"{self._client.base_url}: {error}", param="TARGET") from error
        told: dict[str, Any] = model.model_extra or {}
        if "reasoning_modes" not in told:
            where = self._client.base_url
            raise StartupError(f"{where} is no coconut-serve server", param="TARGET")
        manifest = told.get("manifest") or {}
        return ServedModel(
            name=model.id,
            modes=tuple(told["reasoning_modes"]),
            extract=(manifest.get("answer") or {}).get("extract"),
        )

    async def ask_all(
        self,
        model: str,
        run: Run,
        questions: list[Question],
        *,
        concurrency: int | None = None,
        on_answer: Callable[[], object] = lambda: None,
    ) -> list[Answer]:
        """Ask all questions of a run; the answers keep their order.

        Args:
            model: Its name.
            run: Mode and settings.
            questions: The task.
            concurrency: Overrides the constructor's.
            on_answer: Called after each answer.

        Raises:
            StartupError: The server refuses the run; has the server's message.
        """
        gate = asyncio.Semaphore(concurrency or self._concurrency)

        async def ask(question: Question) -> Answer:
            async with gate:
                answer = await self._ask(model, run, question)
            on_answer()
            return answer

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask(question)) for question in questions]
        except* openai.OpenAIError as errors:
            raise StartupError(f"{run.name}: {errors.exceptions[0]}", param="TARGET") from errors
        return [task.result() for task in tasks]

    async def _ask(self, model: str, run: Run, question: Question) -> Answer:
        started = time.perf_counter()
        body: dict[str, Any] = {"reasoning_mode": run.mode}
        if run.settings:
            body["reasoning"] = run.settings
        reply = await self._client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question.text}],
            temperature=0,
            max_tokens=self._max_tokens,
            extra_body=body,
        )
        assert reply.usage is not None
        info: dict[str, Any] = (reply.usage.model_extra or {})["reasoning"]
        return Answer(
            text=reply.choices[0].message.content or "",
            num_reasoning_steps=info["reasoning_steps"],
            num_forward_passes=info["forward_passes"],
            seconds=time.perf_counter() - started,
        )

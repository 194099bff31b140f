"""LLM and AsyncLLM: a model and its engine in this process."""

import asyncio
import concurrent.futures
import contextlib
import itertools
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from typing import Any, Self, TypedDict, TypeVar, Unpack

from tqdm.auto import tqdm

from coconut_serve.arguments import did_you_mean, option
from coconut_serve.checkpoint.weights import DEFAULT_MODEL
from coconut_serve.config import Settings
from coconut_serve.engines.base import EngineInfo
from coconut_serve.errors import EngineDeadError, StartupError
from coconut_serve.llm.calls import (
    Call,
    Conversation,
    Fields,
    Prompt,
    chat_bodies,
    numbered,
    read_call,
    spread,
    text_bodies,
)
from coconut_serve.llm.outputs import CompletionOutput, RequestOutput, completion, request_output
from coconut_serve.loading import check_engine, load_service, make_metrics, serve_config
from coconut_serve.service.select import run_whole
from coconut_serve.service.service import Service
from coconut_serve.service.tokenizer import Tokenizer

T = TypeVar("T")
Sampling = Fields | Sequence[Fields] | None  # for all prompts, or for each

_MORE_CALLS = 16  # beyond those that run, so that the engine never waits for the next one
# Flags without effect here, by group or by name.
_OF_SERVERS = {"HTTP", "Metrics and logs", "max_queue", "drain_seconds", "reasoning_field"}
# No header can tell of an ignored field here, and no answer grows by vectors that nobody reads.
_DEFAULTS = {"strict_params": True, "max_trace": "vectors"}


class Options(TypedDict, total=False):
    """What `generate` and `chat` take by keyword."""

    reasoning_mode: str | Sequence[str] | None  # how the model thinks, for all prompts or each
    reasoning: Sampling  # the settings of `reasoning`, for all prompts or each
    use_tqdm: bool  # show a progress bar: LLM does by default, AsyncLLM does not


def read_settings(model: str, flags: dict[str, Any]) -> Settings:
    """Read keyword arguments, which are the flags of `serve` by their names.

    Raises:
        StartupError: One is unknown, only for servers, or has a wrong value.
    """
    known = Settings.flags()
    of_servers = {n for n, own in known.items() if {n, own.title} & _OF_SERVERS}
    names = [*(known.keys() - of_servers), "more_flags"]
    for name in flags:
        if name in of_servers:
            raise StartupError(f"{name} has no effect without a server", param=option(name))
        if name not in names:
            hint = did_you_mean(name, names)
            raise StartupError(f"{name} is no flag of serve{hint}", param=option(name))
    # `_answer` bounds the calls in flight: the queue never refuses.
    fixed = {"model": model, "max_queue": sys.maxsize}
    return Settings.model_validate({**_DEFAULTS, **flags, **fixed})


class _Model:
    """What a loaded model can tell."""

    _service: Service | None

    def _loaded(self) -> Service:
        if self._service is None:
            raise EngineDeadError("this LLM is closed or has not started")
        return self._service

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None: it takes token ids only."""
        return self._loaded().tokenizer

    @property
    def modes(self) -> tuple[str, ...]:
        """The reasoning modes that the model supports."""
        return self._loaded().model.modes

    @property
    def info(self) -> EngineInfo:
        """What the engine is and can do: vocabulary, context, dtype, device, fingerprint."""
        return self._loaded().engine.info


class AsyncLLM(_Model):
    """A model for one event loop: `async with AsyncLLM("demo")` or `await AsyncLLM.create("demo")`.

    Args:
        model: Directory, hub name or built-in, as for `serve`.
        flags: Flags of `serve` by their names, such as max_num_seqs=8 or engine="vllm".

    Raises:
        StartupError: A flag is wrong; when it starts, also if the model cannot be loaded.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **flags: Any) -> None:
        self._settings = read_settings(str(model), flags)
        self._config = serve_config(self._settings)
        self._service = None
        self._numbers = itertools.count()

    @classmethod
    async def create(cls, model: str = DEFAULT_MODEL, **flags: Any) -> Self:
        """Make one and start it."""
        return await cls(model, **flags).__aenter__()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(check_engine, self._settings)
        metrics = make_metrics(self._settings, self._config)
        self._places = asyncio.Semaphore(self._config.max_num_seqs + _MORE_CALLS)
        # A thread: notebooks, and scripts without a __main__ guard, cannot start processes.
        self._service = await load_service(
            self._settings, self._config, metrics, has_own_process=False
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls with EngineDeadError and free the model; idempotent."""
        service, self._service = self._service, None
        if service is not None:
            await service.engine.stop()

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Sampling = None,
        **options: Unpack[Options],
    ) -> list[RequestOutput]:
        """Continue prompts, as /v1/completions does; returns outputs in the order of prompts.

        Args:
            prompts: A text, token ids, {"prompt": ...}, {"prompt_token_ids": ...}, or a list.
            sampling_params: Any fields of a request, for all prompts or a list for each.
            options: reasoning_mode, reasoning, use_tqdm: see Options.

        Raises:
            InvalidRequestError: As over HTTP. A prompt that fails cancels the others.
        """
        return await self._answer(text_bodies(prompts), sampling_params, **options)

    async def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Sampling = None,
        **options: Unpack[Options],
    ) -> list[RequestOutput]:
        """Answer conversations, as /v1/chat/completions does; the rest is as for `generate`."""
        return await self._answer(chat_bodies(messages), sampling_params, **options)

    async def stream(
        self,
        prompt: Prompt | Conversation,
        sampling_params: Fields | None = None,
        *,
        reasoning_mode: str | None = None,
        reasoning: Fields | None = None,
    ) -> AsyncGenerator[CompletionOutput, None]:
        """Yield what each step adds to the choices of one prompt or conversation."""
        given: Any = prompt
        is_chat = isinstance(next(iter(given), None), Mapping)
        [own] = chat_bodies(given) if is_chat else text_bodies(given)
        call = self._read(own, sampling_params, reasoning_mode, reasoning, is_stream=True)
        async with self._places, await self._loaded().generate(call.ask) as run:
            async for delta in run:
                yield completion(delta, run, call.body)

    def _read(self, *fields: Any, is_stream: bool = False) -> Call:
        number = str(next(self._numbers))
        return read_call(self._config, number, *fields, is_stream=is_stream)

    async def _answer(
        self,
        bodies: Sequence[Fields],
        sampling: Sampling,
        reasoning_mode: str | Sequence[str] | None = None,
        reasoning: Sampling = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Read all calls, then run them together; the order of outputs is that of `bodies`."""
        self._loaded()
        count = len(bodies)
        columns = (
            spread("sampling_params", sampling, count),
            spread("reasoning_mode", reasoning_mode, count),
            spread("reasoning", reasoning, count),
        )
        read = []
        for index, fields in enumerate(zip(bodies, *columns, strict=True)):
            with numbered(index):
                read.append(self._read(*fields))
        with tqdm(total=count, desc="Processed prompts", disable=not use_tqdm) as bar:
            tasks = [asyncio.create_task(self._run(*each, bar)) for each in enumerate(read)]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, index: int, call: Call, bar: "tqdm[Any]") -> RequestOutput:
        with numbered(index):
            async with self._places:
                service = self._loaded()
                run = await service.generate(call.ask)
                choices = await run_whole(run)
        bar.update()
        return request_output(choices, run, call.body, service.tokenizer)


class LLM(_Model):
    """A model for scripts, notebooks and threads; its event loop runs in a thread of its own.

    Args:
        model: Directory, hub name or built-in, as for `serve`.
        flags: Flags of `serve` by their names, such as max_num_seqs=8 or engine="vllm".

    Raises:
        StartupError: A flag is wrong, or the model cannot be loaded.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **flags: Any) -> None:
        self._async = AsyncLLM(model, **flags)
        started: concurrent.futures.Future[_Life] = concurrent.futures.Future()
        live = _live(self._async, started)
        thread = threading.Thread(target=asyncio.run, args=(live,), name="llm", daemon=True)
        thread.start()
        try:
            self._loop, stop = started.result()
        except BaseException:
            started.cancel()  # interrupted: what still loads is freed when it has
            raise
        # Also when the last reference goes, so that `llm = LLM(...)` again does not need two.
        self._end = weakref.finalize(self, _end, self._loop, stop, thread)
        self._end.atexit = False  # too late for threads; the process ends ours

    @property
    def _service(self) -> Service | None:  # type: ignore[override]  # read only
        return self._async._service

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all calls with EngineDeadError and free the model; idempotent."""
        self._end()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Sampling = None,
        **options: Unpack[Options],
    ) -> list[RequestOutput]:
        """As AsyncLLM.generate; an interrupt (Ctrl-C) cancels all prompts, and the LLM goes on."""
        shown: Options = {"use_tqdm": True, **options}
        return self._wait(self._async.generate(prompts, sampling_params, **shown))

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Sampling = None,
        **options: Unpack[Options],
    ) -> list[RequestOutput]:
        """As AsyncLLM.chat, and as `generate` when it is interrupted."""
        shown: Options = {"use_tqdm": True, **options}
        return self._wait(self._async.chat(messages, sampling_params, **shown))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the LLM's loop and wait for it; whatever ends the wait cancels it."""
        if not self._end.alive:
            work.close()
            raise EngineDeadError("this LLM is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise EngineDeadError("this LLM was closed meanwhile") from None
        except BaseException:
            future.cancel()
            raise


_Life = tuple[asyncio.AbstractEventLoop, asyncio.Event]


async def _live(llm: AsyncLLM, started: "concurrent.futures.Future[_Life]") -> None:
    """Start, tell how to reach and to stop this loop, and run until stopped."""
    try:
        async with llm:
            stop = asyncio.Event()
            started.set_result((asyncio.get_running_loop(), stop))  # an error if it is cancelled
            await stop.wait()
    except BaseException as error:
        if not started.done():
            started.set_exception(error)
        elif not started.cancelled():
            raise


def _end(loop: asyncio.AbstractEventLoop, stop: asyncio.Event, thread: threading.Thread) -> None:
    with contextlib.suppress(RuntimeError):  # its loop has ended
        loop.call_soon_threadsafe(stop.set)
    if threading.current_thread() is not thread:
        thread.join()

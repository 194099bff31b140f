"""Runs the native engine's core in a thread, or in a process of its own."""

import atexit
import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Protocol

from coconut_serve.checkpoint.stages import stage
from coconut_serve.config import EngineConfig
from coconut_serve.engines.base import EngineInfo
from coconut_serve.engines.native.messages import Event, Message, Stop
from coconut_serve.errors import CoconutError, EngineDeadError, StartupError

logger = logging.getLogger(__name__)

_STOP_SECONDS = 30.0  # for a running step; then the process is killed

Prepare = Callable[[], None]


class Host(Protocol):
    """Runs an EngineCore."""

    @property
    def pid(self) -> int:
        """Id of the process that runs the core."""

    def start(self) -> EngineInfo:
        """Load the model and start working.

        Raises:
            StartupError: It cannot run as configured.
        """

    def send(self, message: Message) -> None:
        """Send a message; a dead core reports its death by an event, before or after."""

    def stop(self) -> None:
        """Stop the core and wait until it has ended."""


class ThreadHost:
    """Runs the core in a thread of this process.

    Args:
        config: Model and limits.
        modes: Reasoning modes to support.
        take: Called with each event, from the thread.
    """

    def __init__(
        self, config: EngineConfig, modes: tuple[str, ...], take: Callable[[Event], None]
    ) -> None:
        self.pid = os.getpid()
        self._arguments = config, modes
        self._take = take
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> EngineInfo:
        from coconut_serve.engines.native.core import EngineCore

        self.core = EngineCore(*self._arguments, self._inbox, self._take)
        info = self.core.load()
        self._thread = threading.Thread(target=self.core.run, name="native-engine", daemon=True)
        self._thread.start()
        return info

    def send(self, message: Message) -> None:
        self._inbox.put(message)

    def stop(self) -> None:
        self.send(Stop())
        if self._thread is not None:
            self._thread.join()


class ProcessHost:
    """Runs the core in a child process, which ends with this one, however this one ends.

    Args:
        config: Model and limits.
        modes: Reasoning modes to support.
        take: Called with each event, from a thread.
        prepare: Called first in the child.
    """

    def __init__(
        self,
        config: EngineConfig,
        modes: tuple[str, ...],
        take: Callable[[Event], None],
        prepare: Prepare | None,
    ) -> None:
        self._take = take
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._theirs = theirs
        self._writing = threading.Lock()
        self._process = context.Process(
            target=_work, args=(config, modes, theirs, prepare), name="native-engine", daemon=True
        )
        self._reader = threading.Thread(target=self._read, name="native-events", daemon=True)

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def start(self) -> EngineInfo:
        self._process.start()
        self._theirs.close()  # so that the pipe closes with the child
        atexit.register(self.stop)  # and the child ends with this process
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise StartupError(
                f"the engine's process ended while it loaded{self._fate()}"
            ) from None
        if isinstance(answer, BaseException):
            self._process.join()
            raise answer
        self._reader.start()
        return answer  # type: ignore[no-any-return]

    def _read(self) -> None:
        """Pass on events until the last, or until the child dies without one."""
        event = Event([], [], num_restarts=0)
        try:
            while event.death is None:
                event = self._pipe.recv()
                self._take(event)
        except Exception as error:
            is_over = isinstance(error, EOFError | OSError)
            if is_over:
                reason = f"the engine's process ended{self._fate()}"
            else:
                reason = f"the engine's events cannot be read: {error}"
            logger.error(reason, exc_info=not is_over)
            self._take(Event([], [], event.num_restarts, EngineDeadError(reason)))

    def _fate(self) -> str:
        """How the child ended."""
        self._process.join(timeout=5)
        code = self._process.exitcode
        if code is None:
            return ""
        return f" (killed by signal {-code})" if code < 0 else f" (exit status {code})"

    def send(self, message: Message) -> None:
        with self._writing, contextlib.suppress(OSError):  # dead: the reader sees it too
            self._pipe.send(message)

    def stop(self) -> None:
        """Stop the child; kill it if it does not end. Idempotent."""
        if self._reader.ident is None:  # it has not loaded
            return
        self.send(Stop())
        self._reader.join(timeout=_STOP_SECONDS)
        if self._reader.is_alive():
            self._process.kill()
            self._reader.join()
        self._process.join()
        self._pipe.close()
        atexit.unregister(self.stop)


def _work(
    config: EngineConfig, modes: tuple[str, ...], pipe: Connection, prepare: Prepare | None
) -> None:
    """Child process entry point."""
    # The parent handles signals to the process group: it drains, then sends Stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if prepare is not None:
        prepare()
    with stage("starting the engine", show_progress=config.show_progress):
        from coconut_serve.engines.native.core import EngineCore

    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def send(event: Event) -> None:
        with contextlib.suppress(OSError):  # the parent is gone; `_receive` stops the core
            pipe.send(event)

    core = EngineCore(config, modes, inbox, send)
    try:
        info = core.load()
    except CoconutError as error:
        pipe.send(error)
        return
    except Exception as error:
        logger.exception("the engine could not load")
        pipe.send(StartupError(f"the engine could not load: {type(error).__name__}: {error}"))
        return
    try:
        pipe.send(info)
    except OSError:  # the parent is gone
        return
    threading.Thread(target=_receive, args=(pipe, inbox), daemon=True).start()
    core.run()


def _receive(pipe: Connection, inbox: "queue.SimpleQueue[Message]") -> None:
    """Fill the inbox; a closed pipe means that the parent has ended."""
    while True:
        try:
            inbox.put(pipe.recv())
        except (EOFError, OSError):
            inbox.put(Stop())
            return

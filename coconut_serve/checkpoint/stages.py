"""Shows the stages of a start: a bar on a terminal, otherwise log lines."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

logger = logging.getLogger(__name__)

_REFRESH_SECONDS = 1.0


@contextlib.contextmanager
def stage(name: str, *, show_progress: bool, has_own_bar: bool = False) -> Iterator[None]:
    """Show that a stage runs, and how long it takes.

    Args:
        name: Of the stage, such as "packing weights".
        show_progress: Draw on the terminal; otherwise log the beginning and the end.
        has_own_bar: A library draws its own bar meanwhile.
    """
    started = time.monotonic()
    if not show_progress:
        logger.info("%s", name, extra={"stage": name})
    is_hidden = has_own_bar or not show_progress
    bar = tqdm(desc=name, bar_format="{desc}: {elapsed}", disable=is_hidden)
    is_over = threading.Event()

    def tick() -> None:
        while not is_over.wait(_REFRESH_SECONDS):
            bar.refresh()

    if not is_hidden:
        threading.Thread(target=tick, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        bar.close()
    seconds = time.monotonic() - started
    if not show_progress:
        extra = {"stage": name, "seconds": round(seconds, 1)}
        logger.info("%s took %.1f s", name, seconds, extra=extra)

"""How many sequences the server takes on: the engine's slots and a bounded queue."""

import math
import time
from collections import deque

from coconut_serve.errors import InvalidRequestError, NotReadyError, QueueFullError

_MAX_RETRY_AFTER_SECONDS = 60
_DRAIN_SAMPLES = 64


class Admission:
    """Counts sequences in flight; refuses what would wait behind a full queue.

    Args:
        max_running: Sequences the engine runs at once.
        max_queue: Sequences that may wait beyond those.
    """

    def __init__(self, *, max_running: int, max_queue: int) -> None:
        self._limit = max_running + max_queue
        self._max_queue = max_queue
        self.num_in_flight = 0
        self.is_draining = False
        self.is_overdue = False  # draining, and what still runs is being ended
        self._ended: deque[float] = deque(maxlen=_DRAIN_SAMPLES)  # a start, then times of ends

    @property
    def has_room(self) -> bool:
        """Whether one more sequence would be taken."""
        return self.num_in_flight < self._limit

    def acquire(self, count: int) -> None:
        """Take places for `count` sequences, all or none; raises as `check` does."""
        self.check(count)
        if self.num_in_flight == 0:
            self._ended.clear()  # what ended before an idle time says nothing of the pace
            self._ended.append(time.monotonic())
        self.num_in_flight += count

    def check(self, count: int) -> None:
        """Return if there are places for `count` sequences now.

        Raises:
            InvalidRequestError: There will never be room for so many.
            NotReadyError: The server drains.
            QueueFullError: There is no room; Retry-After says when there may be.
        """
        if self.is_draining:
            raise NotReadyError("the server is shutting down", retry_after_seconds=5)
        self.check_size(count)
        if self.num_in_flight + count > self._limit:
            raise QueueFullError(
                f"the queue of {self._max_queue} sequences is full",
                retry_after_seconds=self.retry_after_seconds(),
            )

    def check_size(self, count: int) -> None:
        """Return if there can ever be places for `count` sequences.

        Raises:
            InvalidRequestError: There will never be room for so many.
        """
        if count > self._limit:
            raise InvalidRequestError(
                f"the request makes {count} sequences, but the server takes {self._limit} at most",
                param="n",
            )

    def release(self, count: int) -> None:
        """Give places back."""
        self.num_in_flight -= count
        assert self.num_in_flight >= 0, "more places released than taken"
        self._ended.extend([time.monotonic()] * count)

    def retry_after_seconds(self) -> int:
        """Estimate when a place is free, from how fast sequences ended lately; 1 to 60."""
        if len(self._ended) < 2:
            return 1
        seconds = time.monotonic() - self._ended[0]
        per_sequence = seconds / (len(self._ended) - 1)
        return max(1, min(_MAX_RETRY_AFTER_SECONDS, math.ceil(per_sequence)))

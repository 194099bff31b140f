"""Admission control: the engine's slots and a bounded queue."""

import heapq
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from coconut_serve.errors import InvalidRequestError, NotReadyError, QueueFullError

_MAX_RETRY_AFTER_SECONDS = 60
_NUM_SAMPLES = 64
_ESTIMATE_SECONDS = 0.2


@dataclass(slots=True, eq=False)
class Places:
    """The places one call holds until its last sequence has ended."""

    count: int
    max_positions: int  # after the prompt, of its longest sequence
    num_done: int = 0  # positions of its furthest sequence


class Admission:
    """Counts sequences in flight and rejects calls when the queue is full.

    Args:
        max_running: Sequences the engine runs at once.
        max_queue: Sequences that may wait beyond those.
        step_seconds: Returns how long recent steps took; 0 before the first.
    """

    def __init__(
        self, *, max_running: int, max_queue: int, step_seconds: Callable[[], float]
    ) -> None:
        self._max_running = max_running
        self._max_queue = max_queue
        self._limit = max_running + max_queue
        self._step_seconds = step_seconds
        self._calls: dict[Places, None] = {}  # in order of arrival
        # Calls seldom use all positions they may; the share that recent ones used.
        self._used_shares: deque[float] = deque(maxlen=_NUM_SAMPLES)
        self._estimate = (0.0, 0, 0)  # cached: valid until, for how many places, the estimate
        self.num_in_flight = 0
        self.is_draining = False
        self.is_overdue = False  # draining took too long; running sequences are being ended

    @property
    def has_room(self) -> bool:
        """Whether one more sequence fits."""
        return self.num_in_flight < self._limit

    def acquire(self, count: int, *, max_positions: int) -> Places:
        """Take places for the sequences of a call, all or none; raises as `check` does."""
        self.check(count)
        places = Places(count, max_positions)
        self._calls[places] = None
        self.num_in_flight += count
        return places

    def check(self, count: int) -> None:
        """Check that `count` sequences fit now.

        Raises:
            InvalidRequestError: So many can never fit.
            NotReadyError: The server is draining.
            QueueFullError: There is no room now; Retry-After estimates when.
        """
        if self.is_draining:
            raise NotReadyError("the server is shutting down", retry_after_seconds=5)
        self.check_size(count)
        if self.num_in_flight + count > self._limit:
            raise QueueFullError(
                f"the queue of {self._max_queue} sequences is full",
                retry_after_seconds=self._recent_estimate(count),
            )

    def check_size(self, count: int) -> None:
        """Check that `count` sequences can ever fit.

        Raises:
            InvalidRequestError: So many can never fit.
        """
        if count > self._limit:
            raise InvalidRequestError(
                f"the request makes {count} sequences, but the server takes {self._limit} at most",
                param="n",
            )

    def release(self, places: Places, *, has_ended: bool = True) -> None:
        """Free a call's places; one that was cut short says nothing about usual lengths."""
        del self._calls[places]
        self.num_in_flight -= places.count
        if places.num_done and has_ended:
            self._used_shares.append(places.num_done / places.max_positions)

    def retry_after_seconds(self, count: int = 1) -> int:
        """Estimate when `count` places will be free: steps until then times seconds a step."""
        seconds = self._steps_until_free(count) * self._step_seconds()
        return max(1, min(_MAX_RETRY_AFTER_SECONDS, math.ceil(seconds)))

    def _recent_estimate(self, count: int) -> int:
        """Return a briefly cached estimate: rejections come by the thousand and must be cheap."""
        now = time.monotonic()
        until, for_count, seconds = self._estimate
        if now >= until or for_count != count:
            seconds = self.retry_after_seconds(count)
            self._estimate = (now + _ESTIMATE_SECONDS, count, seconds)
        return seconds

    def _steps_until_free(self, count: int) -> float:
        """Simulate the calls in order of arrival, each with its expected remaining positions."""
        share = fmean(self._used_shares) if self._used_shares else 1.0
        missing = self.num_in_flight + count - self._limit
        num_slots, now = self._max_running, 0.0
        running: list[tuple[float, int]] = []  # heap of (end of a call, its places)
        waiting = iter(self._calls)
        while missing > 0:
            while num_slots > 0 and (call := next(waiting, None)) is not None:
                heapq.heappush(running, (now + _expected_left(call, share), call.count))
                num_slots -= call.count
            now, ended = heapq.heappop(running)
            missing -= ended
            num_slots += ended
        return now


def _expected_left(call: Places, share: float) -> float:
    """Positions a call has left; one past its expected length gets that length again."""
    expected = call.max_positions * share
    most = call.max_positions - call.num_done
    return max(1.0, min(most, expected - call.num_done if call.num_done < expected else expected))

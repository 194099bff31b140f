import time

import pytest

from coconut_serve.errors import NotReadyError, QueueFullError
from coconut_serve.service.admission import Admission


def test_places_are_taken_all_or_none_and_come_back() -> None:
    admission = Admission(max_running=2, max_queue=2)
    admission.acquire(3)
    with pytest.raises(QueueFullError) as caught:
        admission.acquire(2)
    assert caught.value.retry_after_seconds is not None
    assert 1 <= caught.value.retry_after_seconds <= 60
    admission.acquire(1)
    assert not admission.has_room
    admission.release(4)
    assert admission.num_in_flight == 0
    assert admission.has_room


def test_draining_takes_nothing_new() -> None:
    admission = Admission(max_running=2, max_queue=2)
    admission.is_draining = True
    with pytest.raises(NotReadyError):
        admission.acquire(1)


def test_retry_after_follows_the_pace_and_forgets_idle_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    admission = Admission(max_running=4, max_queue=0)
    admission.acquire(4)
    assert admission.retry_after_seconds() == 1
    for _ in range(2):
        now += 12
        admission.release(1)
    assert admission.retry_after_seconds() == 12
    admission.release(2)  # four in 24 seconds
    assert admission.retry_after_seconds() == 6
    now += 600  # nobody asks
    admission.acquire(4)
    now += 3
    admission.release(1)
    assert admission.retry_after_seconds() == 3

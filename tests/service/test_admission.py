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

import contextlib
import timeit

import pytest

from coconut_serve.errors import NotReadyError, QueueFullError
from coconut_serve.service.admission import Admission


def make(max_running: int, max_queue: int, step_seconds: float = 0.05) -> Admission:
    return Admission(
        max_running=max_running, max_queue=max_queue, step_seconds=lambda: step_seconds
    )


def test_places_are_taken_all_or_none_and_come_back() -> None:
    admission = make(2, 2)
    three = admission.acquire(3, max_positions=10)
    with pytest.raises(QueueFullError) as caught:
        admission.acquire(2, max_positions=10)
    assert caught.value.retry_after_seconds is not None
    assert 1 <= caught.value.retry_after_seconds <= 60
    one = admission.acquire(1, max_positions=10)
    assert not admission.has_room
    for places in (three, one):
        admission.release(places)
    assert admission.num_in_flight == 0
    assert admission.has_room


def test_draining_takes_nothing_new() -> None:
    admission = make(2, 2)
    admission.is_draining = True
    with pytest.raises(NotReadyError):
        admission.acquire(1, max_positions=10)


def test_retry_after_is_right_before_anything_has_ended() -> None:
    """It was 1 until something had ended, and again after an idle time."""
    admission = make(4, 0)
    calls = [admission.acquire(1, max_positions=n) for n in (1000, 400, 600, 800)]
    assert admission.retry_after_seconds() == 20  # 400 steps of 50 ms
    assert admission.retry_after_seconds(2) == 30
    calls[1].num_done = 300
    assert admission.retry_after_seconds() == 5
    for call in calls:
        call.num_done = call.max_positions
        admission.release(call)
    assert admission.retry_after_seconds() == 1, "there is room"
    for _ in range(4):
        admission.acquire(1, max_positions=600)
    assert admission.retry_after_seconds() == 30, "as long after an idle time as before"


def test_retry_after_counts_what_waits_if_more_than_runs_must_end() -> None:
    admission = make(2, 2)
    for num in (100, 200, 300, 400):
        admission.acquire(1, max_positions=num)
    # Ends: 100, 200, then those that took these slots at 100 + 300 and 200 + 400.
    assert [admission.retry_after_seconds(n) for n in (1, 2, 3, 4)] == [5, 10, 20, 30]


def test_retry_after_follows_how_much_of_their_bound_calls_use() -> None:
    """Without max_tokens the bound is the context, which no answer comes near."""
    admission = make(2, 0)
    for _ in range(2):
        done = admission.acquire(1, max_positions=8000)
        done.num_done = 80
        admission.release(done)
    calls = [admission.acquire(1, max_positions=8000) for _ in range(2)]
    assert admission.retry_after_seconds() == 4  # 80 steps, not 8000
    calls[0].num_done = 60
    assert admission.retry_after_seconds() == 1
    calls[0].num_done = calls[1].num_done = 100
    assert admission.retry_after_seconds() == 4, "longer than most: as long again"
    calls[0].num_done = 7980
    assert admission.retry_after_seconds() == 1, "but not beyond its bound"


def test_retry_after_is_a_whole_number_from_1_to_60() -> None:
    admission = make(1, 0)
    admission.acquire(1, max_positions=10_000)
    assert admission.retry_after_seconds() == 60
    admission = make(1, 0, step_seconds=0.0)  # no step was made yet
    admission.acquire(1, max_positions=10_000)
    assert admission.retry_after_seconds() == 1


def test_refusals_stay_cheap() -> None:
    """Under overload they are most of the work. The bound allows for a slow machine."""
    admission = make(1024, 256)
    for i in range(1280):
        admission.acquire(1, max_positions=100 + i)

    def refuse() -> None:
        with contextlib.suppress(QueueFullError):
            admission.check(1)

    assert min(timeit.repeat(refuse, number=100, repeat=5)) / 100 < 0.0002


def test_calls_that_were_cut_off_say_nothing_of_how_long_calls_are() -> None:
    """Clients that hung up under overload made Retry-After 1."""
    admission = Admission(max_running=1, max_queue=0, step_seconds=lambda: 0.05)
    for _ in range(10):
        places = admission.acquire(1, max_positions=1000)
        places.num_done = 1
        admission.release(places, has_ended=False)
    admission.acquire(1, max_positions=1000)
    assert admission.retry_after_seconds() == 50

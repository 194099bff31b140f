"""Random lives of sequences keep the books: invariants 1 to 4 of CONTRIBUTING.md."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from coconut_serve.engines.native.block_pool import BlockPool
from coconut_serve.engines.native.scheduler import Schedule, Scheduler
from coconut_serve.engines.native.sequence import SavedState, Sequence
from coconut_serve.params import Phase
from coconut_serve.reasoning.progress import RowResult
from coconut_serve.types import HaltReason, RequestOutput
from tests.fakes import make_request

pytestmark = pytest.mark.torch

BLOCK_SIZE, MAX_LEN = 4, 40


class FakeRunner:
    """Stands in for the device: remembers which position each block slot holds, and for whom."""

    def __init__(self) -> None:
        self.cache: dict[int, tuple[object, ...]] = {}  # cache slot -> what was written

    def run(self, schedule: Schedule) -> list[RowResult]:
        for preemption in schedule.preemptions:
            preemption.sequence.saved = SavedState(None, None)  # type: ignore[arg-type]
        for source, target in schedule.block_copies:
            for offset in range(BLOCK_SIZE):
                held = self.cache.get(source * BLOCK_SIZE + offset)
                if held is not None:
                    self.cache[target * BLOCK_SIZE + offset] = held
        for sequence in schedule.admissions:
            sequence.saved = None
        results = []
        for row in schedule.rows:
            sequence = row.sequence
            for position in range(row.start, row.end):
                self.cache[self.slot(sequence, position)] = content(sequence, position)
            for position in range(row.end):
                held = self.cache[self.slot(sequence, position)]
                assert held == content(sequence, position), "a row reads what is not its own"
            if row.is_deciding:
                results.append(decide(sequence))
        return results

    def slot(self, sequence: Sequence, position: int) -> int:
        block = sequence.blocks[position // BLOCK_SIZE]
        assert block != 0, "the null block is never written"
        return block * BLOCK_SIZE + position % BLOCK_SIZE


def content(sequence: Sequence, position: int) -> tuple[object, ...]:
    """What a position holds: prompt positions depend on the prompt alone, others on the row."""
    prompt = sequence.request.prompt_token_ids
    if position < len(prompt):
        return ("prompt", prompt[: position + 1])
    return (sequence.request.request_id, position)


def decide(sequence: Sequence) -> RowResult:
    progress = sequence.progress
    thinks = progress.is_thinking and progress.num_steps_left > 0
    is_forced = not thinks and progress.num_forced_left > 0
    phase = Phase.THINK if thinks else Phase.BOUNDARY if is_forced else Phase.ANSWER
    is_vector = thinks and sequence.request.reasoning.mode == "latent"
    return RowResult(
        phase=phase,
        token_id=None if is_vector else 3,
        is_vector=is_vector,
        halt_reason=HaltReason.NONE,
        logprobs=None,
        trace=None,
    )


class Lives(RuleBasedStateMachine):
    """Add, step and abort in any order over a pool that is far too small."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        pool = BlockPool(14, BLOCK_SIZE, has_prefix_cache=True)
        self.scheduler = Scheduler(
            pool, max_num_seqs=5, max_num_batched_tokens=9, max_model_len=MAX_LEN
        )
        self.runner = FakeRunner()
        self.number = 0
        self.open: dict[str, int] = {}  # request id -> endings seen
        self.expected: dict[str, int] = {}

    @rule(
        target=ids,
        length=st.integers(1, 20),
        family=st.integers(0, 2),
        mode=st.sampled_from(["none", "latent", "cot"]),
        steps=st.integers(0, 6),
        num_end=st.integers(0, 2),
        max_tokens=st.integers(1, 12),
        members=st.integers(1, 3),
    )
    def add(
        self,
        length: int,
        family: int,
        mode: str,
        steps: int,
        num_end: int,
        max_tokens: int,
        members: int,
    ) -> str:
        generator = random.Random(family)
        prompt = tuple(generator.randrange(5, 50) for _ in range(length))
        request_id = ""
        self.number += 1
        for member in range(members):
            request_id = f"{self.number}-{member}"
            request = make_request(
                request_id,
                prompt,
                mode,
                steps if mode != "none" else 0,
                (1,) * num_end,
                max_tokens,
                group_id=str(self.number) if members > 1 else None,
            )
            self.scheduler.add(Sequence(request))
            self.open[request_id] = 0
        return request_id

    @rule(request_id=consumes(ids))
    def abort(self, request_id: str) -> None:
        was_open = request_id in self.open
        assert self.scheduler.abort(request_id) == was_open
        self.open.pop(request_id, None)

    @rule()
    def step(self) -> None:
        self.advance()

    def advance(self) -> None:
        schedule = self.scheduler.schedule()
        if self.open:
            assert schedule.rows or schedule.preemptions, "work is there and nothing moves"
        assert sum(r.end - r.start for r in schedule.rows) <= 9
        outputs: list[RequestOutput] = self.scheduler.update(schedule, self.runner.run(schedule))
        for output in outputs:
            assert output.request_id in self.open, "an output after the end"
            if output.finish_reason is not None:
                del self.open[output.request_id]

    @invariant()
    def books_are_right(self) -> None:
        self.scheduler.check_integrity()

    def teardown(self) -> None:
        """Everything that was accepted ends, and all blocks come back."""
        for _ in range(3000):
            if not self.open:
                break
            self.advance()
        assert not self.open, "a sequence never ended"
        assert self.scheduler.pool.num_used == 0
        assert not self.scheduler.has_work()


Lives.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLives = Lives.TestCase


def test_oldest_sequence_is_never_preempted() -> None:
    pool = BlockPool(11, BLOCK_SIZE)
    scheduler = Scheduler(pool, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=MAX_LEN)
    runner = FakeRunner()
    first = Sequence(make_request("first", tuple(range(5, 15)), max_tokens=28))
    scheduler.add(first)
    for i in range(3):
        scheduler.add(Sequence(make_request(f"{i}", tuple(range(i, i + 9)), max_tokens=28)))
    while scheduler.has_work():
        schedule = scheduler.schedule()
        scheduler.update(schedule, runner.run(schedule))
    assert first.progress.num_preemptions == 0
    assert scheduler.num_preemptions > 0


@pytest.mark.parametrize(("num_blocks", "reason"), [(14, "capacity"), (5, "kv")])
def test_waiting_sequence_tells_what_it_waits_for(num_blocks: int, reason: str) -> None:
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    num_slots = 1 if reason == "capacity" else 4
    scheduler = Scheduler(
        pool, max_num_seqs=num_slots, max_num_batched_tokens=64, max_model_len=MAX_LEN
    )
    for name in ("first", "second"):
        scheduler.add(Sequence(make_request(name, tuple(range(5, 14)))))
    assert len(scheduler.schedule().admissions) == 1
    assert scheduler.wait_reason == reason

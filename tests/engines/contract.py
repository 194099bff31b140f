"""One set of tests for every engine: order, one ending, abort, limits, seeds, errors."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from coconut_serve.engines.base import Engine
from coconut_serve.errors import EngineDeadError, InvalidRequestError
from coconut_serve.params import HaltParams, MixtureParams, Phase, SwitchParams
from coconut_serve.types import FinishReason, StepStats
from tests.fakes import make_request, run, run_all

EngineFactory = Callable[..., AbstractAsyncContextManager[Engine]]


class EngineContract:
    """Subclasses name a factory; pytest runs these for each of them."""

    def open(self, on_step: Callable[[StepStats], None] = lambda _: None, **settings: Any) -> Any:
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def engine(self, **settings: Any) -> AsyncIterator[tuple[Engine, list[StepStats]]]:
        stats: list[StepStats] = []
        async with self.open(stats.append, **settings) as engine:
            yield engine, stats

    async def test_answer_has_max_tokens_and_one_ending(self) -> None:
        async with self.engine() as (engine, _):
            result = await run(engine, make_request(max_tokens=5))
            assert len(result.token_ids) == 5
            assert result.finish_reason is FinishReason.LENGTH
            assert result.counts.num_output_tokens == 5

    async def test_phases_come_in_order(self) -> None:
        async with self.engine() as (engine, _):
            for mode in ("latent", "distribution", "cot"):
                request = make_request("r", mode=mode, steps=3, end=(4, 5), max_tokens=2)
                result = await run(engine, request)
                phases = [o.phase for o in result.outputs]
                assert phases == [Phase.THINK] * 3 + [Phase.BOUNDARY] * 2 + [Phase.ANSWER] * 2
                assert result.counts.num_reasoning_steps == 3
                assert result.counts.num_forced_tokens == 2
                is_vector = [o.is_vector for o in result.outputs[:3]]
                assert is_vector == [mode != "cot"] * 3
                has_text = [o.token_id is not None for o in result.outputs[:3]]
                assert has_text == [mode != "latent"] * 3
                assert sum(o.halt_reason != 0 for o in result.outputs) == 1

    async def test_all_positions_together_may_be_bounded(self) -> None:
        """In the thinking, at its end, among the end tokens, in the answer, and beyond it."""
        async with self.engine() as (engine, _):
            for bound, expected in ((2, 2), (3, 3), (4, 4), (6, 6), (50, 9)):
                reasoning = {"max_total_steps": bound}
                for mode in ("latent", "distribution", "cot"):
                    request = make_request(
                        "r", mode=mode, steps=3, end=(4, 5), max_tokens=4, reasoning=reasoning
                    )
                    result = await run(engine, request)
                    assert len(result.outputs) == expected
                    assert result.finish_reason is FinishReason.LENGTH
                    counts = result.counts
                    assert counts.num_reasoning_steps == min(expected, 3)
                    assert counts.num_output_tokens == max(0, expected - 5)

    async def test_same_seed_same_tokens_whatever_else_runs(self) -> None:
        async with self.engine() as (engine, _):
            requests = [
                make_request(f"{i}", temperature=1.0, seed=i % 3, max_tokens=12) for i in range(9)
            ]
            results = await run_all(engine, requests)
            for i, result in enumerate(results):
                assert result.token_ids == results[i % 3].token_ids

    async def test_closing_frees_everything(self) -> None:
        async with self.engine() as (engine, stats):
            streams = [
                engine.generate(make_request(f"{i}", mode=mode, steps=steps, max_tokens=20))
                for i, (mode, steps) in enumerate(
                    (("cot", 20), ("latent", 20), ("distribution", 20), ("none", 0))
                )
            ]
            for stream in streams:
                await anext(stream)
            for stream in streams:
                await stream.aclose()
            async with asyncio.timeout(5):
                while not stats or stats[-1].num_used_blocks or sum(stats[-1].num_running.values()):
                    await asyncio.sleep(0.001)
            result = await run(engine, make_request("after"))
            assert result.finish_reason is FinishReason.LENGTH

    async def test_prompt_that_cannot_fit_is_refused(self) -> None:
        async with self.engine() as (engine, _):
            prompt = (5,) * engine.info.max_model_len
            with pytest.raises(InvalidRequestError) as caught:
                await run(engine, make_request(prompt=prompt))
            assert caught.value.param == "prompt"
            with pytest.raises(InvalidRequestError):
                await run(engine, make_request(prompt=()))

    async def test_tokens_that_the_model_lacks_are_refused_by_name(self) -> None:
        async with self.engine() as (engine, _):
            for token_id in (-5, engine.info.vocab_size, 2**70):
                ids = (token_id,)
                wrong: dict[str, dict[str, Any]] = {
                    "start": {"enter_token_id": token_id},
                    "source": {"constant_token_id": token_id},
                    "halt.stop_tokens": {"halt": HaltParams(stop_token_ids=ids)},
                    "halt.learned": {"halt": HaltParams(learned_token_ids=(1, *ids))},
                    "switch.hard_tokens": {"switch": SwitchParams(hard_token_ids=ids)},
                }
                for key, settings in wrong.items():
                    with pytest.raises(InvalidRequestError) as caught:
                        await run(engine, make_request(reasoning=settings))
                    assert caught.value.param == f"reasoning.{key}"
            assert len((await run(engine, make_request(max_tokens=3))).token_ids) == 3

    async def test_answer_may_be_fed_vectors(self) -> None:
        """Sampled, counted and ended like any other."""
        mixture = MixtureParams(kind="moi", top_k=20, in_answer=True)
        common: dict[str, Any] = {"mode": "distribution", "reasoning": {"mixture": mixture}}
        asked = [make_request(f"m{steps}", steps=steps, **common) for steps in (0, 3)]
        async with self.engine() as (engine, _):
            results = await run_all(engine, asked)
        for request, result in zip(asked, results, strict=True):
            answer = [o for o in result.outputs if o.phase is Phase.ANSWER]
            assert [o.is_vector for o in answer] == [True] * 8
            assert result.finish_reason is FinishReason.LENGTH
            assert result.counts.num_output_tokens == 8
            assert result.counts.num_vector_steps == request.reasoning.steps

    async def test_more_requests_than_slots_all_end(self) -> None:
        async with self.engine(max_num_seqs=3) as (engine, _):
            results = await run_all(engine, [make_request(f"{i}") for i in range(20)])
            assert all(len(r.token_ids) == 8 for r in results)

    async def test_stopped_engine_answers_dead(self) -> None:
        async with self.engine() as (engine, _):
            await engine.check_health()
            stream = engine.generate(make_request(max_tokens=50))
            await anext(stream)
            await engine.stop()
            with pytest.raises(EngineDeadError):
                async for _ in stream:
                    pass
            with pytest.raises(EngineDeadError):
                await engine.check_health()
            with pytest.raises(EngineDeadError):
                await run(engine, make_request("late"))

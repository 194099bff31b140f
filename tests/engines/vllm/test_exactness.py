"""Nothing around a request changes what it gets, and it is what the native engine gives."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from coconut_serve.errors import InvalidRequestError
from coconut_serve.params import HaltParams, MixtureParams, Phase, SwitchParams
from coconut_serve.types import FinishReason, HaltReason
from tests.engines.vllm.support import Engines, widen_heads
from tests.fakes import Result, make_request, native_engine, run, run_all
from tests.models import load_plain, reference, save_tiny

pytestmark = pytest.mark.vllm

TINY_POOL = ("--num-gpu-blocks-override", "7")


def requests(*, is_greedy: bool = False) -> list[Any]:
    from tests.engines.native.test_exactness import mixed_requests

    mixed = mixed_requests()
    return [r for r in mixed if r.sampling.is_greedy] if is_greedy else mixed


def summary(result: Result) -> tuple[object, ...]:
    counts = result.counts
    return (
        result.token_ids,
        result.thinking_ids,
        [o.phase for o in result.outputs],
        [o.halt_reason for o in result.outputs],
        result.finish_reason,
        result.stop_reason,
        counts.num_reasoning_steps,
        counts.num_vector_steps,
        counts.num_forced_tokens,
    )


def growing() -> list[Any]:
    """Rows that all need a second block at the same step: somebody is preempted for certain."""
    return [make_request(f"g{i}", (3 + i,) * 28, max_tokens=12) for i in range(8)]


async def late(engine: Any, request: Any, seconds: float) -> Result:
    await asyncio.sleep(seconds)
    return await run(engine, request)


async def test_greedy_rows_get_what_the_native_engine_gives(
    wide_llama: Path, engines: Engines
) -> None:
    """All modes, soft noise, penalties, halting, end tokens; alone, batched and preempted."""
    asked = requests(is_greedy=True)
    assert {r.reasoning.mode for r in asked} >= {"none", "latent", "distribution", "cot"}
    async with native_engine(wide_llama) as engine:
        expected = [summary(r) for r in await run_all(engine, asked)]
    async with engines.open(wide_llama) as engine:
        assert [summary(await run(engine, request)) for request in asked] == expected
        assert [summary(r) for r in await run_all(engine, asked)] == expected
    async with engines.open(wide_llama, lambda _: None, *TINY_POOL) as engine:
        num_preemptions = 0
        for _ in range(3):  # the second time some prompts are cached
            results = await run_all(engine, [*growing(), *asked])
            assert [summary(r) for r in results[-len(asked) :]] == expected
            num_preemptions += sum(r.counts.num_preemptions for r in results)
        assert num_preemptions > 0


async def test_top_k_1_distribution_equals_greedy_cot(wide_llama: Path, engines: Engines) -> None:
    """Oracle 3."""
    one = {"mixture": MixtureParams(top_k=1)}
    async with engines.open(wide_llama) as engine:
        for first in (5, 40, 90):
            ids = tuple(range(first, first + 9))
            cot = await run(engine, make_request("c", ids, max_tokens=20))
            soft = make_request("d", ids, "distribution", 12, max_tokens=8, reasoning=one)
            result = await run(engine, soft)
            assert result.thinking_ids + result.token_ids == cot.token_ids


async def test_sampled_rows_do_not_depend_on_batch_mates_or_preemption(
    wide_llama: Path, engines: Engines
) -> None:
    asked = requests()
    order = random.Random(3).sample(range(16), 16)
    async with engines.open(wide_llama) as engine:
        alone = [summary(await run(engine, request)) for request in asked]
        jobs = [late(engine, r, 0.1 * order[i]) for i, r in enumerate(asked)]
        assert [summary(r) for r in await asyncio.gather(*jobs)] == alone
    async with engines.open(wide_llama, lambda _: None, *TINY_POOL) as engine:
        results = await run_all(engine, [*growing(), *asked])
        assert [summary(r) for r in results[-len(asked) :]] == alone
        assert sum(r.counts.num_preemptions for r in results) > 0


async def test_reader_that_lags_behind_gets_every_step(wide_llama: Path, engines: Engines) -> None:
    """Chunks that nobody fetched are joined; that once lost all but one column of a report."""
    halt = HaltParams(entropy_below=20.0, entropy_patience=4)
    asked = make_request("a", mode="distribution", steps=20, reasoning={"halt": halt})
    async with engines.open(wide_llama) as engine:
        expected = summary(await run(engine, asked))
        stream = engine.generate(asked)
        outputs = [await anext(stream)]
        await run(engine, make_request("meanwhile", max_tokens=60))
        outputs += [output async for output in stream]
        assert summary(Result(outputs)) == expected


@pytest.mark.parametrize("mode", ["latent", "distribution"])
async def test_prefix_cache_never_shares_thoughts(
    mode: str, wide_llama: Path, engines: Engines
) -> None:
    """A prompt that spells what vLLM calls another request's thoughts.

    31 soft steps of a random model amplify rounding, so thoughts are compared on one engine.
    """
    generator = random.Random(9)
    prompt = tuple(generator.randrange(3, 120) for _ in range(33))
    thinking = make_request("a", prompt, mode=mode, steps=31, max_tokens=8)
    async with native_engine(wide_llama) as native, engines.open(wide_llama) as engine:
        first = await run(engine, thinking)
        seen_as = [0 if t is None else t for t in first.thinking_ids]  # 0: the hidden token
        spelled = make_request("b", (*prompt, *seen_as), max_tokens=8)
        second = await run(engine, spelled)
        assert second.token_ids == (await run(native, spelled)).token_ids
        assert second.counts.num_cached_tokens == 32, "the prompt's full block is shared"
        again = await run(engine, thinking)
        assert summary(again) == summary(first)
        assert again.counts.num_cached_tokens == 32


async def test_halting_on_the_device_ends_where_native_ends(
    wide_llama: Path, engines: Engines
) -> None:
    """Cold stop, stop token, min_tokens after thinking of unknown length."""
    cold = {"halt": HaltParams(entropy_below=20.0, entropy_patience=3)}
    soft = {"mode": "distribution", "steps": 20, "max_tokens": 6}
    async with native_engine(wide_llama) as native, engines.open(wide_llama) as engine:
        free = await run(native, make_request(mode="cot", steps=20, max_tokens=6))
        stop = free.thinking_ids[4]
        assert stop is not None
        ends_at_stop = {"halt": HaltParams(stop_token_ids=(stop,))}
        likely = {"halt": HaltParams(stop_token_ids=(stop, 9), stop_test="prob", stop_prob=0.05)}
        answer = await run(native, make_request(reasoning=cold, **soft))  # type: ignore[arg-type]
        ends = frozenset([answer.token_ids[2]])
        asked = [
            make_request("cold", reasoning=cold, end=(126,), **soft),  # type: ignore[arg-type]
            make_request("no-end", reasoning=cold, **soft),  # type: ignore[arg-type]
            make_request("ends", reasoning=cold, stop_token_ids=ends, **soft),  # type: ignore[arg-type]
            make_request("min", reasoning=cold, stop_token_ids=ends, min_tokens=5, **soft),  # type: ignore[arg-type]
            make_request("stop", mode="cot", steps=20, end=(stop,), reasoning=ends_at_stop),
            make_request("stop2", mode="cot", steps=20, reasoning=ends_at_stop),
            make_request("stop3", mode="cot", steps=20, end=(126,), reasoning=ends_at_stop),
            make_request("likely", mode="cot", steps=20, end=(126,), reasoning=likely),
            make_request("likely-latent", mode="latent", steps=9, end=(126,), reasoning=likely),
            make_request("end-is-stop", mode="latent", steps=3, end=(9,), stop_token_ids={9}),
        ]
        expected = [summary(r) for r in await run_all(native, asked)]
        results = await run_all(engine, asked)
        assert [summary(r) for r in results] == expected
        assert results[0].counts.num_reasoning_steps < 20
        assert results[2].finish_reason is FinishReason.STOP
        halts = [o.halt_reason for r in results for o in r.outputs]
        assert {HaltReason.COLD_STOP, HaltReason.STOP_TOKEN, HaltReason.FIXED} <= {*halts}


async def test_switching_is_that_of_native(wide_llama: Path, engines: Engines) -> None:
    """Also where the switches are spent, which bounds the answer."""
    full = MixtureParams(kind="full", norm="embed_mean")
    settings: list[dict[str, Any]] = [
        {"switch": SwitchParams(window=0)},
        {"switch": SwitchParams(window=0, max_switches=1)},
        {"switch": SwitchParams(window=0, max_switches=1, answer_tokens=2)},
        {"switch": SwitchParams(rule="none"), "mixture": full},
        {"switch": SwitchParams(rule="confidence", p_max=0.1), "mixture": full},
    ]
    asked = [
        make_request(str(i), mode="auto", steps=8, end=(126,), max_tokens=6, reasoning=each)
        for i, each in enumerate(settings)
    ]
    async with native_engine(wide_llama) as native:
        expected = [summary(r) for r in await run_all(native, asked)]
    async with engines.open(wide_llama) as engine:
        results = await run_all(engine, asked)
    assert [summary(r) for r in results] == expected
    assert [len(r.token_ids) for r in results] == [6, 6, 2, 6, 6]
    assert HaltReason.SWITCHES in {o.halt_reason for o in results[1].outputs}


async def test_end_token_that_the_model_says_is_seen_without_a_step(
    wide_llama: Path, engines: Engines
) -> None:
    """`cot` rows pass vLLM's draws on: ended by the token, at the cap, counted by penalties."""
    from tests.engines.native.test_exactness import prompt

    async with native_engine(wide_llama) as engine:
        free = make_request(mode="cot", steps=9, prompt=prompt(1, 26), max_tokens=4)
        said = (await run(engine, free)).thinking_ids
        asked = []
        for at, penalty in ((0, 0.0), (3, 0.0), (3, 0.9), (5, 0.0), (None, 0.0), (None, 0.9)):
            unsaid = next(t for t in range(3, 120) if t not in said)
            end = unsaid if at is None else said[at] or unsaid
            asked.append(
                make_request(
                    request_id=f"{at}-{penalty}",
                    mode="cot",
                    steps=9,
                    prompt=prompt(1, 26),
                    end=(end,),
                    max_tokens=6,
                    frequency_penalty=penalty,
                    reasoning={"halt": HaltParams(stop_token_ids=(end,))},
                )
            )
        expected = [summary(r) for r in await run_all(engine, asked)]
    halts = {h for row in expected for h in row[3] if h is not HaltReason.NONE}  # type: ignore[attr-defined]
    assert halts == {HaltReason.STOP_TOKEN, HaltReason.CAP}
    async with engines.open(wide_llama) as engine:
        assert [summary(await run(engine, request)) for request in asked] == expected
    async with engines.open(wide_llama, lambda _: None, *TINY_POOL) as engine:
        results = await run_all(engine, asked)
        assert [summary(r) for r in results] == expected
        assert sum(r.counts.num_preemptions for r in results) > 0


async def test_logprobs_and_traces_are_those_of_native(wide_llama: Path, engines: Engines) -> None:
    trace = {"trace": "vectors", "trace_top_k": 4}
    asked = [
        make_request("a", mode="latent", steps=4, end=(126,), num_logprobs=3, reasoning=trace),
        make_request(
            "b",
            mode="distribution",
            steps=4,
            num_logprobs=2,
            reasoning={"trace": "topk", "mixture": MixtureParams(noise="gumbel")},
        ),
        make_request("c", num_logprobs=0),
        make_request("d", mode="cot", steps=3, end=(126,), reasoning={"trace": "summary"}),
    ]
    async with native_engine(wide_llama) as native:
        expected = await run_all(native, asked)
    async with engines.open(wide_llama) as engine:
        results = await run_all(engine, asked)
    for result, wanted in zip(results, expected, strict=True):
        assert summary(result) == summary(wanted)
        for ours, theirs in zip(result.outputs, wanted.outputs, strict=True):
            assert (ours.logprobs is None) == (theirs.logprobs is None)
            if ours.logprobs and theirs.logprobs:
                assert ours.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-4)
                assert [i for i, _ in ours.logprobs.top] == [i for i, _ in theirs.logprobs.top]
            assert (ours.trace is None) == (theirs.trace is None)
            if ours.trace and theirs.trace:
                for name in ("entropy", "max_prob", "norm", "cosine", "retained_mass"):
                    value, goal = getattr(ours.trace, name), getattr(theirs.trace, name)
                    assert value == pytest.approx(goal, abs=1e-3), name
                if theirs.trace.vector:
                    assert ours.trace.vector == pytest.approx(theirs.trace.vector, abs=1e-4)


@pytest.mark.parametrize("mode", ["none", "cot", "latent", "distribution"])
async def test_abort_in_every_phase_leaves_nothing(
    mode: str, wide_llama: Path, engines: Engines
) -> None:
    stats: list[Any] = []
    async with engines.open(wide_llama, stats.append) as engine:
        expected = await run(engine, make_request("x", mode="latent", steps=5, end=(126,)))
        steps = 0 if mode == "none" else 10
        for num_outputs in (0, 1, 5, 12):
            request = make_request("gone", mode=mode, steps=steps, max_tokens=60)
            stream = engine.generate(request)
            task = asyncio.ensure_future(anext(stream))
            if num_outputs:
                await task
                for _ in range(num_outputs - 1):
                    await anext(stream)
            else:
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await stream.aclose()
        async with asyncio.timeout(10):
            while stats[-1].num_used_blocks or sum(stats[-1].num_running.values()):
                await asyncio.sleep(0.01)
        again = await run(engine, make_request("y", mode="latent", steps=5, end=(126,)))
        assert summary(again) == summary(expected)
        [status] = await engine._life.llm.collective_rpc("coconut_status")
        assert status["num_rows"] == status["num_saved"] == 0


async def test_row_that_goes_numerically_wrong_ends_alone(
    wide_llama: Path, engines: Engines, tmp_path: Path
) -> None:
    """NaN in the final norm's weight of one model: vectors are NaN, answers are not touched."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in wide_llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = torch.inf
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    stops = frozenset([2])
    asked = [
        make_request("a", mode="latent", steps=4, stop_token_ids=stops),
        make_request("b", mode="distribution", steps=4, stop_token_ids=stops),
        make_request("c", mode="latent", steps=4, reasoning={"trace": "summary"}),
    ]
    async with engines.open(broken) as engine:
        for result in await run_all(engine, asked):
            assert result.finish_reason is FinishReason.STOP
            assert result.stop_reason == "numerical"
            assert [o.phase for o in result.outputs][:1] != [Phase.BOUNDARY]
            assert result.token_ids == []


async def test_adapter_gives_what_native_gives(
    wide_llama: Path, engines: Engines, tmp_path: Path
) -> None:
    from tests.models import with_projection

    model, _ = with_projection(wide_llama, tmp_path / "codi")
    asked = [
        make_request(f"{steps}", mode="latent", steps=steps, reasoning={"adapter": "default"})
        for steps in (1, 4, 7)
    ]
    async with native_engine(model) as native:
        expected = [summary(r) for r in await run_all(native, asked)]
    async with engines.open(model) as engine:
        assert engine.info.adapters == ("default", "realign")
        assert [summary(r) for r in await run_all(engine, asked)] == expected
        with pytest.raises(InvalidRequestError, match=r"reasoning\.adapter must be one of none"):
            await run(engine, make_request(mode="latent", reasoning={"adapter": "other"}))


@pytest.fixture(scope="module")
def untied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 tokens: vLLM pads the tables to 128 rows, and the second of two ranks has 36."""
    folder = tmp_path_factory.mktemp("untied")
    return widen_heads(save_tiny("llama", folder, vocab_size=100), folder / "wide")


@pytest.mark.parametrize("flags", [(), ("-tp", "2")])
async def test_realign_gives_what_native_and_a_plain_loop_give(
    untied_llama: Path, engines: Engines, flags: tuple[str, ...]
) -> None:
    """LatentMAS's formula, written out with an inverse in double precision."""
    plain = load_plain(untied_llama)
    o, e = (layer.weight.detach().double() for layer in (plain.lm_head, plain.model.embed_tokens))
    matrix = torch.linalg.inv(o.T @ o + 1e-5 * torch.eye(64)) @ o.T @ e
    length = e.norm(dim=1).mean()

    def realign(hidden: torch.Tensor) -> torch.Tensor:
        mapped: torch.Tensor = hidden.double() @ matrix
        scaled: torch.Tensor = mapped * length / mapped.norm()
        return scaled.float()

    asked = [
        make_request(
            f"{steps}", tuple(range(7 * steps, 7 * steps + 9)), "latent", steps, (11,),
            max_tokens=6, reasoning={"adapter": "realign"},
        )
        for steps in (1, 3, 5)
    ]  # fmt: skip
    async with native_engine(untied_llama) as native:
        expected = [summary(r) for r in await run_all(native, asked)]
    for request, (token_ids, *_) in zip(asked, expected, strict=True):
        prompt, steps = list(request.prompt_token_ids), request.reasoning.steps
        told, _ = reference(
            plain, prompt, 6, mode="latent", steps=steps, end=(11,), adapter=realign
        )
        assert told == token_ids
    async with engines.open(untied_llama, lambda _: None, *flags) as engine:
        assert engine.info.adapters == ("realign",)
        assert [summary(r) for r in await run_all(engine, asked)] == expected


async def test_end_token_that_is_the_first_id_and_a_stop_token(
    wide_llama: Path, engines: Engines
) -> None:
    asked = make_request(mode="latent", steps=3, end=(0,), stop_token_ids=frozenset({0}))
    async with native_engine(wide_llama) as native, engines.open(wide_llama) as engine:
        assert summary(await run(engine, asked)) == summary(await run(native, asked))


async def test_soft_rows_keep_min_tokens_while_they_think(
    wide_llama: Path, engines: Engines
) -> None:
    """The soft token must not be an end token either: that ended the request in its thinking."""
    soft: dict[str, Any] = {"mode": "distribution", "steps": 6, "max_tokens": 8}
    async with native_engine(wide_llama) as native, engines.open(wide_llama) as engine:
        free = await run(native, make_request(**soft))
        stops = frozenset(t for t in free.thinking_ids if t is not None)
        request = make_request(min_tokens=6, stop_token_ids=stops, **soft)
        expected = summary(await run(native, request))
        assert summary(await run(engine, request)) == expected
        assert len(expected[0]) >= 6  # type: ignore[arg-type]

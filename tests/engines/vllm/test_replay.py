"""Replayed vectors inside vLLM: what the native engine makes of them, preempted or not."""

from pathlib import Path

import pytest

from tests.engines.native.test_exactness import prompt
from tests.engines.native.test_replay import KINDS, given, make
from tests.engines.vllm.support import Engines
from tests.engines.vllm.test_exactness import TINY_POOL, requests, summary
from tests.engines.vllm.test_golden import vllm_app
from tests.fakes import listening, make_request, native_engine, run, run_all

pytestmark = pytest.mark.vllm


async def test_replay_gives_what_native_gives(wide_llama: Path, engines: Engines) -> None:
    """Own vectors and those of another question; with tokens of other rows, and preempted."""
    async with native_engine(wide_llama) as native:
        sources = [await run(native, make(name, prompt(3, 9))) for name in KINDS]
        asked = [
            make(name, prompt(seed, length), **given(source))
            for seed, length in ((3, 9), (8, 17))
            for name, source in zip(KINDS, sources, strict=True)
        ]
        results = await run_all(native, asked)
        expected = [summary(r) for r in results]
        quiet = make_request(
            "quiet", prompt(8, 17), "latent", 6, (11,), reasoning=given(sources[0])
        )  # no trace: vLLM sends no report
        quietly = summary(await run(native, quiet))
    assert expected[: len(KINDS)] == [summary(source) for source in sources]
    async with engines.open(wide_llama) as engine:
        for result, wanted in zip(await run_all(engine, asked), results, strict=True):
            assert summary(result) == summary(wanted)
            for ours, theirs in zip(result.vectors, wanted.vectors, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)
        assert summary(await run(engine, quiet)) == quietly
    async with engines.open(wide_llama, lambda _: None, *TINY_POOL) as engine:
        num_preemptions = num_rounds = 0  # who is preempted depends on how requests arrive
        while num_rounds < 2 or (num_preemptions == 0 and num_rounds < 8):
            again = (await run_all(engine, [*requests(is_greedy=True), *asked]))[-len(asked) :]
            assert [summary(r) for r in again] == expected
            num_preemptions += sum(r.counts.num_preemptions for r in again)
            num_rounds += 1
        assert num_preemptions > 0


async def test_replay_through_http(wide_llama: Path, engines: Engines) -> None:
    from tests.e2e.test_replay import check_replay

    async with engines.open(wide_llama) as engine, listening(vllm_app(engine, wide_llama)) as url:
        await check_replay(url)

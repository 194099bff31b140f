"""The same table of methods inside vLLM, against the same plain loops."""

import dataclasses
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from coconut_serve.types import Request
from tests.engines.methods.adapters import with_adapters
from tests.engines.methods.loop import Parts
from tests.engines.methods.table import METHODS, Key, check, requests
from tests.engines.vllm.support import Engines, widen_heads
from tests.fakes import run, run_all

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    return with_adapters(widen_heads(tiny_llama, folder / "wide"), folder / "model")


@pytest.fixture(scope="module")
def parts(tiny_llama: Path) -> Parts:
    """Of the narrow model, which is the same function."""
    return Parts.load(tiny_llama)


def served(unsupported: Iterable[str], **settings: Any) -> dict[Key, Request]:
    """Without what the engine refuses; answers are greedy, since vLLM draws them its own way."""
    asked = requests([name for name in METHODS if name != "moi-answer-drawn"], **settings)
    return {
        key: dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, temperature=0.0))
        for key, r in asked.items()
        if not (r.reasoning.pad_positions and "pad_positions" in unsupported)
    }


@pytest.mark.parametrize("has_prefix_cache", [True, False])
async def test_methods_equal_their_plain_loops(
    model: Path, parts: Parts, engines: Engines, has_prefix_cache: bool
) -> None:
    """All in one batch, and one row of each alone; tokens, and what was fed."""
    async with engines.open(model, enable_prefix_caching=has_prefix_cache) as engine:
        asked = served(engine.info.unsupported_features)
        assert {name for name, _ in asked} >= METHODS.keys() - {"pad", "moi-answer-drawn"}
        check(asked, await run_all(engine, list(asked.values())), parts)
        first = {key: request for key, request in asked.items() if key[1] == has_prefix_cache}
        alone = [await run(engine, request) for request in first.values()]
        check(first, alone, parts)


async def test_preemption_changes_no_method(model: Path, parts: Parts, engines: Engines) -> None:
    """Six blocks of 32 for rows that all need a second one, while they think or answer.

    The newest rows are preempted, so older ones go before those that never were.
    """
    flags = ("--num-gpu-blocks-override", "7")
    async with engines.open(model, lambda _: None, *flags) as engine:
        asked = served(engine.info.unsupported_features, rows=2, length=27)
        missing = {name for name, _ in asked}
        for seed in range(16):
            keys = random.Random(seed).sample(list(asked), len(asked))
            older = [key for key in keys if key[0] not in missing][:3]
            newer = [key for key in keys if key[0] in missing]
            shuffled = {key: asked[key] for key in (*older, *newer)}
            if not missing:
                break
            results = await run_all(engine, list(shuffled.values()))
            rows = zip(shuffled, results, strict=True)
            hit = {k: r for k, r in rows if r.counts.num_preemptions and k[0] in missing}
            check({key: asked[key] for key in hit}, list(hit.values()), parts)
            missing -= {name for name, _ in hit}
    assert not missing, "never preempted"

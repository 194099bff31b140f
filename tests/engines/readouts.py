"""The token that a thinking step stands for: where the steps are counted out it ends nothing."""

from typing import Any

import pytest

from coconut_serve.engines.base import Engine
from coconut_serve.params import MixtureParams
from coconut_serve.types import FinishReason
from tests.fakes import Result, make_request, run

PROMPT = (5, 60, 7, 81, 9)
MODES: dict[str, dict[str, Any]] = {
    "cot": {},
    "distribution": {"mixture": MixtureParams(top_k=5)},
    "auto": {},
}


async def check(engine: Engine, mode: str) -> None:
    """Steps of an exact number are taken whatever they say; else a stop token ends the answer."""
    end = (11,)

    async def ask(name: str, *, is_fixed: bool = True, **sampling: Any) -> Result:
        reasoning = {"is_fixed": is_fixed, "trace": "vectors", **MODES[mode]}
        request = make_request(
            name, PROMPT, mode, 6, end, max_tokens=5, reasoning=reasoning, **sampling
        )
        return await run(engine, request)

    free = await ask("free")
    said = frozenset(i for i in free.thinking_ids if i is not None)
    assert len(free.thinking_ids) == 6
    answer = frozenset(free.token_ids) - said
    for min_tokens in (0, 2):
        kept = await ask("kept", stop_token_ids=said, min_tokens=min_tokens)
        assert kept.thinking_ids == free.thinking_ids
        for ours, theirs in zip(kept.vectors, free.vectors, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3)
        assert kept.counts.num_reasoning_steps == 6
        if min_tokens:
            assert len(kept.token_ids) >= 2
            assert not said & set(kept.token_ids[:2])
        elif not said & set(free.token_ids):
            assert kept.token_ids == free.token_ids
    if answer:
        ended = await ask("ended", stop_token_ids=answer)
        assert ended.finish_reason is FinishReason.STOP
        assert ended.thinking_ids == free.thinking_ids
    capped = await ask("capped", is_fixed=False, stop_token_ids=said)
    assert (capped.finish_reason, capped.token_ids) == (FinishReason.STOP, [])
    assert capped.stop_reason in said

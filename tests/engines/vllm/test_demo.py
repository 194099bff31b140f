"""The shipped demo inside vLLM: the same answers as on the native engine."""

import json
from typing import Any

import pytest

from coconut_serve.checkpoint.tokenizer import load_tokenizer
from coconut_serve.checkpoint.weights import resolve_model
from coconut_serve.params import HaltParams, MixtureParams
from coconut_serve.types import Request
from tests.engines.vllm.support import Engines
from tests.engines.vllm.test_exactness import summary
from tests.fakes import make_request, native_engine, run_all

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DEMO = resolve_model("demo")
START, END, ANSWER, EOS = 3, 5, 9, 2
SOFT = MixtureParams(top_k=5, temperature=1.0, top_p=1.0, filter_top_k=0, min_p=0.0)


def asked() -> list[Request]:
    """Forty questions, each in one of the modes as the manifest bounds them."""
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer is not None
    requests = []
    for i, item in enumerate(json.loads((DEMO / "test.json").read_text())[::30]):
        ids = tuple(tokenizer.encode(item["question"], add_special_tokens=True))
        kinds: tuple[dict[str, Any], ...] = (
            {"prompt": (*ids, ANSWER)},
            {"prompt": ids, "mode": "cot", "steps": 30, "end": (ANSWER,),
             "reasoning": {"halt": HaltParams(stop_token_ids=(ANSWER,))}},
            {"prompt": (*ids, START), "mode": "latent", "steps": 6, "end": (END,)},
            {"prompt": (*ids, START), "mode": "distribution", "steps": 6, "end": (END,),
             "reasoning": {"mixture": SOFT}},
        )  # fmt: skip
        common: dict[str, Any] = {"max_tokens": 20, "stop_token_ids": frozenset([EOS])}
        requests.append(make_request(f"{i}", **kinds[i % 4], **common))
    return requests


async def test_forty_questions_are_answered_as_by_native(engines: Engines) -> None:
    requests = asked()
    async with native_engine(DEMO, max_model_len=96) as native:
        expected = [summary(r) for r in await run_all(native, requests)]
    async with engines.open(DEMO) as engine:
        assert [summary(r) for r in await run_all(engine, requests)] == expected

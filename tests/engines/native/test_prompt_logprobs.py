"""Log-probabilities of prompts: those of the plain model, however the prompt is computed."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coconut_serve.types import Request
from tests.fakes import make_request, native_engine, run, run_all
from tests.models import load_plain

pytestmark = pytest.mark.torch

PROMPT = tuple(3 + (7 * i) % 120 for i in range(23))


def scored(name: str, prompt: tuple[int, ...] = PROMPT, **own: object) -> Request:
    return make_request(name, prompt, max_tokens=3, num_prompt_logprobs=2, **own)  # type: ignore[arg-type]


def plain(llama: Path, prompt: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = load_plain(llama)(torch.tensor([prompt])).logits[0]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("chunk", [4, 64])
async def test_scores_are_those_of_the_plain_model(tiny_llama: Path, chunk: int) -> None:
    """Also for a prompt that the prefix cache holds, beside rows that want none."""
    expected = plain(tiny_llama, PROMPT)
    async with native_engine(tiny_llama, max_num_batched_tokens=chunk) as engine:
        first = await run(engine, make_request("first", PROMPT, max_tokens=3))
        latent = scored("c", mode="latent", steps=2)
        requests = [scored("a"), make_request("b", PROMPT, max_tokens=9), latent]
        results = await run_all(engine, requests)
    for result in (results[0], results[2]):
        given = [o.prompt_logprobs for o in result.outputs]
        assert not any(given[1:])
        assert len(given[0]) == len(PROMPT) - 1
        for position, score in enumerate(given[0]):
            row = expected[position]
            assert score.logprob == pytest.approx(float(row[PROMPT[position + 1]]), abs=1e-4)
            ids = row.topk(2).indices.tolist()
            assert [i for i, _ in score.top] == ids
    assert results[0].token_ids == first.token_ids
    assert not results[1].outputs[0].prompt_logprobs


async def test_preemption_scores_each_token_once(tiny_llama: Path) -> None:
    """Of a cache that holds one long sequence: those behind it are computed anew."""
    requests = [scored(f"{i}", tuple(3 + (i + j) % 100 for j in range(8))) for i in range(4)]
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=30)) for r in requests]
    async with native_engine(tiny_llama, kv_cache_memory="48KiB", max_model_len=40) as engine:
        results = await asyncio.gather(*(run(engine, request) for request in requests))
    assert sum(result.counts.num_preemptions for result in results) > 0
    for request, result in zip(requests, results, strict=True):
        scores = result.outputs[0].prompt_logprobs
        expected = plain(tiny_llama, request.prompt_token_ids)
        ids = request.prompt_token_ids[1:]
        assert len(scores) == len(ids)
        own = torch.tensor([score.logprob for score in scores])
        torch.testing.assert_close(own, expected[range(len(ids)), list(ids)], atol=1e-4, rtol=1e-4)


async def test_members_of_a_group_share_what_the_first_computed(tiny_llama: Path) -> None:
    group = [
        replace(scored("g0"), group_id="g"),
        replace(make_request("g1", PROMPT, max_tokens=3), group_id="g"),
    ]
    async with native_engine(tiny_llama) as engine:
        first, second = await run_all(engine, group)
    assert len(first.outputs[0].prompt_logprobs) == len(PROMPT) - 1
    assert first.token_ids == second.token_ids
    assert second.counts.num_forward_passes <= first.counts.num_forward_passes

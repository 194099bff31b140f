"""Vectors of one request fed by another: exactly those, whatever is around it."""

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from coconut_serve.errors import InvalidRequestError
from coconut_serve.params import HaltParams, MixtureParams
from coconut_serve.types import HaltReason, Request
from tests.engines.native.test_exactness import mixed_requests, prompt, summary
from tests.fakes import Result, make_request, native_engine, run, run_all
from tests.models import load_plain, reference

pytestmark = pytest.mark.torch

# Ways of thinking with noise, with rules that end the phase, and with a last vector that is kept.
KINDS: dict[str, dict[str, Any]] = {
    "latent": {"mode": "latent"},
    "noise": {"mode": "latent", "reasoning": {"noise_std": 0.4}},
    "learned": {
        "mode": "latent",
        "reasoning": {
            "halt": HaltParams(learned_token_ids=(5, 6), sample=True),
            "keeps_last": True,
            "end_adds_vector": True,
        },
    },
    "converged": {
        "mode": "latent",
        "reasoning": {"halt": HaltParams(converge_metric="cosine", converge_below=0.9)},
    },
    "soft": {
        "mode": "distribution",
        "reasoning": {
            "mixture": MixtureParams(noise="gumbel", top_k=5),
            "halt": HaltParams(entropy_below=4.0, entropy_patience=2),
        },
    },
}


def make(name: str, ids: tuple[int, ...], **more: Any) -> Request:
    kind = KINDS[name]
    settings = {"trace": "vectors", **kind.get("reasoning", {}), **more}
    return make_request(
        f"{name}{len(ids)}", ids, kind["mode"], 6, (11,), max_tokens=7, seed=3,
        frequency_penalty=0.3, reasoning=settings,
    )  # fmt: skip


def given(result: Result) -> dict[str, Any]:
    """What a request says to feed the vectors of an earlier one."""
    data = b"".join(struct.pack(f"<{len(v)}f", *v) for v in result.vectors)
    texts = [token_id for token_id in result.thinking_ids if token_id is not None]
    return {"replay_vectors": data, "replay_token_ids": tuple(texts)}


async def test_replay_of_its_own_vectors_changes_nothing(tiny_llama: Path) -> None:
    """Tokens, texts, halts and all that a trace tells; alone and in one batch."""
    async with native_engine(tiny_llama, enable_prefix_caching=False) as engine:
        first = {name: await run(engine, make(name, prompt(3, 9))) for name in KINDS}
        asked = [make(name, prompt(3, 9), **given(result)) for name, result in first.items()]
        alone = [await run(engine, request) for request in asked]
        together = await run_all(engine, asked)
    halts = {o.halt_reason for r in first.values() for o in r.outputs}
    assert halts >= {HaltReason.LEARNED, HaltReason.CONVERGED, HaltReason.COLD_STOP}
    for before, *after in zip(first.values(), alone, together, strict=True):
        for again in after:
            assert summary(again) == summary(before)
            assert [o.halt_reason for o in again.outputs] == [o.halt_reason for o in before.outputs]
        assert [o.trace for o in after[0].outputs] == [o.trace for o in before.outputs]


@pytest.mark.parametrize("num_given", [1, 4, 6])
async def test_vectors_of_another_question_equal_a_plain_loop(
    tiny_llama: Path, num_given: int
) -> None:
    plain, ids = load_plain(tiny_llama), prompt(5, 11)
    async with native_engine(tiny_llama) as engine:
        for name in ("latent", "soft"):
            other = make_request("other", prompt(4, 7), "latent", 6, reasoning={"trace": "vectors"})
            vectors = (await run(engine, other)).vectors[:num_given]
            data = b"".join(struct.pack("<64f", *v) for v in vectors)
            request = make_request(
                name, ids, KINDS[name]["mode"], 6, (11,), reasoning={"replay_vectors": data}
            )
            result, own = await run(engine, request), await run(engine, make(name, ids))
            expected, _ = reference(
                plain, list(ids), 8, mode=request.reasoning.mode, steps=6, end=(11,),
                given=[torch.tensor(v) for v in vectors],
            )  # fmt: skip
            assert result.token_ids == expected
            assert result.thinking_ids[:num_given] == [None] * num_given
            assert result.counts.num_reasoning_steps == result.counts.num_vector_steps == 6
            assert result.token_ids[:7] != own.token_ids, "the vectors matter"


async def test_one_changed_vector_changes_the_answer(tiny_llama: Path) -> None:
    async with native_engine(tiny_llama) as engine:
        first = await run(engine, make("latent", prompt(3, 9)))
        data = bytearray(given(first)["replay_vectors"])
        data[2 * 256 : 3 * 256] = struct.pack("<64f", *(-x for x in first.vectors[2]))
        changed = await run(engine, make("latent", prompt(3, 9), replay_vectors=bytes(data)))
    assert changed.vectors[:2] == first.vectors[:2]
    assert changed.vectors[2] == tuple(-x for x in first.vectors[2])
    assert changed.outputs[3].trace != first.outputs[3].trace
    assert changed.token_ids != first.token_ids


async def test_rules_end_no_phase_before_the_last_given_vector(tiny_llama: Path) -> None:
    halt = HaltParams(entropy_below=20.0, entropy_patience=1)  # always holds
    request = make("soft", prompt(6, 9), halt=HaltParams())
    async with native_engine(tiny_llama) as engine:
        vectors = given(await run(engine, request))
        result = await run(engine, make("soft", prompt(7, 9), halt=halt))
        assert result.counts.num_reasoning_steps == 0
        vectors["replay_vectors"] = vectors["replay_vectors"][: 4 * 256]
        vectors["replay_token_ids"] = vectors["replay_token_ids"][:4]
        again = await run(engine, make("soft", prompt(7, 9), halt=halt, **vectors))
    assert again.counts.num_reasoning_steps == 4
    assert again.thinking_ids == list(vectors["replay_token_ids"])


@pytest.mark.parametrize("num_positions", [64, 92])
async def test_preemption_chunks_and_batch_mates_change_nothing(
    tiny_llama: Path, num_positions: int
) -> None:
    async with native_engine(tiny_llama) as engine:
        sources = [await run(engine, make(name, prompt(3, 9))) for name in KINDS]
        asked = [
            make(name, prompt(8, 17), **given(source))
            for name, source in zip(KINDS, sources, strict=True)
        ]
        alone = [summary(await run(engine, request)) for request in asked]
        plain = make_request("plain", (*prompt(8, 17), 11), max_tokens=7)
        expected = (await run(engine, plain)).token_ids
    size = str(num_positions * 4 * (2 * 2 * 2 * 16 + 64))
    async with native_engine(
        tiny_llama, kv_cache_memory=size, max_model_len=60, max_num_batched_tokens=11
    ) as engine:
        for _ in range(2):  # the second time prompts are cached, and thoughts are not
            results = (await run_all(engine, [*mixed_requests(), *asked]))[-len(asked) :]
            assert [summary(r) for r in results] == alone
            assert sum(r.counts.num_preemptions for r in results) > 0
            assert (await run(engine, plain)).token_ids == expected


async def test_what_does_not_fit_is_refused(tiny_llama: Path) -> None:
    async with native_engine(tiny_llama) as engine:
        data = bytes(2 * 256)
        for vectors, texts in ((b"1234", ()), (data, (1,)), (data, (1, 128)), (b"", (1,))):
            wrong = {"replay_vectors": vectors, "replay_token_ids": texts}
            with pytest.raises(InvalidRequestError):
                await run(engine, make("soft", prompt(3, 9), **wrong))

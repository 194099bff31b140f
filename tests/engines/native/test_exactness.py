"""Invariant 1 of the design: nothing around a request changes what it gets."""

import asyncio
import random
from pathlib import Path

import pytest
import torch

from coconut_serve.params import HaltParams, MixtureParams, SwitchParams
from coconut_serve.reasoning import rows, slots
from coconut_serve.types import FinishReason, Request, StepStats
from tests.engines import readouts
from tests.fakes import core_of, drift, make_request, native_engine, run, run_all
from tests.models import load_plain, reference, with_projection

pytestmark = pytest.mark.torch


def prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = random.Random(seed)
    return tuple(generator.randrange(3, 128) for _ in range(length))


_LATENT_KINDS: list[dict[str, object]] = [
    {},
    {"noise_std": 0.3, "end_adds_vector": True},
    {"halt": HaltParams(learned_token_ids=(5, 6), sample=True), "min_steps": 1},
    {"soft_weight": 0.5, "halt": HaltParams(converge_metric="cosine", converge_below=0.9)},
]


def mixed_requests() -> list[Request]:
    """Sixteen rows: all modes, greedy and sampled, with noise, penalties, filters, end tokens."""
    requests = []
    for i in range(16):
        kind = i % 4
        common: dict[str, object] = {"request_id": f"{i}", "prompt": prompt(i, 5 + 3 * (i % 7))}
        if i % 3 == 1:
            common |= {"temperature": 0.9, "seed": i, "top_p": 0.8 if i % 2 else 1.0}
        if i % 5 == 2:
            common |= {"frequency_penalty": 0.5, "repetition_penalty": 1.3}
        if i in (3, 5, 6, 10):  # eight tokens, each followed by a neighbour
            some = range(20, 28)
            words = tuple((a, b) for a in some for b in some if abs(a - b) != 1)
            common |= {"allowed_token_ids": tuple(some), "bad_words": words}
        if kind == 1:
            steps = 7 if i == 13 else i % 6  # the cosine rule needs two steps at least
            common |= {"mode": "latent", "steps": steps, "end": (11,) if i % 2 else ()}
            common["reasoning"] = _LATENT_KINDS[i // 4]
        elif kind == 2:
            noise = ("none", "gumbel", "dirichlet")[i % 3]
            mixed = "moi" if i == 2 else "topk"  # the one kind that takes noise
            mixture = MixtureParams(kind=mixed, noise=noise, top_k=3 + i % 8)  # type: ignore[arg-type]
            halt = HaltParams(entropy_below=1.5 if i % 2 else 0.0, entropy_patience=2)
            reasoning = {"mixture": mixture, "halt": halt}
            common |= {"mode": "distribution", "steps": 7, "reasoning": reasoning}
        elif kind == 3:
            common |= {"mode": "cot" if i != 7 else "auto", "steps": 5, "end": (12, 13)}
            until_kl = HaltParams(converge_metric="kl", converge_below=1.0, converge_patience=2)
            halt = until_kl if i == 15 else HaltParams()
            switch = SwitchParams(window=1, end_token_id=12)
            common["reasoning"] = {"switch": switch, "halt": halt}
            if i != 15:
                common["thinking"] = {"temperature": 1.1, "top_k": 40, "seed": 50 + i}
        requests.append(make_request(max_tokens=10 + i % 5, **common))  # type: ignore[arg-type]
    return requests


def summary(result: object) -> tuple[object, ...]:
    from tests.fakes import Result

    assert isinstance(result, Result)
    counts = result.counts
    return (
        result.token_ids,
        result.thinking_ids,
        result.finish_reason,
        counts.num_reasoning_steps,
        counts.num_vector_steps,
        counts.num_forced_tokens,
    )


async def test_mixed_batch_gives_each_row_what_it_gets_alone(tiny_llama: Path) -> None:
    """Rows arrive at different times; the batch holds every mode."""
    requests = mixed_requests()
    async with native_engine(tiny_llama, max_num_seqs=1) as engine:
        alone = [summary(await run(engine, request)) for request in requests]
    stats: list[StepStats] = []

    async def late(engine: object, request: Request, delay: int) -> tuple[object, ...]:
        for _ in range(delay):
            await asyncio.sleep(0)
        return summary(await run(engine, request))  # type: ignore[arg-type]

    async with native_engine(tiny_llama, stats.append, max_num_batched_tokens=24) as engine:
        order = list(range(16))
        random.Random(3).shuffle(order)
        together = await asyncio.gather(
            *(late(engine, request, 40 * order[i]) for i, request in enumerate(requests))
        )
    assert together == alone
    kinds = {frozenset(phase for _, phase in s.num_rows) for s in stats}
    assert any({"latent", "distribution", "decode"} <= kind for kind in kinds), "rows were mixed"


@pytest.mark.parametrize("has_prefix_cache", [True, False])
@pytest.mark.parametrize("num_positions", [64, 92])
async def test_preemption_changes_nothing(
    tiny_llama: Path, num_positions: int, has_prefix_cache: bool
) -> None:
    """A pool so small that rows are preempted while they think, answer and are rebuilt."""
    requests = mixed_requests()
    async with native_engine(tiny_llama) as engine:
        expected = [summary(r) for r in await run_all(engine, requests)]
    size = str(num_positions * 4 * (2 * 2 * 2 * 16 + 64))
    async with native_engine(
        tiny_llama,
        kv_cache_memory=size,
        max_model_len=60,
        max_num_batched_tokens=11,
        enable_prefix_caching=has_prefix_cache,
    ) as engine:
        results = await run_all(engine, requests)
        assert core_of(engine)._scheduler.pool.num_used == 0
    assert [summary(r) for r in results] == expected
    assert sum(r.counts.num_preemptions for r in results) > 0


async def test_prefix_cache_never_shares_thoughts(tiny_llama: Path) -> None:
    """Two prompts with the same ids but other thoughts, and one that spells out an answer."""
    base = prompt(1, 16)
    latent = make_request("a", base, mode="latent", steps=6, end=(11,), max_tokens=8)
    async with native_engine(tiny_llama) as engine:
        first = await run(engine, latent)
        spelled = make_request("b", base + tuple(first.token_ids), max_tokens=8)
        second = await run(engine, spelled)
        again = await run(engine, make_request("c", base, mode="latent", steps=6, end=(11,)))
    assert second.counts.num_cached_tokens == 16, "only the prompt's own blocks are shared"
    assert again.token_ids == first.token_ids
    expected, _ = reference(load_plain(tiny_llama), list(spelled.prompt_token_ids), 8)
    assert second.token_ids == expected


async def test_group_shares_prompt_blocks_and_each_member_is_itself(tiny_llama: Path) -> None:
    """n > 1: full blocks shared, tail copied; each choice equals the same seed alone."""
    ids = prompt(4, 18)  # 4 full blocks of 4 and a tail
    requests = [
        make_request(f"g{i}", ids, group_id="g", temperature=1.0, seed=i, max_tokens=12)
        for i in range(6)
    ]
    requests += [
        make_request(f"h{i}", ids, "latent", 4, (11,), group_id="h", temperature=1.0, seed=i)
        for i in range(3)
    ]
    stats: list[StepStats] = []
    async with native_engine(tiny_llama, stats.append, enable_prefix_caching=False) as engine:
        together = [r.token_ids for r in await run_all(engine, requests)]
        alone = [
            (await run(engine, make_request("x", ids, temperature=1.0, seed=i, max_tokens=12)))
            for i in range(6)
        ]
        assert core_of(engine)._scheduler.pool.num_used == 0
    assert together[:6] == [r.token_ids for r in alone]
    assert len({tuple(t) for t in together[:6]}) > 1
    peak = max(s.num_used_blocks for s in stats)
    assert peak < 9 * 8, "without sharing 9 rows would hold 8 blocks each"


async def test_top_k_1_distribution_equals_greedy_cot(tiny_llama: Path) -> None:
    async with native_engine(tiny_llama) as engine:
        for seed in range(8):
            ids = prompt(seed, 9)
            cot = await run(engine, make_request("c", ids, max_tokens=20))
            soft = make_request(
                "d",
                ids,
                "distribution",
                steps=12,
                max_tokens=8,
                reasoning={"mixture": MixtureParams(top_k=1)},
            )
            result = await run(engine, soft)
            assert result.thinking_ids + result.token_ids == cot.token_ids


async def test_adapter_gives_what_a_plain_loop_gives(tiny_llama: Path, tmp_path: Path) -> None:
    """CODI's projection in float32 between hidden state and input."""
    model, project = with_projection(tiny_llama, tmp_path / "codi")
    plain = load_plain(tiny_llama)
    async with native_engine(model) as engine:
        for seed in range(4):
            ids = prompt(seed, 9)
            request = make_request(
                "a", ids, "latent", 4, (11,), reasoning={"adapter": "default", "trace": "vectors"}
            )
            result = await run(engine, request)
            expected, fed = reference(
                plain, list(ids), 8, mode="latent", steps=4, end=(11,), adapter=project
            )
            assert result.token_ids == expected
            for step, (ours, theirs) in enumerate(zip(result.vectors, fed, strict=True)):
                torch.testing.assert_close(torch.tensor(ours), theirs, atol=drift(step), rtol=0)


async def test_realign_runs_on_any_model(tiny_llama: Path) -> None:
    """Built once; every fed vector is as long as an embedding is in the mean."""
    table = load_plain(tiny_llama).get_input_embeddings().weight
    request = make_request(
        "a", prompt(3, 9), "latent", 3, reasoning={"adapter": "realign", "trace": "vectors"}
    )
    async with native_engine(tiny_llama) as engine:
        first, second = await run(engine, request), await run(engine, request)
    assert first.token_ids == second.token_ids
    lengths = [torch.tensor(v).norm() for v in first.vectors]
    torch.testing.assert_close(torch.stack(lengths), table.norm(dim=1).mean().expand(3))


async def test_no_steps_equals_prompt_start_end(tiny_llama: Path) -> None:
    ids = prompt(2, 9)
    async with native_engine(tiny_llama) as engine:
        empty = await run(engine, make_request("a", (*ids, 10), "latent", 0, (11,)))
        plain = await run(engine, make_request("b", (*ids, 10, 11)))
    assert empty.token_ids == plain.token_ids
    assert empty.counts.num_forced_tokens == 1
    assert empty.counts.num_reasoning_steps == 0


@pytest.mark.parametrize("mode", readouts.MODES)
async def test_readouts_of_counted_steps_end_nothing(tiny_llama: Path, mode: str) -> None:
    """A soft step that read as the end of the text ended the whole answer, empty."""
    async with native_engine(tiny_llama) as engine:
        await readouts.check(engine, mode)


async def test_nan_ends_its_own_row_only(tiny_llama: Path) -> None:
    """A NaN in a fed vector: that row ends as numerical, its mates and later rows go on."""
    ids = prompt(6, 10)
    bad_token = 77
    async with native_engine(tiny_llama) as engine:
        mate = make_request("mate", ids, "latent", 4, (11,), max_tokens=10)
        expected = (await run(engine, mate)).token_ids
        embedding = core_of(engine)._model._model.get_input_embeddings()
        with torch.no_grad():
            embedding.weight[bad_token] = float("nan")
        poisoned = make_request("bad", (*ids[:4], bad_token, *ids[5:]), "latent", 4, (11,))
        token_row = make_request("bad2", (*ids[:4], bad_token, *ids[5:]))
        results = await run_all(engine, [poisoned, mate, token_row])
        assert results[0].stop_reason == results[2].stop_reason == "numerical"
        assert results[0].finish_reason is FinishReason.STOP
        assert results[1].token_ids == expected
        # Blocks that held NaN are handed out again.
        later = await run_all(engine, [make_request(f"l{i}", ids) for i in range(8)])
        assert len({tuple(r.token_ids) for r in later}) == 1
        assert core_of(engine)._scheduler.pool.num_used == 0


async def test_a_draw_from_logits_with_nan_ends_the_row(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad column is enough, however the token is drawn; greedy rows alone saw it once."""
    async with native_engine(tiny_llama) as engine:
        model = core_of(engine)._model
        project = model.project

        def poisoned(hidden: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = project(hidden)
            logits[:, 77] = torch.nan
            return logits

        monkeypatch.setattr(model, "project", poisoned)
        requests = [
            make_request(f"{i}", prompt(6, 10), **settings)  # type: ignore[arg-type]
            for i, settings in enumerate(
                (
                    {},
                    {"temperature": 1.0},
                    {"temperature": 1.0, "top_k": 5},
                    {"temperature": 1.0, "mode": "cot", "steps": 3},
                )
            )
        ]
        results = await run_all(engine, requests)
    assert [r.stop_reason for r in results] == ["numerical"] * 4


async def test_one_copy_a_step(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 6: a step reads the device once, whatever is in it."""
    from coconut_serve.reasoning import step as step_module

    reads: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)

        def spy(
            self: torch.Tensor, *args: object, _name: str = name, _f: object = original
        ) -> object:
            reads.append(_name)
            return _f(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(torch.Tensor, name, spy)
    run_step = step_module.ReasoningStep.run
    per_step: list[list[str]] = []

    def counted(self: object, *args: object) -> object:
        reads.clear()
        result = run_step(self, *args)  # type: ignore[arg-type]
        per_step.append(list(reads))
        return result

    monkeypatch.setattr(step_module.ReasoningStep, "run", counted)
    async with native_engine(tiny_llama) as engine:
        await run_all(engine, mixed_requests())
    # The CPU-only partial sort may look at its own result; that is no synchronisation there.
    assert per_step
    assert all(r.count("tolist") == 1 for r in per_step)
    assert {name for r in per_step for name in r} <= {"tolist", "nonzero"}


async def test_rows_of_a_class_stand_together(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members of a mode are slices of the step: no index is uploaded, nothing is gathered."""
    gathered: list[int] = []
    steps: list[list[int]] = []
    upload = slots.upload

    def note(values: list[int], device: torch.device) -> torch.Tensor:
        gathered.append(len(values))
        return upload(values, device)

    def end_step(stats: StepStats) -> None:
        if stats.num_prefill_positions == 0:
            steps.append(list(gathered))
        gathered.clear()

    monkeypatch.setattr(rows, "upload", slots.upload)  # of the rows themselves, once a step
    monkeypatch.setattr(slots, "upload", note)  # what `index_of` calls
    kinds: list[dict[str, object]] = [
        {"mode": "latent"},
        {"mode": "distribution"},
        {"mode": "cot", "temperature": 1.0},
        {"mode": "distribution", "reasoning": {"mixture": MixtureParams(kind="full")}},
    ]
    requests = [
        make_request(f"{i}", prompt(1, 6), steps=12, max_tokens=4, **kinds[i % 4])  # type: ignore[arg-type]
        for i in range(16)
    ]
    async with native_engine(tiny_llama, end_step) as engine:
        await run_all(engine, requests)
    assert len(steps) > 10
    few = len(steps) // 3  # steps in which some rows of a class end and some go on
    assert sum(map(bool, steps)) <= few, steps

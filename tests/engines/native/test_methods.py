"""Each method against a loop over one row that recomputes the whole sequence.

tests/engines/methods has the table of methods and their references. Alone, and in one batch with
all the others.
"""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from coconut_serve.params import HaltParams, MixtureParams, SwitchParams
from coconut_serve.types import FinishReason, HaltReason, Request
from tests.engines.methods import soft
from tests.engines.methods.adapters import with_adapters
from tests.engines.methods.loop import At, Fed, Parts, Told, loop
from tests.engines.methods.table import (
    END,
    FREE,
    KL,
    MARKS,
    METHODS,
    STEPS,
    SWI,
    Key,
    check,
    prompt,
    references,
    requests,
)
from tests.fakes import Result, drift, make_request, native_engine, run, run_all

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_adapters(tiny_llama, tmp_path_factory.mktemp("methods") / "model")


@pytest.fixture(scope="module")
def parts(model: Path) -> Parts:
    return Parts.load(model)


@pytest.fixture(scope="module")
def expected(parts: Parts) -> dict[Key, Told]:
    return references(parts, requests())


def test_no_row_of_the_table_is_vacuous(expected: dict[Key, Told]) -> None:
    """Each rule ends some phase early, not at once and not all alike; no two methods agree."""
    lengths = {
        name: [each for (n, _), told in expected.items() if n == name for each in told.lengths]
        for name in METHODS
    }
    for name, method in METHODS.items():
        steps = method.settings.get("steps", STEPS)
        if method.halts:
            assert [each for each in lengths[name] if 0 < each < steps], name
            assert len(set(lengths[name])) > 1, name
        else:
            assert set(lengths[name]) <= {steps}, name
    assert len(lengths["switch"]) > 2, "a row with two blocks"
    spent = [told.texts for (name, _), told in expected.items() if name == "swi-budget"]
    assert max(texts.count(MARKS[1]) for texts in spent) == 2, "after </think> was said twice"
    told = Counter(
        str([(t.texts, t.answer, t.fed[:1]) for (n, _), t in expected.items() if n == name])
        for name in METHODS
    )
    assert len(told) == len(METHODS) - 1, "only no-switch is l2 again"


def measures(result: Result) -> list[list[float]]:
    """Each step's trace but its vector; what tells of a vector is 0 where a token was fed."""
    found = []
    for output in result.outputs:
        if output.trace is not None:
            trace = output.trace
            if not output.is_vector:
                assert (trace.norm, trace.cosine) == (0.0, 0.0)
            of_vector = [trace.norm, trace.cosine, trace.retained_mass]
            found.append([trace.entropy, trace.max_prob, *of_vector])
    return found


@pytest.mark.parametrize("has_prefix_cache", [True, False])
async def test_methods_equal_their_plain_loops(
    model: Path, parts: Parts, has_prefix_cache: bool
) -> None:
    """Alone, and all in one batch; tokens, and what was fed."""
    asked = requests()
    async with native_engine(model, enable_prefix_caching=has_prefix_cache) as engine:
        alone = [await run(engine, request) for request in asked.values()]
        check(asked, alone, parts)
        together = await run_all(engine, list(asked.values()))
        check(asked, together, parts)
    for one, other in zip(alone, together, strict=True):
        for step, (ours, theirs) in enumerate(zip(measures(one), measures(other), strict=True)):
            assert ours == pytest.approx(theirs, abs=drift(step))
    cached = {
        name for (name, _), r in zip(asked, together, strict=True) if r.counts.num_cached_tokens
    }
    assert cached == (set(METHODS) if has_prefix_cache else set())
    for name, method in METHODS.items():
        if method.settings["mode"] == "auto" and not name.startswith("no-switch"):
            rows = [r.counts for (n, _), r in zip(asked, alone, strict=True) if n == name]
            assert any(c.num_switches and c.num_vector_steps < c.num_reasoning_steps for c in rows)


@pytest.mark.parametrize("has_prefix_cache", [True, False])
async def test_preemption_changes_no_method(
    model: Path, parts: Parts, has_prefix_cache: bool
) -> None:
    """Pools so small that rows of every method are preempted, and rebuilt in chunks.

    The newest rows are preempted, so those that never were come last.
    """
    preempted: set[str] = set()
    for seed, num_positions in enumerate((64, 92, 128) * 4):
        if preempted == set(METHODS):
            break
        asked = requests()
        keys = random.Random(seed).sample(list(asked), len(asked))
        keys.sort(key=lambda key: key[0] not in preempted)
        shuffled = {key: asked[key] for key in keys}
        async with native_engine(
            model,
            kv_cache_memory=str(num_positions * 4 * (2 * 2 * 2 * 16 + 64)),
            max_model_len=60,
            max_num_batched_tokens=16,
            enable_prefix_caching=has_prefix_cache,
        ) as engine:
            results = await run_all(engine, list(shuffled.values()))
        hit = {k: r for k, r in zip(keys, results, strict=True) if r.counts.num_preemptions}
        new = {key: result for key, result in hit.items() if key[0] not in preempted}
        check({key: asked[key] for key in new}, list(new.values()), parts)
        preempted |= {name for name, _ in hit}
    assert preempted == set(METHODS)


async def test_skipped_positions_count_towards_the_context(tiny_llama: Path) -> None:
    """7 prompt, 40 thinking and 1 end position leave 12, and the last token takes none."""
    padded = {"halt": HaltParams(**KL), "pad_positions": True}
    asked = make_request("a", prompt(0), "cot", 40, END, max_tokens=40, reasoning=padded)
    async with native_engine(tiny_llama, max_model_len=60) as engine:
        result = await run(engine, asked)
    assert result.counts.num_reasoning_steps < 40
    assert (len(result.token_ids), result.finish_reason) == (13, FinishReason.LENGTH)


async def test_swi_counts_its_switches_and_ends_at_the_bound(tiny_llama: Path) -> None:
    """As many as the state machine of the reference; the phase ends behind the last."""
    common: dict[str, Any] = {"prompt": prompt(1), "mode": "auto", "steps": STEPS, "max_tokens": 9}

    def ask(name: str, end: tuple[int, ...] = END, **switch: Any) -> Request:
        params = {"switch": SwitchParams(**(SWI | {"window": 0} | switch))}
        return make_request(name, end=end, reasoning=params, **common)

    machine, hard = soft.Swi(0, MARKS, (), STEPS), []

    def watch(at: At) -> Fed:
        was_soft, fed = machine.soft, machine(at)
        hard.append(was_soft and not machine.soft)
        return fed

    loop(Parts.load(tiny_llama), ask("r"), watch, soft.greedy)
    assert machine.switches >= 3, "another seed"
    async with native_engine(tiny_llama) as engine:
        free = await run(engine, ask("a"))
        bare: dict[str, Any] = {"end_token_id": -1}  # without </think> a spent budget ends at once
        bound = await run(engine, ask("b", max_switches=1, **bare))
        answers = [
            await run(engine, ask(f"c{most}{end}", end, max_switches=most, answer_tokens=2, **bare))
            for most, end in ((1, END), (1, ()), (99, END))
        ]
    assert free.counts.num_switches == machine.switches
    assert [len(answer.token_ids) for answer in answers] == [2, 2, 9]
    assert {answer.finish_reason for answer in answers} == {FinishReason.LENGTH}
    assert answers[0].token_ids == bound.token_ids[:2]
    halts = [o.halt_reason for o in bound.outputs if o.halt_reason]
    assert halts == [HaltReason.SWITCHES]
    assert bound.counts.num_switches == 1, "the switch is made, the step after it ends the phase"
    assert bound.counts.num_reasoning_steps == hard.index(True) + 1


async def test_moi_with_a_large_beta_is_ordinary_sampling(tiny_llama: Path) -> None:
    """Oracle 4: with beta to infinity the sample alone is fed."""
    ids = prompt(2)
    drawn: dict[str, Any] = {"temperature": 0.8, "seed": 3}
    large = {"mixture": MixtureParams(**FREE, kind="moi", top_k=20, moi_beta=1e6)}
    async with native_engine(tiny_llama) as engine:
        asked = make_request("a", ids, "distribution", 10, max_tokens=5, reasoning=large, **drawn)
        mixed = await run(engine, asked)
        plain = await run(engine, make_request("b", ids, max_tokens=15, **drawn))
    assert mixed.thinking_ids + mixed.token_ids == plain.token_ids


async def test_moi_of_a_certain_distribution_feeds_the_token(tiny_llama: Path) -> None:
    """Oracle 4: where the entropy is 0, so is the share of the distribution, for any beta."""
    certain = MixtureParams(**FREE, kind="moi", top_k=20, moi_beta=0.5)
    reasoning = {"mixture": certain, "trace": "vectors"}
    table = Parts.load(tiny_llama).table
    bias: Any = {"logit_bias": ((9, 100.0),)}
    asked = make_request("a", prompt(1), "distribution", 4, reasoning=reasoning, **bias)
    async with native_engine(tiny_llama) as engine:
        result = await run(engine, asked)
    assert torch.equal(torch.tensor(result.vectors), table[[9] * 4])

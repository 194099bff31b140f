"""Converted checkpoints through the native engine, against a loop over the original's modules.

The loop recomputes the whole sequence at each position, greedily, with LoRA unmerged and the
adapter as its authors build it; where a method draws, its deterministic part is taken (CoLaR: the
mean; adaLR and stop tokens: the likelier choice).
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coconut_serve.checkpoint.manifest import Manifest, load_manifest
from coconut_serve.cli import main
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.service.model import ModelReasoning
from coconut_serve.service.reasoning import Resolved, resolve
from coconut_serve.types import Request
from tests.convert.builders import VOCAB, Case
from tests.convert.layouts_halting import BUILDERS, adaptive, later, plain, switch
from tests.convert.originals import ThinkingResidual
from tests.convert.reference_loop import MAX_TOKENS, Run, original
from tests.fakes import Result, make_request, native_engine, run_all

pytestmark = pytest.mark.torch

PROMPTS = [(5, 6, 7, 8, 9), (11, 3, 30), (9, 22, 17, 4, 12, 13, 39, 8)]


def resolved(manifest: Manifest, mode: str, **asked: Any) -> Resolved:
    """What the service makes of a request, with the deterministic part of what draws."""
    model = ModelReasoning.read(
        manifest, None, engine_modes=mode_names(), allowed_modes=None, default_mode=None,
        max_model_len=100, adapters=("default",),
    )  # fmt: skip
    calm = {"latent_temperature": 0, "halt.sample": False, "halt.stop_test": "argmax"}
    return resolve(
        mode, {"trace": "vectors", **calm, **asked}, model, effort=None,
        trace_bounds=("none", "vectors"),
        num_prompt_tokens=8, max_tokens=MAX_TOKENS,
    )  # fmt: skip


def convert(case: Case, target: Path) -> Manifest:
    assert main([*case.command, str(target)]) == 0
    manifest = load_manifest(target)
    assert manifest is not None
    return manifest


def request_for(
    manifest: Manifest, prompt: tuple[int, ...], steps: int, number: int, mode: str = "latent"
) -> Request:
    found = resolved(manifest, mode, steps=steps)
    request = make_request(
        request_id=f"r{number}",
        prompt=(*prompt, *found.suffix_ids),
        max_tokens=MAX_TOKENS,
        banned_token_ids=tuple(manifest.tokens.never_emit) if mode == "latent" else (),
    )
    return dataclasses.replace(request, reasoning=found.params)


async def serve(target: Path, requests: list[Request]) -> list[Result]:
    async with native_engine(target) as engine:
        return await run_all(engine, requests)


def compare(result: Result, expected: Run) -> None:
    assert result.token_ids == expected.answer
    assert len(result.vectors) == len(expected.fed)
    for vector, fed in zip(result.vectors, expected.fed, strict=True):
        assert vector is not None
        torch.testing.assert_close(torch.tensor(vector), fed, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "coconut", "coconut-pause", "simcot-coconut", "superposition", "latent-tts-coconut",
        "codi", "codi-no-norm", "codi-peft", "simcot-codi", "latent-tts-codi",
    ],
)  # fmt: skip
async def test_fixed_steps_equal_the_original(name: str, tmp_path: Path) -> None:
    """Three prompts at once; superposition takes another count for each, as its users do."""
    case = BUILDERS[name](tmp_path)
    manifest = convert(case, tmp_path / "out")
    counts = [2, 3, 4] if manifest.variable_steps else [manifest.steps] * 3
    start, end = manifest.start_token_ids, manifest.end_token_ids
    banned = tuple(manifest.tokens.never_emit)
    pairs = list(zip(PROMPTS, counts, strict=True))
    requests = [request_for(manifest, p, n, i) for i, (p, n) in enumerate(pairs)]
    results = await serve(tmp_path / "out", requests)
    for (prompt, count), result in zip(pairs, results, strict=True):
        compare(result, original(case, (*prompt, *start), count, end=end, banned=banned))


def first_at(run: Run, step: int) -> int:
    """A token that is likeliest at this step and at none before: it makes a stop token."""
    found = [int(logits.argmax()) for logits in run.logits]
    late = [i for i in range(step, len(found)) if found[i] not in found[:i]]
    assert late, "no step has a new likeliest token: another seed"
    return found[late[0]]


@pytest.mark.parametrize("name", ["later", "colar", "latent-tts-colar"])
async def test_stop_token_ends_the_phase_like_the_original(name: str, tmp_path: Path) -> None:
    """LaTER tests before it feeds; CoLaR feeds one latent before the first test."""
    case = BUILDERS[name](tmp_path)
    first, prompt = (0 if name == "later" else 1), PROMPTS[0]
    start = (120,) if name == "later" else ()  # <latent_think>; CoLaR's ### is text
    stop_id = first_at(original(case, (*prompt, *start), 12), 2)
    flags = {"later": f"--token=</latent_think>={stop_id}", "colar": f"--token=###={stop_id}"}
    if name in flags:
        case.flags = (*case.flags, flags[name])
    else:
        file = case.source / "config.json"
        text = file.read_text().replace('"latent_end_id": 126', f'"latent_end_id": {stop_id}')
        file.write_text(text)
    manifest = convert(case, tmp_path / "out")
    assert manifest.halting.token_ids == [stop_id]
    expected = original(
        case,
        (*prompt, *start),
        20,
        end=manifest.end_token_ids,
        banned=tuple(manifest.tokens.never_emit),
        stop=lambda step, logits: step >= first and int(logits.argmax()) == stop_id,
        keeps_last=name == "later",
    )
    assert 0 < len(expected.fed) < 20, "it stops by itself"
    [result] = await serve(tmp_path / "out", [request_for(manifest, prompt, 20, 0)])
    compare(result, expected)


@pytest.mark.parametrize("mode", [None, "linear", "linear_ln", "MLP"])
async def test_adalr_stops_when_its_row_wins(mode: str | None, tmp_path: Path) -> None:
    """The rows are chosen so that STOP first wins after some latents of the first prompt."""
    prompt, start = PROMPTS[0], 120
    trial = original(adaptive(tmp_path / "trial", mode), (*prompt, start), 8)
    rows = [
        (c, s)
        for c in range(100, 119)
        for s in range(60, 99)
        if all(x[c] > x[s] for x in trial.logits[:3]) and trial.logits[3][s] > trial.logits[3][c]
    ]
    assert rows, "no pair of rows stops at step 3: another seed"
    go, halt = rows[0]
    case = adaptive(tmp_path, mode, continue_token_id=go, stop_token_id=halt)
    manifest = convert(case, tmp_path / "out")
    expected = original(
        case,
        (*prompt, start),
        20,
        end=manifest.end_token_ids,
        banned=tuple(manifest.tokens.never_emit),
        stop=lambda step, logits: bool(logits[halt] > logits[go]),
        end_adds_latent=True,
    )
    assert len(expected.fed) == 3
    [result] = await serve(tmp_path / "out", [request_for(manifest, prompt, 20, 0)])
    compare(result, expected)


async def test_switch_opens_and_closes_its_block(tmp_path: Path) -> None:
    """The model's first greedy token is made `<swi>`; what closes the block is found likewise."""
    case, prompt = switch(tmp_path), PROMPTS[0]
    opens = original(case, prompt, 0, max_tokens=1).answer[0]
    closes = first_at(original(case, (*prompt, opens), 12), 2)
    assert closes != opens
    case.flags = (f"--token=<swi>={opens}", f"--token=</swi>={closes}")
    manifest = convert(case, tmp_path / "out")
    expected = original(
        case,
        (*prompt, opens),
        20,
        end=(closes,),
        stop=lambda step, logits: int(logits.argmax()) == closes,
    )
    assert not {opens, closes} & set(expected.answer[:1]), "no second block at once"
    # The block is sampled into: the prompt has no start token.
    assert manifest.start_token_ids == ()
    [result] = await serve(tmp_path / "out", [request_for(manifest, prompt, 20, 0)])
    shown = [t for t in result.token_ids if t not in (opens, closes)]
    first = list(itertools.takewhile(lambda t: t not in (opens, closes), expected.answer))
    assert shown[: len(first)] == first[: len(shown)]
    for vector, fed in zip(result.vectors[: len(expected.fed)], expected.fed, strict=True):
        assert vector is not None
        torch.testing.assert_close(torch.tensor(vector), fed, atol=1e-4, rtol=1e-4)


def top_of_raw_logits(count: int) -> Callable[[Tensor, Any], Tensor]:
    """Latent-SFT: softmax over the largest raw logits, their embeddings' mean."""

    def mix(logits: Tensor, embed: Any) -> Tensor:
        top = logits.topk(count)
        mixed: Tensor = top.values.softmax(-1) @ embed.weight[top.indices]
        return mixed

    return mix


async def test_latent_sft_mixes_the_largest_logits(tmp_path: Path) -> None:
    case = plain(tmp_path, "latent_sft", 10)
    manifest = convert(case, tmp_path / "out")
    request = request_for(manifest, PROMPTS[0], 5, 0, "distribution")
    end = request.reasoning.end_token_ids
    assert end, "</think>"
    expected = original(case, PROMPTS[0], 5, mix=top_of_raw_logits(10), end=end)
    [result] = await serve(tmp_path / "out", [request])
    compare(result, expected)


async def test_hrpo_gates_token_and_mixture(tmp_path: Path) -> None:
    """p E / |p| through the gate, p at temperature 0.5, the token greedy."""
    case = BUILDERS["hrpo"](tmp_path)
    manifest = convert(case, tmp_path / "out")
    gate: Any = case.adapter
    assert isinstance(gate, ThinkingResidual)

    def mix(logits: Tensor, embed: Any) -> Tensor:
        p = (logits / 0.5).softmax(-1)
        soft = p @ embed.weight / p.norm()
        mixed: Tensor = gate(embed(logits.argmax()), soft)
        return mixed

    steps = 5
    expected = original(case, PROMPTS[0], steps, mix=mix)
    assert 99 not in [int(logits.argmax()) for logits in expected.logits], "#### comes later"
    request = request_for(manifest, PROMPTS[0], steps, 0, "distribution")
    [result] = await serve(tmp_path / "out", [request])
    compare(result, expected)


def test_reference_loop_reads_the_vocabulary_it_was_given(tmp_path: Path) -> None:
    """The loop itself: steps, end tokens, banned ids."""
    case = later(tmp_path)
    run = original(case, PROMPTS[0], 3, end=(121, 122), banned=(1, 2))
    assert len(run.fed) == 3
    assert len(run.answer) == MAX_TOKENS
    assert not {1, 2} & set(run.answer)
    assert max(run.answer) < VOCAB

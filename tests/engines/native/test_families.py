"""Every family the native engine claims equals transformers' own code, in all modes at once."""

import asyncio
from pathlib import Path

import pytest
import torch

from coconut_serve.errors import StartupError
from tests.fakes import make_request, native_engine, run_all
from tests.models import FAMILIES, generate, load_plain, reference, save_tiny

pytestmark = pytest.mark.torch

PROMPTS = [
    [int(i) for i in torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n))]
    for n in (5, 9, 14, 21)
]


@pytest.mark.parametrize("family", FAMILIES)
async def test_family_equals_plain_loop_in_all_modes_in_one_batch(
    family: str, tmp_path: Path
) -> None:
    """Chunked prefill, window, soft-caps, scales, tied weights, MoE: nothing changes a token."""
    directory = save_tiny(family, tmp_path)
    plain = load_plain(directory)
    settings = [
        {"mode": "none"},
        {"mode": "latent", "steps": 4, "end": (11,)},
        {"mode": "distribution", "steps": 5},
        {"mode": "latent", "steps": 2},
    ]
    requests = [
        make_request(f"{i}", tuple(prompt), max_tokens=12, **setting)  # type: ignore[arg-type]
        for i, (prompt, setting) in enumerate(zip(PROMPTS, settings, strict=True))
    ]
    async with native_engine(directory, max_num_batched_tokens=16) as engine:
        results = await run_all(engine, requests)
    for prompt, setting, result in zip(PROMPTS, settings, results, strict=True):
        expected, _ = reference(plain, prompt, 12, **setting)  # type: ignore[arg-type]
        assert result.token_ids == expected, setting


@pytest.mark.parametrize("family", FAMILIES)
async def test_cot_equals_transformers_generate(family: str, tmp_path: Path) -> None:
    directory = save_tiny(family, tmp_path)
    plain = load_plain(directory)
    requests = [make_request(f"{i}", tuple(p), max_tokens=16) for i, p in enumerate(PROMPTS)]
    async with native_engine(directory) as engine:
        results = await run_all(engine, requests)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == generate(plain, prompt, 16)


@pytest.mark.parametrize("family", ["bloom", "gptj"])
async def test_model_with_other_attention_is_refused_at_load(family: str, tmp_path: Path) -> None:
    """BLOOM's ALiBi runs without an error and is silently wrong; the self-test must see it."""
    overrides = {} if family == "bloom" else {"rotary_dim": 8, "n_embd": 64, "n_layer": 2}
    if family == "gptj":
        overrides |= {"n_head": 4, "n_positions": 256}
    directory = save_tiny(family, tmp_path, **overrides)
    with pytest.raises(StartupError, match="native engine cannot run"):
        async with native_engine(directory):
            await asyncio.sleep(0)

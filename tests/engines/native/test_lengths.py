"""Models whose arithmetic depends on the length of a sequence."""

import random
from pathlib import Path
from typing import Any

import pytest

from coconut_serve.errors import StartupError
from tests.fakes import core_of, make_request, native_engine, run, run_all
from tests.models import generate, load_plain, reference, save_tiny

pytestmark = pytest.mark.torch

ORIGINAL = 48
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
}


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": ORIGINAL}
    return save_tiny("phi3", tmp_path_factory.mktemp("phi"), num_key_value_heads=4, **settings)


def prompt(length: int) -> tuple[int, ...]:
    generator = random.Random(length)
    return tuple(generator.randrange(3, 128) for _ in range(length))


# (prompt length, what else): short, long, growing past the bound in tokens and in latents.
ROWS: list[tuple[int, dict[str, Any]]] = [
    (20, {}),
    (90, {}),
    (ORIGINAL - 6, {}),
    (ORIGINAL - 4, {"mode": "latent", "steps": 9, "end": (11,)}),
    (ORIGINAL, {}),
    (ORIGINAL + 1, {}),
    (70, {"mode": "latent", "steps": 3, "end": (11,)}),
]


@pytest.mark.parametrize(
    "situation",
    [
        {},
        {"max_num_batched_tokens": 32},
        {"max_num_seqs": 1},
        {"enable_prefix_caching": False},
        {"kv_cache_memory": str(60 * 4 * 4 * (2 * 2 * 4 * 16 + 64))},
    ],
)
async def test_longrope_is_by_sequence(phi: Path, situation: dict[str, Any]) -> None:
    """A row's factors were those of the longest row of its step, and of its own step alone."""
    plain = load_plain(phi)
    requests = [
        make_request(f"{i}", prompt(length), max_tokens=16, **more)
        for i, (length, more) in enumerate(ROWS)
    ]
    async with native_engine(phi, max_model_len=120, **situation) as engine:
        results = [await run(engine, requests[0]), await run(engine, requests[2])]
        results += await run_all(engine, requests)
        assert core_of(engine)._scheduler.pool.num_used == 0
    expected = [reference(plain, list(prompt(length)), 16, **more)[0] for length, more in ROWS]
    assert [r.token_ids for r in results] == [expected[0], expected[2], *expected]
    assert results[3].token_ids == generate(plain, list(prompt(90)), 16)


async def test_blocks_of_short_prompts_are_not_those_of_long_ones(phi: Path) -> None:
    """The same first ids, computed with other factors."""
    long, short = prompt(90), prompt(90)[:40]
    plain = load_plain(phi)
    async with native_engine(phi, max_model_len=120) as engine:
        for ids in (short, long, short, long):
            result = await run(engine, make_request("r", ids))
            assert result.token_ids == reference(plain, list(ids), 8)[0]
        cached = (await run(engine, make_request("r", long))).counts.num_cached_tokens
        assert cached == 88


async def test_dynamic_factors_are_constant_up_to_the_model_s_length(tmp_path: Path) -> None:
    """And longer sequences are refused, since there each position would change all of them."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = save_tiny("llama", tmp_path, max_position_embeddings=96, rope_parameters=rope)
    plain = load_plain(model)
    async with native_engine(model, max_model_len=96) as engine:
        asked = [make_request(f"{n}", prompt(n)) for n in (10, 88)]
        for request, result in zip(asked, await run_all(engine, asked), strict=True):
            assert result.token_ids == reference(plain, list(request.prompt_token_ids), 8)[0]
    with pytest.raises(StartupError, match="more than the model's 96"):
        async with native_engine(model, max_model_len=97):
            pass


@pytest.mark.parametrize("family", ["mistral-window", "gemma2", "gemma3", "qwen2-window"])
async def test_windows_longer_than_the_self_test_are_tested(family: str, tmp_path: Path) -> None:
    """It reaches past every window, since it makes them shorter than its prompt."""
    model = save_tiny(family, tmp_path, sliding_window=30)
    plain = load_plain(model)
    async with native_engine(model) as engine:
        result = await run(engine, make_request("r", prompt(60)))
    assert result.token_ids == reference(plain, list(prompt(60)), 8)[0]


async def test_chunked_attention_is_refused(tmp_path: Path) -> None:
    """By name; it was a traceback."""
    settings = {"attention_chunk_size": 64, "num_local_experts": 1, "intermediate_size_mlp": 96}
    model = save_tiny("llama4_text", tmp_path, **settings)
    with pytest.raises(StartupError, match="cannot run"):
        async with native_engine(model):
            pass

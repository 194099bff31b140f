"""Soft tokens against a reading of the paper for one row at a time."""

import pytest
import torch

from coconut_serve.reasoning import mixing
from tests.models import soft_token

pytestmark = pytest.mark.torch

TABLE = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))


def embed(ids: torch.Tensor) -> torch.Tensor:
    return TABLE[ids]


def mix(logits: torch.Tensor, settings: list[dict[str, float]], width: int = 64) -> torch.Tensor:
    """Mix rows with a setting each, as the mode does without noise."""

    def column(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([s[name] for s in settings], dtype=dtype)

    temperature = column("temperature")
    weights, ids = mixing.filter_candidates(
        logits,
        temperature=temperature,
        total=mixing.total_weight(logits, temperature),
        filter_top_k=column("filter_top_k", torch.int64),
        top_p=column("top_p"),
        min_p=column("min_p"),
        width=width,
    )
    weights = mixing.keep_first(weights, column("top_k", torch.int64))
    return mixing.mix_embeddings(weights, ids, embed)


def test_mixture_equals_the_plain_reading_for_all_filters() -> None:
    generator = torch.Generator().manual_seed(5)
    settings = [
        {"top_k": k, "temperature": t, "top_p": p, "filter_top_k": f, "min_p": m}
        for k in (1, 3, 10, 64)
        for t in (0.3, 1.0)
        for p in (0.5, 0.95, 1.0)
        for f in (0, 5, 30)
        for m in (0.0, 0.1)
    ]
    logits = torch.randn(len(settings), 200, generator=generator) * 3
    mixed = mix(logits, settings)
    for row, setting in enumerate(settings):
        plain = {**setting, "filter_top_k": int(setting["filter_top_k"]) or 200}
        expected = soft_token(logits[row], embed, **plain)  # type: ignore[arg-type]
        torch.testing.assert_close(mixed[row], expected, atol=1e-5, rtol=1e-4)
    narrow = [i for i, setting in enumerate(settings) if setting["filter_top_k"]]
    again = mix(logits[narrow], [settings[i] for i in narrow], width=32)
    torch.testing.assert_close(again, mixed[narrow], atol=1e-5, rtol=1e-4)


def test_one_token_is_fed_exactly() -> None:
    logits = torch.randn(1, 200)
    setting = {"top_k": 1, "temperature": 0.6, "top_p": 0.95, "filter_top_k": 30, "min_p": 0.0}
    assert torch.equal(mix(logits, [setting])[0], TABLE[int(logits.argmax())])


@pytest.mark.parametrize("size", [100, 8256, 8300, 50_257])
def test_top_by_chunks_is_the_top(size: int) -> None:
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    logits[1, 100:] = -torch.inf
    values, ids = mixing._top(logits, 64)
    expected = logits.topk(64, dim=-1)
    assert torch.equal(values, expected.values)
    finite = expected.values.isfinite()
    assert torch.equal(ids[finite], expected.indices[finite])


def test_entropy_of_known_distributions() -> None:
    uniform = torch.zeros(1, 8).log_softmax(-1)
    certain = torch.tensor([[0.0, -torch.inf, -torch.inf]]).log_softmax(-1)
    assert float(mixing.entropy(uniform)) == pytest.approx(2.0794415)
    assert float(mixing.entropy(certain)) == 0.0


def test_gumbel_weights_pick_tokens_by_their_probability() -> None:
    """At a low temperature the heaviest weight is a draw from p (Gumbel-max); 20,000 draws."""
    from coconut_serve.reasoning import noise

    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    seed = torch.arange(20_000)
    u = noise.uniform(seed, torch.zeros_like(seed), noise.GUMBEL_STREAM, torch.arange(4)[None])
    free = torch.tensor([[-torch.inf, torch.inf]]).expand(20_000, -1)
    temperature = torch.full((20_000,), 0.5)
    weights = mixing.gumbel_weights(p.expand(20_000, -1), temperature, u, free)
    assert torch.allclose(weights.sum(-1), torch.ones(20_000))
    assert bool((weights[:, 3] == 0).all())
    share = torch.bincount(weights.argmax(-1), minlength=4) / 20_000
    assert share.tolist() == pytest.approx(p.tolist(), abs=0.02)  # above 5 standard errors


def test_dirichlet_weights_have_mean_p_and_the_right_spread() -> None:
    """Var = p (1 - p) / (alpha + 1); 20,000 draws, bounds above 6 standard errors."""
    p = torch.tensor([0.6, 0.3, 0.1, 0.0])
    seed = torch.arange(20_000)
    alpha = torch.full((20_000,), 4.0)
    ids = torch.arange(4).expand(20_000, -1)
    rows = p.expand(20_000, -1)
    drawn = mixing.dirichlet_weights(rows, ids, alpha, seed, torch.zeros_like(seed))
    assert torch.allclose(drawn.sum(-1), torch.ones(20_000), atol=1e-5)
    assert drawn.mean(0).tolist() == pytest.approx(p.tolist(), abs=0.012)
    expected = [x * (1 - x) / 5 for x in p.tolist()]
    assert drawn.var(0).tolist() == pytest.approx(expected, abs=0.004)

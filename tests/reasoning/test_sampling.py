"""Sampling draws from the right distribution, row by row."""

import pytest
import torch

from coconut_serve.params import SamplingParams
from coconut_serve.reasoning import noise
from coconut_serve.reasoning.sampling import AnswerSampler
from coconut_serve.reasoning.settings import Admission
from coconut_serve.reasoning.slots import Slots

pytestmark = pytest.mark.torch

VOCAB = 1000
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2


def make_sampler(num_slots: int, params: list[SamplingParams]) -> tuple[AnswerSampler, Slots]:
    slots = Slots(num_slots, 4, dtype=torch.float32, device=torch.device("cpu"))
    sampler = AnswerSampler(slots, VOCAB)
    for slot, p in enumerate(params):
        sampler.admit([Admission(slot=slot, sampling=p, prompt_token_ids=(1, 2, 3))])
    return sampler, slots


def draw_many(params: SamplingParams, count: int = 4000) -> torch.Tensor:
    """Draw with `count` different seeds; the frequencies, [VOCAB]."""
    from dataclasses import replace

    many = [replace(params, seed=i) for i in range(count)]
    sampler, _ = make_sampler(count, many)
    drawn, _ = sampler.sample(LOGITS.expand(count, -1), torch.arange(count), tuple(range(count)))
    return torch.bincount(drawn, minlength=VOCAB).float() / count


def filtered(params: SamplingParams) -> torch.Tensor:
    """The distribution that a plain reading of the definitions gives."""
    p = (LOGITS / params.temperature).softmax(-1)
    order = p.argsort(descending=True)
    if params.top_k:
        p[order[params.top_k :]] = 0
    p = p / p.sum()
    mass = 0.0
    for i in order.tolist():
        if mass >= params.top_p:
            p[i] = 0
        mass += float(p[i])
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(top_p=0.7),
        SamplingParams(top_k=7),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=1.7, top_k=50, top_p=0.8, min_p=0.05),
        SamplingParams(temperature=2.0, top_p=0.999),
    ],
)
def test_frequencies_match_the_definition(params: SamplingParams) -> None:
    """Total variation over 4,000 draws; by McDiarmid a right sampler fails with p < 1e-6."""
    expected = filtered(params)
    seen = draw_many(params)
    assert bool((seen[expected == 0] == 0).all()), "a filtered token was drawn"
    num_kept = int((expected > 0).sum())
    bound = 0.5 * (num_kept / 4000) ** 0.5 + (14 / (2 * 4000)) ** 0.5
    assert float((seen - expected).abs().sum()) / 2 < bound


def test_row_does_not_depend_on_its_mates() -> None:
    params = [
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.9),
        SamplingParams(seed=3, top_p=0.9999, temperature=2.0),
        SamplingParams(temperature=0.0),
        SamplingParams(seed=5, top_k=3),
    ]
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(2))
    sampler, _ = make_sampler(5, params)
    together, _ = sampler.sample(logits, torch.arange(5), tuple(range(5)))
    for i in range(5):
        alone, _ = sampler.sample(logits[i : i + 1], torch.tensor([i]), (i,))
        assert int(alone) == int(together[i])


def test_extreme_settings_take_the_likeliest_token() -> None:
    """Tiny temperatures and top_p overflowed or kept nothing, and drew garbage."""
    params = [
        SamplingParams(temperature=1e-40),
        SamplingParams(temperature=1e-40, top_k=5),
        SamplingParams(top_p=1e-46),
        SamplingParams(top_p=1e-46, temperature=2.0),
    ]
    sampler, _ = make_sampler(4, params)
    drawn, _ = sampler.sample(LOGITS.expand(4, -1), torch.arange(4), tuple(range(4)))
    assert drawn.tolist() == [int(LOGITS.argmax())] * 4


def test_draw_does_not_change_when_two_tokens_swap_ranks() -> None:
    """Rounding swaps ranks of near-equal tokens; the noise belongs to the token."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 20] = 9.0, 9.0 + 1e-6
    swapped = logits.clone()
    swapped[0, 10], swapped[0, 20] = 9.0 + 1e-6, 9.0
    for seed in range(50):
        sampler, _ = make_sampler(1, [SamplingParams(seed=seed, top_k=2)])
        rows = (torch.tensor([0]), (0,))
        assert int(sampler.sample(logits, *rows)[0]) == int(sampler.sample(swapped, *rows)[0])


def test_rounding_at_a_bound_hardly_ever_changes_a_draw() -> None:
    """A token that crosses top_p or min_p shifted every draw from a flat distribution."""
    count = 400
    params = [SamplingParams(seed=i, top_p=0.8, min_p=0.1, temperature=1.5) for i in range(count)]
    generator = torch.Generator().manual_seed(4)
    flat = torch.randn(count, VOCAB, generator=generator) * 0.3
    rounded = flat + 1e-4 * torch.randn(flat.shape, generator=generator)
    rows = (torch.arange(count), tuple(range(count)))
    sampler, _ = make_sampler(count, params)
    assert int((sampler.sample(flat, *rows)[0] != sampler.sample(rounded, *rows)[0]).sum()) <= 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_draws_from_logits_that_are_no_numbers_are_told(value: float) -> None:
    """One bad column, and for -inf all of them; drawn rows once gave token 0."""
    params = [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=5)]
    sampler, _ = make_sampler(6, params * 2)
    logits = LOGITS.repeat(6, 1)
    logits[:3, slice(None) if value < 0 else 77] = value
    _, is_bad = sampler.sample(logits, torch.arange(6), tuple(range(6)))
    assert is_bad.tolist() == [True] * 3 + [False] * 3


def test_large_vocabulary_partial_sort_equals_full_sort() -> None:
    """Beyond 512 candidates the CPU takes a partial sort where it is enough."""
    flat = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3)) * 0.01
    params = [SamplingParams(seed=i, top_p=0.9) for i in range(4)]
    sampler, slots = make_sampler(4, params)
    rows = torch.arange(4)
    drawn, _ = sampler.sample(flat, rows, tuple(range(4)))
    p, ids = flat.softmax(-1).sort(dim=-1, descending=True, stable=True)
    assert drawn.tolist() == sampler._draw_sorted(p, ids, rows).tolist()
    assert slots.num_decisions.sum() == 0


def test_penalties_are_those_of_the_papers() -> None:
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.3
    )
    sampler, _ = make_sampler(2, [params, SamplingParams(temperature=0.0)])
    rows = torch.tensor([0, 1])
    sampler.count(rows, (0, 1), torch.tensor([10, 10]))
    sampler.count(rows, (0, 1), torch.tensor([10, -1]))
    logits = torch.ones(2, VOCAB)
    logits[:, 2] = -1.0
    out = sampler.adjust(logits, rows, (0, 1))
    assert out[0, 10] == pytest.approx(1 / 1.5 - 2 * 0.3 - 0.7)
    assert out[0, 1] == pytest.approx(1 / 1.5), "repetition counts the prompt"
    assert out[0, 2] == pytest.approx(-1.5), "negative logits are multiplied"
    assert out[0, 500] == 1.0
    assert torch.equal(out[1], logits[1]), "a row without penalties is untouched"


def test_penalties_count_beyond_32767() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.001)
    sampler, _ = make_sampler(1, [params])
    rows = torch.tensor([0])
    sampler.count(rows, (0,), torch.tensor([10]))
    assert sampler._counts is not None
    sampler._counts[0, 10] = 32_767
    sampler.count(rows, (0,), torch.tensor([10]))
    out = sampler.adjust(torch.zeros(1, VOCAB), rows, (0,))
    assert out[0, 10] == pytest.approx(-1.0 - 32.768, rel=1e-5)


def test_bias_bans_and_min_tokens() -> None:
    params = SamplingParams(
        temperature=0.0,
        max_tokens=9,
        min_tokens=2,
        logit_bias=((7, 5.0),),
        banned_token_ids=(8,),
        stop_token_ids=frozenset([9]),
    )
    sampler, slots = make_sampler(1, [params])
    logits = torch.zeros(1, VOCAB)
    slots.num_output_tokens[0] = 1
    early = sampler.adjust(logits, torch.tensor([0]), (0,))
    slots.num_output_tokens[0] = 2
    late = sampler.adjust(logits, torch.tensor([0]), (0,))
    assert early[0, [7, 8, 9]].tolist() == [5.0, -torch.inf, -torch.inf]
    assert late[0, [7, 8, 9]].tolist() == [5.0, -torch.inf, 0.0]


def test_uniform_noise_is_uniform_and_depends_on_every_input() -> None:
    seed, counter = torch.arange(2000), torch.zeros(2000, dtype=torch.int64)
    columns = torch.arange(5).unsqueeze(0)
    u = noise.uniform(seed, counter, 1, columns)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.02)  # 17 standard errors
    assert float(u.var()) == pytest.approx(1 / 12, abs=0.01)
    for other in (
        noise.uniform(seed, counter + 1, 1, columns),
        noise.uniform(seed + 1, counter, 1, columns),
        noise.uniform(seed, counter, 2, columns),
        noise.uniform(seed, counter, 1, columns + 5),
    ):
        assert not torch.equal(u, other)
        correlation = torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.06  # 6 standard errors
    assert torch.equal(u[7:8], noise.uniform(seed[7:8], counter[:1], 1, columns))
    extreme = torch.tensor([2**63 - 1, -(2**63)])
    assert noise.uniform(extreme, torch.zeros(2, dtype=torch.int64), 1, columns).isfinite().all()


@pytest.mark.parametrize("shape", [0.05, 0.5, 1.0, 4.0, 40.0])
def test_gamma_draws_have_the_right_moments(shape: float) -> None:
    """20,000 draws; the bounds are above 6 standard errors."""
    seed = torch.arange(20_000)
    zeros = torch.zeros_like(seed)
    draws = noise.log_gamma_draw(torch.full((20_000, 1), shape), seed, zeros, zeros.unsqueeze(1))
    values = draws.double().exp()
    assert float(values.mean()) == pytest.approx(shape, abs=6 * (shape / 20_000) ** 0.5)
    assert float(values.var()) == pytest.approx(shape, rel=0.6 if shape < 0.1 else 0.2)

"""Adapters compute what torch's own modules compute, and refuse files that do not fit."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from coconut_serve.errors import StartupError
from coconut_serve.reasoning.adapters import AdapterBank, Draw, Gate, build_realign
from coconut_serve.reasoning.embedding import Embedding
from coconut_serve.types import AdapterSpec

pytestmark = pytest.mark.torch

D, M, ROWS = 8, 12, 5
CPU = torch.device("cpu")


def draw(temperature: float = 1.0, rows: int = ROWS) -> Draw:
    seed = torch.arange(rows)
    return Draw(seed, torch.zeros_like(seed), torch.full((rows,), temperature))


def hidden(rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(1))


def bank(folder: Path, spec: AdapterSpec, **parts: nn.Module | torch.Tensor) -> AdapterBank:
    """Write modules as the file of an adapter called `a`, and load it."""
    tensors: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            tensors |= {f"a.{name}.{k}": v.detach().clone() for k, v in part.state_dict().items()}
        else:
            tensors[f"a.{name}"] = part
    (folder / spec.file).parent.mkdir(exist_ok=True)
    save_file(tensors, folder / spec.file)
    return AdapterBank.load(folder, {"a": spec}, CPU)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "gelu_tanh"])
def test_kinds_equal_torch_modules(tmp_path: Path, activation: str) -> None:
    torch.manual_seed(3)
    first, second, norm, square = nn.Linear(D, M), nn.Linear(M, D), nn.LayerNorm(D), nn.Linear(D, D)
    nn.init.normal_(norm.weight)
    act = {
        "gelu": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU(), "gelu_tanh": nn.GELU("tanh")
    }[activation]  # fmt: skip
    x = hidden()
    for kind, parts, module in (
        ("mlp", {"linear_1": first, "linear_2": second}, nn.Sequential(first, act, second)),
        (
            "mlp_ln",
            {"linear_1": first, "linear_2": second, "norm": norm},
            nn.Sequential(first, act, second, norm),
        ),
        ("linear", {"linear_1": square}, square),
        ("linear_ln", {"linear_1": square, "norm": norm}, nn.Sequential(square, norm)),
    ):
        loaded = bank(tmp_path, AdapterSpec(type=kind, activation=activation), **parts)
        result = loaded.apply(("a",) * ROWS, x, draw())
        torch.testing.assert_close(result, module(x).detach())


def test_rows_without_adapter_keep_their_hidden_state(tmp_path: Path) -> None:
    layer, x = nn.Linear(D, D), hidden()
    loaded = bank(tmp_path, AdapterSpec(type="linear"), linear_1=layer)
    result = loaded.apply(("none", "a", "none", "a", "a"), x, draw())
    assert torch.equal(result[[0, 2]], x[[0, 2]])
    torch.testing.assert_close(result[[1, 3, 4]], layer(x[[1, 3, 4]]).detach())
    assert loaded.apply(("none",) * ROWS, x, draw()) is x


def test_gaussian_head_draws_what_it_says(tmp_path: Path) -> None:
    """20,000 draws of one row; a mean off by 6 standard errors has p < 1e-8."""
    torch.manual_seed(5)
    parts = {
        "linear_1": nn.Linear(D, M), "linear_2": nn.Linear(M, D), "norm": nn.LayerNorm(D),
        "mean": nn.Linear(D, D), "log_std": nn.Linear(D, D),
    }  # fmt: skip
    loaded = bank(tmp_path, AdapterSpec(type="gaussian_head", emb_std=0.5), **parts)
    num = 20_000
    x = hidden(1).expand(num, -1)
    features = parts["norm"](parts["linear_2"](nn.GELU()(parts["linear_1"](x[:1]))))
    mean, std = parts["mean"](features)[0] * 0.5, parts["log_std"](features)[0].exp() * 0.5 * 0.7
    drawn = loaded.apply(("a",) * num, x, draw(0.7, num))
    assert ((drawn.mean(0) - mean).abs() < 6 * std / num**0.5).all()
    torch.testing.assert_close(drawn.std(0), std, rtol=0.05, atol=0)
    still = loaded.apply(("a",), x[:1], draw(0.0, 1))
    torch.testing.assert_close(still[0], mean.detach())


def test_same_seed_same_draw_whatever_the_batch(tmp_path: Path) -> None:
    parts = {
        "linear_1": nn.Linear(D, M), "linear_2": nn.Linear(M, D), "norm": nn.LayerNorm(D),
        "mean": nn.Linear(D, D), "log_std": nn.Linear(D, D),
    }  # fmt: skip
    loaded = bank(tmp_path, AdapterSpec(type="gaussian_head"), **parts)
    x, whole = hidden(), draw()
    together = loaded.apply(("a",) * ROWS, x, whole)
    alone = loaded.apply(
        ("a",), x[3:4], Draw(whole.seed[3:4], whole.counter[3:4], whole.temperature[3:4])
    )
    torch.testing.assert_close(together[3:4], alone)


def test_gate_is_hrpo_formula(tmp_path: Path) -> None:
    torch.manual_seed(2)
    r, i, lam = nn.Linear(D, D), nn.Linear(D, D), torch.randn(D)
    loaded = bank(tmp_path, AdapterSpec(type="gate"), gate_r=r, gate_i=i, **{"lambda": lam})
    gate = loaded["a"]
    assert isinstance(gate, Gate)
    e, soft = hidden(), hidden().flip(0)
    a = torch.exp(-8 * nn.functional.softplus(-lam) * torch.sigmoid(r(e)))
    expected = a * e + torch.sqrt(1 - a**2 + 1e-8) * (torch.sigmoid(i(e)) * soft)
    torch.testing.assert_close(gate.mix(e, soft), expected.detach())


def test_realign_of_tied_embeddings_is_the_identity_up_to_length() -> None:
    """Oracle 6: with O = E the ridge solution is the identity."""
    table = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    adapter = build_realign([(table, table)], table.norm(dim=1).mean())
    torch.testing.assert_close(adapter.weights["matrix"], torch.eye(D), atol=1e-4, rtol=0)
    x = hidden()
    mapped = adapter(x, draw())
    torch.testing.assert_close(torch.cosine_similarity(mapped, x), torch.ones(ROWS))
    torch.testing.assert_close(mapped.norm(dim=1), table.norm(dim=1).mean().expand(ROWS))


def test_realign_solves_the_ridge_problem_of_untied_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    e, o = torch.randn(64, D, generator=generator), torch.randn(64, D, generator=generator)
    adapter = build_realign(
        zip(torch.split(o, 20), torch.split(e, 20), strict=True), torch.tensor(1.0)
    )
    expected = torch.linalg.inv(o.T @ o + 1e-5 * torch.eye(D)) @ o.T @ e
    torch.testing.assert_close(adapter.weights["matrix"], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("has_table", [True, False])
def test_mean_of_embeddings_is_the_weighted_sum(has_table: bool) -> None:
    """With a first row of zeros, as a padding token has, and a call that scales."""
    table = torch.randn(50, D)
    table[0] = 0.0
    embedding = Embedding(lambda ids: 2.0 * table[ids], table if has_table else None)
    weights = torch.rand(3, 50).softmax(-1)
    torch.testing.assert_close(embedding.mean(weights), weights @ (2.0 * table))


def test_ranks_with_parts_of_a_table_find_the_mean_of_the_whole() -> None:
    """Two threads that add up what each gives to a call, as ranks do; rows of unequal length."""
    table = torch.randn(90, D) * torch.linspace(0.1, 3.0, 90).unsqueeze(1)
    table[45] = 0.0
    weights = torch.rand(3, 90).softmax(-1)
    given: list[Tensor] = [torch.empty(0)] * 2
    barrier = threading.Barrier(2, timeout=30)

    def mean(rank: int) -> Tensor:
        low = 45 * rank

        def reduce(part: Tensor) -> Tensor:
            given[rank] = part
            barrier.wait()
            whole = given[0] + given[1]
            barrier.wait()
            return whole

        def call(ids: Tensor) -> Tensor:
            is_here = (ids >= low) & (ids < low + 45)
            rows = table[torch.where(is_here, ids, 0)] * is_here.unsqueeze(1)
            return 2.0 * reduce(rows)

        rows = table[low : low + 45]
        return Embedding(call, rows, first_id=low, reduce=reduce).mean(weights)

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(mean, range(2)):
            torch.testing.assert_close(found, 2.0 * weights @ table)


def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    spec = AdapterSpec(type="mlp")
    with pytest.raises(StartupError, match=r"lacks tensor a\.linear_2\.weight"):
        bank(tmp_path, spec, linear_1=nn.Linear(D, M))
    parts = {"linear_1": nn.Linear(D, M), "linear_2": nn.Linear(M, D), "norm": nn.LayerNorm(D)}
    with pytest.raises(StartupError, match=r"unexpected tensor a\.norm"):
        bank(tmp_path, spec, **parts)
    with pytest.raises(StartupError, match="must be one of linear"):
        AdapterBank.load(tmp_path, {"a": AdapterSpec(type="telepathy")}, CPU)
    (tmp_path / spec.file).write_bytes(b"torn")
    with pytest.raises(StartupError, match="cannot read"):
        AdapterBank.load(tmp_path, {"a": spec}, CPU)
    with pytest.raises(StartupError, match="cannot read"):
        AdapterBank.load(tmp_path, {"a": AdapterSpec(type="mlp", file="none")}, CPU)

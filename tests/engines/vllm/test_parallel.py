"""LoRA and tensor parallelism: the golden cases hold with both."""

import json
from pathlib import Path

import pytest

from tests.engines.vllm.support import Engines
from tests.engines.vllm.test_golden import ask_all, vllm_app
from tests.fakes import listening

pytestmark = pytest.mark.vllm


def split_off_adapter(source: Path, target: Path) -> tuple[Path, Path]:
    """Write a base model and a random LoRA adapter that together are the source model.

    Returns:
        The base's directory and the adapter's.
    """
    import torch
    from safetensors.torch import load_file, save_file

    base, adapter = target / "base", target / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    rank, alpha = 4, 8
    weights: dict[str, torch.Tensor] = load_file(source / "model.safetensors")
    lora: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(11)
    kinds = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    for name, weight in list(weights.items()):
        if name.split(".")[-2] not in kinds:
            continue
        a = torch.randn(rank, weight.shape[1], generator=generator) * 0.05
        b = torch.randn(weight.shape[0], rank, generator=generator) * 0.05
        weights[name] = weight - alpha / rank * b @ a
        stem = "base_model.model." + name.removesuffix(".weight")
        lora |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    for file in source.iterdir():
        if file.suffix == ".json":
            (base / file.name).write_text(file.read_text())
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    save_file(lora, adapter / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(kinds),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return base, adapter


async def test_golden_cases_with_a_lora_adapter(
    wide_llama: Path, engines: Engines, tmp_path: Path
) -> None:
    from tests.fakes import make_request, native_engine, run

    base, adapter = split_off_adapter(wide_llama, tmp_path)
    soft = make_request(mode="distribution", steps=5, max_tokens=8)
    plain = make_request(max_tokens=8)
    async with native_engine(wide_llama) as native, native_engine(base) as without:
        expected, plain_expected = await run(native, soft), await run(native, plain)
        assert (await run(without, plain)).token_ids != plain_expected.token_ids, "it matters"
    async with engines.open(base, lambda _: None, "--lora-modules", f"a={adapter}") as engine:
        assert (await run(engine, soft)).token_ids == expected.token_ids
        async with listening(vllm_app(engine, wide_llama)) as url:
            await ask_all(url, "llama", together=True)


async def test_golden_cases_and_whole_vocabularies_with_two_tensor_parallel_workers(
    wide_llama: Path, engines: Engines
) -> None:
    """The ranks share the table of embeddings, which averages over the vocabulary read."""
    from tests.engines.methods.loop import Parts
    from tests.engines.methods.table import check, requests
    from tests.fakes import make_request, native_engine, run, run_all

    parts = Parts.load(wide_llama)
    names = ("full", "soft-tokens", "thinkrouter-full", "swi", "latentmas")
    asked = requests(names, rows=1)
    soft = make_request(mode="distribution", steps=5, max_tokens=8)
    async with native_engine(wide_llama) as native:
        expected = await run(native, soft)
    async with engines.open(wide_llama, lambda _: None, "-tp", "2") as engine:
        statuses = await engine._life.llm.collective_rpc("coconut_status")
        assert [status["is_live"] for status in statuses] == [True, True]
        assert (await run(engine, soft)).token_ids == expected.token_ids
        results = await run_all(engine, list(asked.values()))
        check(asked, results, parts)
        async with listening(vllm_app(engine, wide_llama)) as url:
            await ask_all(url, "llama", together=True)

"""What a worker knows before it computes: whose logits and draws nothing will look at."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from coconut_serve.params import HaltParams, MixtureParams, ReasoningParams
from coconut_serve.reasoning.adapters import AdapterBank
from coconut_serve.reasoning.embedding import Embedding
from coconut_serve.reasoning.registry import mode_names

pytestmark = pytest.mark.vllm
NUM_PROMPT, STEPS = 7, 3

# A way to think, and for decisions 0 to 4 (three steps, an end token, the answer) what is needed of
# vLLM: d a draw, l logits alone, - nothing.
WAYS = {
    "latent": (ReasoningParams(mode="latent", end_token_ids=(1,)), "----d"),
    "halting": (
        ReasoningParams(mode="latent", end_token_ids=(1,), halt=HaltParams(stop_token_ids=(2,))),
        "ddddd",
    ),
    "soft": (ReasoningParams(mode="distribution", end_token_ids=(1,)), "lllld"),
    "sampled": (
        ReasoningParams(
            mode="distribution", end_token_ids=(1,), mixture=MixtureParams(kind="moi")
        ),
        "ddddd",
    ),
    "tokens": (ReasoningParams(mode="cot", end_token_ids=(1,)), "ddddd"),
    "blocks": (ReasoningParams(mode="latent", end_token_ids=(1,), enter_token_id=3), "ddddd"),
}  # fmt: skip


@pytest.fixture
def worker() -> Any:
    from coconut_serve.engines.vllm.worker import WorkerReasoning

    table = torch.zeros(16, 4)
    embedding = Embedding(lambda ids: torch.nn.functional.embedding(ids, table), table)
    return WorkerReasoning(
        num_slots=len(WAYS), hidden_size=4, modes=mode_names(), embedding=embedding,
        adapters=AdapterBank({}), vocab_size=16, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


def test_nothing_is_computed_that_nobody_looks_at(worker: Any) -> None:
    from coconut_serve.engines.vllm.params import Thinking

    for slot, (name, (params, _)) in enumerate(WAYS.items()):
        worker.add(
            slot, name, Thinking(params=replace(params, steps=STEPS)),
            num_prompt=NUM_PROMPT, prefill_token_ids=[5] * NUM_PROMPT, has_penalties=False,
        )  # fmt: skip
    slots = np.arange(len(WAYS))
    for decision in range(5):
        settled, skipped = worker.skippable_rows(slots, np.full(len(WAYS), NUM_PROMPT + decision))
        found = "".join("-" if i in skipped else "l" if i in settled else "d" for i in slots)
        assert found == "".join(needed[decision] for _, needed in WAYS.values())
    # While the prompt is still being computed nobody is settled, whatever comes after it.
    assert worker.skippable_rows(slots, np.full(len(WAYS), NUM_PROMPT - 1)) == ([], [])


def test_requests_of_one_step_are_one_upload(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come one by one; a request that is preempted before its first step is kept too."""
    from coconut_serve.engines.vllm.params import Thinking
    from coconut_serve.reasoning import slots as slots_module

    sizes: list[int] = []
    send = slots_module.send

    def counted(words: np.ndarray, device: torch.device) -> torch.Tensor:
        sizes.append(len(words))
        return send(words, device)

    monkeypatch.setattr(slots_module, "send", counted)

    def add(slot: int, name: str) -> None:
        worker.add(
            slot, name, Thinking(params=replace(WAYS[name][0], steps=STEPS), seed=slot),
            num_prompt=NUM_PROMPT, prefill_token_ids=[5] * NUM_PROMPT, has_penalties=False,
        )  # fmt: skip

    for slot, name in enumerate(WAYS):
        add(slot, name)
    assert not sizes
    batch = type("Batch", (), {})()
    batch.query_start_loc_np = np.arange(len(WAYS) + 1) * NUM_PROMPT
    batch.num_computed_tokens_np = np.zeros(len(WAYS), dtype=np.int64)
    batch.idx_mapping_np = np.arange(len(WAYS))
    worker.overlay(torch.zeros(len(WAYS) * NUM_PROMPT, 4), batch)
    assert len(sizes) == 1
    assert worker.slots.seed.tolist() == list(range(len(WAYS)))
    assert worker.slots.steps_left.tolist() == [STEPS] * 4 + [0, STEPS], "cot is passed on"
    worker.slots.steps_left[0] = 1
    worker.remove("latent", None)
    add(0, "latent")
    worker.remove("latent", None)
    add(0, "latent")
    worker.overlay(torch.zeros(len(WAYS) * NUM_PROMPT, 4), batch)
    assert len(sizes) == 3
    assert int(worker.slots.steps_left[0]) == 1

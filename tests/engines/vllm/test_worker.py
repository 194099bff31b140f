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
        settled, skipped = worker.unneeded(slots, np.full(len(WAYS), NUM_PROMPT + decision))
        found = "".join("-" if i in skipped else "l" if i in settled else "d" for i in slots)
        assert found == "".join(needed[decision] for _, needed in WAYS.values())
    # While the prompt is still being computed nobody is settled, whatever comes after it.
    assert worker.unneeded(slots, np.full(len(WAYS), NUM_PROMPT - 1)) == ([], [])

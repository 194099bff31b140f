"""Settings are a table: its columns, its one upload, and what a snapshot leaves out."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coconut_serve.params import (
    HaltParams,
    MixtureParams,
    ReasoningParams,
    SamplingParams,
    SwitchParams,
)
from coconut_serve.reasoning import slots as slots_module
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.reasoning.settings import NO_ID, Admission, choice
from coconut_serve.reasoning.slots import Slots
from coconut_serve.reasoning.step import ReasoningStep
from coconut_serve.types import Request
from tests.fakes import make_request, native_engine, run
from tests.reasoning.test_modes import HIDDEN, make_step

pytestmark = pytest.mark.torch

WRITES = ("copy", "fill", "index_put", "index_copy", "scatter", "zero_", "index_add")


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Notes the operators that write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.writes: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WRITES):
            self.writes.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of each upload."""
    sizes: list[int] = []
    send = slots_module.send

    def counted(words: np.ndarray, device: torch.device) -> torch.Tensor:
        sizes.append(len(words))
        return send(words, device)

    monkeypatch.setattr(slots_module, "send", counted)
    return sizes


def make_slots(num_slots: int = 4) -> Slots:
    return Slots(num_slots, HIDDEN, dtype=torch.float32, device=torch.device("cpu"))


def full_request(mode: str, i: int) -> Request:
    """A request with something in every part of its settings."""
    reasoning = {
        "halt": HaltParams(stop_token_ids=tuple(range(20)), entropy_below=0.1),
        "mixture": MixtureParams(top_k=5 + i),
        "switch": SwitchParams(hard_token_ids=tuple(range(60)), final_token_ids=(1, 2)),
        "noise_std": 0.1,
    }
    steps = 0 if mode == "none" else 4
    return make_request(
        f"{mode}{i}", mode=mode, steps=steps, end=(5, 6) if steps else (), reasoning=reasoning
    )


@pytest.mark.parametrize("modes", [*((name, name) for name in mode_names()), mode_names()])
def test_admission_is_one_upload_for_all_rows_of_a_step(
    modes: tuple[str, ...], sent: list[int]
) -> None:
    """`auto` with 60 hard tokens once wrote 118 times a row."""
    step, _ = make_step()
    admissions = [Admission.read(i, full_request(mode, i)) for i, mode in enumerate(modes)]
    with Operators() as seen:
        step.admit(admissions)
    assert len(sent) == 1
    assert seen.writes == ["aten.index_copy_.default"]


def test_penalties_and_allowed_ids_come_in_the_same_upload(sent: list[int]) -> None:
    step, _ = make_step()
    request = make_request(mode="cot", steps=3)
    sampling = replace(request.sampling, repetition_penalty=1.5, allowed_token_ids=(1, 2, 3))
    with Operators() as seen:
        step.admit([Admission.read(i, replace(request, sampling=sampling)) for i in range(3)])
    assert len(sent) == 1
    assert not [name for name in seen.writes if "_to_copy" in name]


async def test_native_engine_uploads_once_for_all_that_a_step_admits(
    tiny_llama: Path, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    admit = ReasoningStep.admit

    def noted(self: ReasoningStep, admissions: Sequence[Admission]) -> None:
        steps.extend([len(admissions)] if admissions else [])
        admit(self, admissions)

    monkeypatch.setattr(ReasoningStep, "admit", noted)
    async with native_engine(tiny_llama) as engine:
        await asyncio.gather(*(run(engine, full_request(mode, 0)) for mode in mode_names()))
    assert sum(steps) == len(mode_names())
    assert len(sent) == len(steps)


def test_columns_hold_what_the_records_say_on_both_sides() -> None:
    slots = make_slots()
    params = ReasoningParams(
        mode="latent",
        steps=7,
        end_token_ids=(3, 3),
        noise_std=0.3,
        keeps_last=True,
        mixture=MixtureParams(noise="gumbel", noise_clamp=(-1.0, 2.0)),
        halt=HaltParams(stop_token_ids=(9, 8, 9)),
    )
    sampling = SamplingParams(seed=-5, temperature=0.0, top_p=0.5)
    slots.admit([Admission(slot=2, seed=2**62, reasoning=params, sampling=sampling)])
    device, host = slots.settings(torch.tensor([2])), slots.host([2])
    expected: dict[str, Any] = {
        "steps": 7,
        "seed": 2**62,
        "enter_token_id": -1,
        "num_forced": 2,
        "keeps_last": True,
        "may_halt": True,
        "noise": choice(MixtureParams, "noise", "gumbel"),
        "noise_clamp": [-1.0, 2.0],
        "end_token_ids": [3, 3] + [NO_ID] * 6,
        "stop_token_ids": [9, 8] + [NO_ID] * 30,
        "answer_seed": -5,
        "answer_is_greedy": True,
        "thinking_top_p": 0.5,
    }
    for name, value in expected.items():
        assert getattr(device, name).tolist() == [value], name
        assert getattr(host, name).tolist() == [value], name
    assert host.noise_std.tolist() == device.noise_std.tolist() == [float(np.float32(0.3))]
    with pytest.raises(AttributeError, match="no slot column 'nois'"):
        _ = host.nois


def test_snapshot_holds_state_alone_and_goes_on_in_another_slot() -> None:
    slots = make_slots()
    counter = slots.register("counter", torch.int64, start=lambda a: a.reasoning.steps)
    pair = slots.register("pair", torch.float32, 2, start=0.5)
    params = ReasoningParams(mode="latent", steps=7)
    slots.admit([Admission(slot=1, next_token_id=4, reasoning=params)])
    assert counter[1] == 7
    assert pair[1].tolist() == [0.5, 0.5]
    counter[1], pair[1], slots.vector[1] = 3, torch.tensor([1.0, 2.0]), 1.0
    snapshot = slots.save(1)
    slots.admit([Admission(slot=1), Admission(slot=3, reasoning=params, snapshot=snapshot)])
    assert counter[1] == 0
    assert counter[3] == 3
    assert pair[3].tolist() == [1.0, 2.0]
    assert slots.vector[3].tolist() == [1.0] * HIDDEN
    assert slots.host([1, 3]).steps.tolist() == [0, 7]
    assert slots.admitted[3].snapshot is None


def test_registering_a_name_twice_or_too_much_is_an_error() -> None:
    slots = make_slots()
    with pytest.raises(ValueError, match="exists"):
        slots.register("token", torch.int64)
    with pytest.raises(ValueError, match="exists"):
        slots.register_large("vector", torch.int64, 3)
    with pytest.raises(ValueError, match="no room"):
        slots.register("much", torch.int64, 200)

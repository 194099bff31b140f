"""What a request asks of reasoning comes back in `resolved`, or is named in a warning."""

from collections.abc import Iterator
from typing import Any, get_args

import httpx
from pydantic import BaseModel

from coconut_serve.checkpoint.manifest import Manifest
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.server.reasoning_body import ReasoningBody
from tests.fakes import listening, stub_app

MANIFEST = Manifest.model_validate(
    {
        "schema": 1,
        "modes": list(mode_names()),
        "tokens": {
            "start": {"id": 1}, "end": {"id": 2}, "latent": {"id": 3},
            "think_start": {"id": 4}, "think_end": {"id": 5},
        },
        "variable_steps": True,
        "prompt": {"template": "{question} at {speed}", "chat_template": False, "speed": 2},
    }
)  # fmt: skip
# A value of each setting, and what else it needs to have an effect.
ASKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "mode": (None, {}), "effort": ("low", {}), "preset": (None, {}), "steps": (3, {}),
    "min_steps": (1, {"steps": 3}), "max_blocks": (1, {}), "pad_positions": (True, {}),
    "max_total_steps": (9, {}), "start": ([1], {}), "end": ([2], {}), "source": ("constant", {}),
    "adapter": ("none", {}), "latent_noise_std": (0.5, {}), "latent_temperature": (0.5, {}),
    "soft_weight": (0.5, {}), "speed": (3, {}), "seed": (7, {}),
    "branches": (2, {"latent_noise_std": 0.5}),
    "select": ("first", {"branches": 2, "latent_noise_std": 0.5}), "trace": ("summary", {}),
    "trace_top_k": (3, {}), "mixture.kind": ("moi", {}), "mixture.top_k": (3, {}),
    "mixture.temperature": (0.5, {}), "mixture.top_p": (0.5, {}), "mixture.filter_top_k": (5, {}),
    "mixture.min_p": (0.1, {}), "mixture.noise": ("gumbel", {}),
    "mixture.noise_temperature": (1.0, {"mixture.noise": "gumbel"}),
    "mixture.noise_clamp": ([-1.0, 1.0], {"mixture.noise": "gumbel"}),
    "mixture.dirichlet_alpha": (2.0, {"mixture.noise": "dirichlet"}),
    "mixture.weights": ("equal", {"mixture.kind": "multiplex"}),
    "mixture.replacement": (False, {"mixture.kind": "multiplex"}),
    "mixture.moi_beta": (2.0, {"mixture.kind": "moi"}), "mixture.norm": ("l2", {}),
    "mixture.in_answer": (True, {"mixture.kind": "moi"}),
    "halt.rule": ("stop_token", {}), "halt.stop_tokens": ([5, 6], {}),
    "halt.stop_test": ("sampled", {}), "halt.stop_temperature": (2.0, {}),
    "halt.stop_prob": (0.4, {}), "halt.sample": (True, {}), "halt.entropy_below": (0.1, {}),
    "halt.entropy_patience": (3, {}), "halt.entropy_above": (9.0, {}),
    "halt.entropy_unit": ("normalized", {}),
    "halt.converge_metric": ("kl", {"halt.converge_below": 0.1}),
    "halt.converge_below": (0.1, {}), "halt.converge_patience": (2, {}),
    "switch.rule": ("confidence", {}), "switch.soft_when": ("uncertain", {}),
    "switch.p_max": (0.5, {}), "switch.window": (9, {}), "switch.alpha": (0.5, {}),
    "switch.beta": (0.5, {}), "switch.max_switches": (2, {}), "switch.answer_tokens": (2, {}),
    "switch.hard_tokens": ("math", {}), "after.temperature": (0.5, {}), "after.top_p": (0.5, {}),
    "after.top_k": (5, {}), "after.min_p": (0.1, {}),
}  # fmt: skip
# Has its value at OpenAI only; vectors are never repeated (tests/e2e/test_replay.py).
NOT_ECHOED = {
    "summary",
    "generate_summary",
    "context",
    "explain",
    "replay.fingerprint",
    "replay.steps.vector",
    "replay.steps.token_id",
}
PRESET = {"latent": "coconut", "distribution": "soft_thinking", "auto": "swi"}


def leaves(body: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a body."""
    for name, declared in body.model_fields.items():
        parts = [p for p in get_args(declared.annotation) if isinstance(p, type)]
        inner = next((p for p in parts if issubclass(p, BaseModel)), None)
        if inner is None:
            yield prefix + name
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as the objects of a body."""
    found: dict[str, Any] = {}
    for name, value in flat.items():
        part, _, key = name.rpartition(".")
        (found.setdefault(part, {}) if part else found)[key] = value
    return found


def test_every_setting_is_asked_for_below() -> None:
    assert {*leaves(ReasoningBody)} == {*ASKED} | NOT_ECHOED


async def test_every_setting_is_echoed_or_warned_of_by_name_in_every_mode() -> None:
    """preset, effort, summary and select appeared nowhere, and others without their value."""
    echoed = set()
    async with (
        listening(stub_app(manifest=MANIFEST)) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):
        for mode in mode_names():
            for name, (value, more) in [*ASKED.items(), ("summary", ("auto", {}))]:
                given = {"mode": mode, "preset": PRESET.get(mode)}.get(name, value)
                if given is None:
                    continue
                asked = {"explain": True, "mode": mode, "steps": 4, **more, name: given}
                if name == "effort":
                    del asked["steps"]
                response = await http.post(
                    "/v1/chat/completions",
                    json={
                        "model": "m",
                        "messages": [{"role": "user", "content": "a"}],
                        "max_tokens": 1,
                        "reasoning": nested(asked),
                    },
                )
                if response.status_code == 400:
                    continue
                told = response.json()["reasoning_info"]
                noted = told["resolved"].get(name, {})
                if noted.get("source") == "request":
                    assert name in ("steps", "halt.stop_tokens") or noted["value"] == given, name
                    echoed.add(name)
                else:
                    field = "reasoning_effort" if name == "effort" else f"reasoning.{name}"
                    assert any(field in warning for warning in told["warnings"]), (mode, name)
    assert echoed == {*ASKED}

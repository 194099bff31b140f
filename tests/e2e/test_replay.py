"""A client stores the trace of an answer and sends it back with another question."""

import base64
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes import listening, native_app, write_golden

pytestmark = pytest.mark.torch

A, B = list(range(5, 30)), list(range(60, 75))


async def ask(
    client: httpx.AsyncClient, prompt: list[int], mode: str = "latent", **reasoning: Any
) -> Any:
    body = {
        "model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0, "seed": 3,
        "return_token_ids": True, "reasoning_mode": mode,
        "reasoning": {"steps": 4, "trace": "vectors", **reasoning},
    }  # fmt: skip
    return (await client.post("/v1/completions", json=body, timeout=60)).json()


def stored(answer: Any) -> dict[str, Any]:
    """What a client keeps of an answer."""
    [choice] = answer["choices"]
    return {"fingerprint": answer["system_fingerprint"], "steps": choice["reasoning_trace"]}


async def check_replay(url: str) -> None:
    """A replay of its own vectors is the same answer; one of another question's feeds those."""
    async with httpx.AsyncClient(base_url=url) as client:
        for mode, more in (
            ("latent", {"latent_noise_std": 0.3}),
            ("distribution", {"mixture": {"noise": "gumbel", "top_k": 5}}),
        ):
            first = await ask(client, A, mode, **more)
            again = await ask(client, A, mode, **more, replay=stored(first))
            assert again["choices"][0]["token_ids"] == first["choices"][0]["token_ids"]
            for ours, theirs in zip(stored(again)["steps"], stored(first)["steps"], strict=True):
                for name in ("step", "kind", "token_id", "vector"):
                    assert ours[name] == theirs[name]
                for name in ("entropy", "max_prob", "norm", "cosine", "retained_mass"):
                    assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
            told = again["usage"]["reasoning"]["changed"]["replay"]
            assert told == 4
            own, moved = (
                await ask(client, B, mode),
                await ask(client, B, mode, replay=stored(first)),
            )
            assert moved["choices"][0]["token_ids"] != own["choices"][0]["token_ids"]
            for ours, theirs in zip(stored(moved)["steps"], stored(first)["steps"], strict=True):
                assert ours["vector"] == theirs["vector"]
                assert ours["token_id"] == theirs["token_id"]
            part = {**stored(first), "steps": stored(first)["steps"][:2]}
            moved = await ask(client, B, mode, replay=part)
            vectors = [
                [step["vector"] for step in stored(each)["steps"]] for each in (moved, first)
            ]
            assert vectors[0][:2] == vectors[1][:2]
            assert vectors[0][2] != vectors[1][2]


async def test_stored_trace_is_fed_again(tmp_path: Path) -> None:
    app = native_app(write_golden("llama", tmp_path), config={"max_trace": "vectors"})
    async with listening(app) as url:
        await check_replay(url)


async def test_what_is_no_replay_is_refused_by_name(tmp_path: Path) -> None:
    app = native_app(write_golden("llama", tmp_path), config={"max_trace": "vectors"})
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as client:
        good = stored(await ask(client, A))
        soft = stored(await ask(client, A, "distribution"))

        def steps(vector: object, **more: object) -> dict[str, Any]:
            return {**good, "steps": [{"vector": vector, **more}]}

        def numbers(*values: float) -> str:
            return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()

        wrong: list[tuple[dict[str, Any], str, str]] = [
            ({"replay": {**good, "fingerprint": "f"}}, "replay.fingerprint", "must be"),
            ({"replay": good, "steps": 3}, "replay.steps", "at most 3"),
            ({"replay": steps("no base64!")}, "replay.steps", "64 float32 in base64"),
            ({"replay": steps(numbers(1.0, 2.0))}, "replay.steps", "64 float32 in base64"),
            ({"replay": steps(numbers(*[1.0] * 63, float("inf")))}, "replay.steps", "finite"),
            ({"replay": steps(numbers(*[float("nan")] * 64))}, "replay.steps", "finite"),
            ({"replay": steps([1.0] * 64)}, "replay.steps.vector", "string"),
            ({"replay": {**good, "steps": [{"token_id": 5}]}}, "replay.steps.vector", "required"),
            ({"replay": {**good, "steps": []}}, "replay.steps", "at least 1"),
            ({"replay": {"steps": good["steps"]}}, "replay.fingerprint", "required"),
            ({"replay": {**good, "step": 1}}, "replay.step", "did you mean"),
            ({"replay": good, "mode": "cot"}, "replay", "mode cot"),
            ({"replay": good, "mode": "none"}, "replay", "mode none"),
        ]  # fmt: skip
        for settings, param, message in wrong:
            mode = settings.pop("mode", "latent")
            error = (await ask(client, A, mode, **settings))["error"]
            assert error["param"] == f"reasoning.{param}", error
            assert message in error["message"], error
        soft["steps"][0]["token_id"] = 128
        error = (await ask(client, A, "distribution", replay=soft))["error"]
        assert "outside 0..127" in error["message"]


async def test_servers_that_give_no_vectors_take_none(tmp_path: Path) -> None:
    async with (
        listening(native_app(write_golden("llama", tmp_path))) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        replay = {"fingerprint": "f", "steps": [{"vector": ""}]}
        error = (await ask(client, A, trace="none", replay=replay))["error"]
        assert error["param"] == "reasoning.replay"
        assert "--max-trace vectors" in error["message"]

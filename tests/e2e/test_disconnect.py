"""A client that goes away frees its blocks within one step, in each phase, streamed or not."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from coconut_serve.engines.native.engine import NativeEngine
from tests.fakes import core_of, listening, native_app, write_golden

pytestmark = pytest.mark.torch

# What the request does when its client leaves; the blocker fills all slots for "queued".
PHASES = ("queued", "prefill", "latent", "decode")


def body_for(phase: str, *, is_streamed: bool, n: int) -> dict[str, Any]:
    """A request that would run for a long time in the given phase."""
    prompt = [3 + i % 100 for i in range(90)]
    body: dict[str, Any] = {
        "model": "m",
        "prompt": prompt if phase == "prefill" else prompt[:9],
        "max_tokens": 100 if phase == "decode" else 5,
        "ignore_eos": True,
        "stream": is_streamed,
        "n": n,
        "reasoning_mode": "latent" if phase in ("latent", "queued", "prefill") else "none",
    }
    if body["reasoning_mode"] == "latent":
        body["reasoning"] = {"steps": 60 if phase == "latent" else 3}
    return body


class Gate:
    """Lets the engine run one step at a time, and records the blocks in use after each."""

    def __init__(self, engine: NativeEngine) -> None:
        import threading

        self._engine = engine
        self._step = core_of(engine)._one_step
        self._allowed = threading.Semaphore(0)
        self.steps: list[set[str]] = []
        core_of(engine)._one_step = self._gated

    def _gated(self) -> None:
        self._allowed.acquire()
        self._step()
        running = core_of(self._engine)._scheduler.running
        self.steps.append({s.request.request_id for s in running})

    def allow(self, count: int) -> None:
        self._allowed.release(count)

    async def wait_for(self, num_steps: int) -> None:
        async with asyncio.timeout(20):
            while len(self.steps) < num_steps:
                await asyncio.sleep(0.002)


async def send(url: str, body: dict[str, Any]) -> asyncio.StreamWriter:
    """Post a body over a bare socket, so that closing it is all that happens."""
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    await writer.drain()
    return writer


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("phase", PHASES)
async def test_disconnect_frees_all_blocks_within_one_step(
    phase: str, is_streamed: bool, n: int, tmp_path: Path
) -> None:
    manifest = write_golden("llama", tmp_path) / "latent_config.json"
    manifest.write_text(manifest.read_text().replace('"max_steps": 16', '"max_steps": 64'))
    app = native_app(
        tmp_path,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=8,
        enable_prefix_caching=False,
    )
    async with listening(app) as url:
        engine = app.state.service.engine
        gate = Gate(engine)
        blockers = []
        if phase == "queued":  # fill all four slots first
            blocker = body_for("decode", is_streamed=True, n=4)
            blockers.append(await send(url, blocker))
            gate.allow(6)
            await gate.wait_for(6)
        before = set(gate.steps[-1]) if gate.steps else set()
        writer = await send(url, body_for(phase, is_streamed=is_streamed, n=n))
        admission = app.state.service.admission
        async with asyncio.timeout(10):
            while admission.num_in_flight < len(before) + n:
                await asyncio.sleep(0.002)
        num_steps = len(gate.steps) + (3 if phase == "prefill" else 20)
        gate.allow(num_steps - len(gate.steps))
        await gate.wait_for(num_steps)
        own = gate.steps[-1] - before
        assert bool(own) == (phase != "queued"), "it is where the test wants it"
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(10):
            while admission.num_in_flight > len(before):
                await asyncio.sleep(0.002)
        # The step that was waiting at the gate may have been planned with them; one more not.
        gate.allow(2)
        if before:
            await gate.wait_for(num_steps + 2)
            assert gate.steps[-1] == before
        else:
            async with asyncio.timeout(10):
                while core_of(engine)._scheduler.has_work():
                    await asyncio.sleep(0.002)
            assert core_of(engine)._scheduler.pool.num_used == 0
        for blocker_writer in blockers:
            blocker_writer.close()
        gate.allow(1000)
        async with asyncio.timeout(20):
            while core_of(engine)._scheduler.has_work():
                await asyncio.sleep(0.002)
        assert core_of(engine)._scheduler.pool.num_used == 0
        core_of(engine)._scheduler.check_integrity()
        assert admission.num_in_flight == 0

"""`coconut-serve bench` against a stub server, and what it measures."""

import asyncio
import json
import math
from typing import Any

import pytest

from coconut_serve.checkpoint.manifest import Manifest, Prompt
from coconut_serve.cli import build_parser
from coconut_serve.commands import bench
from coconut_serve.commands.measure import Record, Target, ask, percentile
from coconut_serve.config import StubConfig
from coconut_serve.errors import StartupError
from coconut_serve.reasoning.registry import mode_names
from tests.fakes import free_port, listening, stub_app


async def run(*words: str) -> int:
    return await asyncio.to_thread(bench.run, build_parser().parse_args(["bench", *words]))


async def test_bench_counts_every_mode_and_ends_with_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with listening(stub_app()) as url:
        words = ["--requests", "4", "--concurrency", "2", "--max-tokens", "8", "--steps", "3"]
        assert await run(f"{url}/v1", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(lines[-1])["results"]
    assert [row["mode"] for row in results] == list(mode_names())
    assert len(lines) == 2 + len(results)
    for row in results:
        assert (row["ok"], row["answer_tokens"]) == (4, 32)
        is_thinking = row["mode"] in ("latent", "distribution")
        assert row["vector_steps"] == (12 if is_thinking else 0)
        assert row["itl"]["p50"] >= 0
        assert 0 < row["ttft"]["p50"] <= row["ttfot"]["p50"] <= row["e2e"]["p50"]


async def test_failed_requests_are_told_and_give_a_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with listening(stub_app(stub=StubConfig(fail_at_token=3))) as url:
        assert await run(url, "--requests", "1", "--concurrency", "1", "--modes", "cot") == 1
    assert "generation_failed" in capsys.readouterr().err


async def test_a_model_is_asked_what_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug: the demo, which knows nothing but places, was asked for sums."""
    asked: list[str] = []

    def note(_: Target, body: dict[str, Any]) -> Record:
        asked.append(body["messages"][0]["content"])
        return Record(mode="none", started=0.0)

    monkeypatch.setattr(bench, "ask", note)
    words = ["--requests", "2", "--concurrency", "1", "--modes", "none"]
    manifest = Manifest(modes=["none"], prompt=Prompt(example="who?"))
    async with listening(stub_app(manifest=manifest)) as url:
        await run(url, *words)
        assert set(asked) == {"who?"}
        asked.clear()
        await run(url, *words, "--prompt", "is {number} odd?")
        assert set(asked) == {"is 0 odd?", "is 1 odd?"}
    monkeypatch.setattr(bench, "_model", lambda _: {"id": "x", "root": "demo"})
    asked.clear()
    await run("http://127.0.0.1:9", *words)
    assert len(set(asked)) == 2
    assert all(" from " in question for question in asked)


def test_absent_server_is_one_line() -> None:
    args = build_parser().parse_args(["bench", f"http://127.0.0.1:{free_port()}"])
    with pytest.raises(StartupError):
        bench.run(args)


async def test_record_tells_times_as_the_server_paces_them() -> None:
    stub = StubConfig(ttft_seconds=0.1, tokens_per_second=50)
    body = {
        "messages": [{"role": "user", "content": "a"}], "max_tokens": 6, "stream": True,
        "reasoning_mode": "latent", "reasoning": {"steps": 5}, "return_token_ids": True,
    }  # fmt: skip
    async with listening(stub_app(stub=stub)) as url:
        record = await asyncio.to_thread(ask, Target(url=url), body)
        cut = await asyncio.to_thread(ask, Target(url=url), body, on_chunk=lambda n: n < 2)
    assert record.is_ok
    assert record.num_answer_tokens == 6
    assert len(record.gaps) == 5
    assert record.ttfot is not None
    assert record.ttfot >= 0.1 + 5 / 50
    assert record.tpot is not None
    assert record.tpot >= 0.018
    assert not cut.is_ok
    assert cut.error == "hung up"


def test_percentiles_interpolate() -> None:
    assert percentile([1, 2, 3, 4], 0.5) == 2.5
    assert percentile([5], 0.99) == 5
    assert math.isnan(percentile([], 0.5))

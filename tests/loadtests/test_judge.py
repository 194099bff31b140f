"""How a load test is judged, without locust: real clients, a stub server, records made by hand."""

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from coconut_serve.commands.measure import Record, Target
from coconut_serve.config import StubConfig
from loadtests.report import compare as ratios
from loadtests.report import goodput
from loadtests.scenarios.agree import compare, read_page
from loadtests.scenarios.clients import SCENARIOS, Mix, Task, parse_weights
from loadtests.scenarios.judge import judge, read_slo, summary
from tests.deploy.tools import ROOT
from tests.fakes import listening, stub_app

_MIX = Mix(
    modes={"latent": 1, "none": 1}, scenarios={"stream": 1}, max_tokens=4, min_tokens=0, steps=3
)


def record(**values: Any) -> Record:
    given: dict[str, Any] = {
        "mode": "latent", "started": 0.0, "status": 200, "finish_reason": "length", "e2e": 1.0,
        "ttft": 0.2, "ttfot": 0.5, "gaps": [0.1, 0.1],
    }  # fmt: skip
    return Record(**(given | values))


async def test_clients_and_server_agree_to_the_token() -> None:
    rng = random.Random(1)
    stub = StubConfig(ttft_seconds=0.05, tokens_per_second=50)
    async with listening(stub_app(stub=stub)) as url, httpx.AsyncClient(base_url=url) as http:
        before = read_page((await http.get("/metrics")).text)
        asking = (
            asyncio.to_thread(SCENARIOS[name], Target(url=url), _MIX, random.Random(rng.random()))
            for name in ["stream"] * 6 + ["whole"] * 2
        )
        records = await asyncio.gather(*asking)
        after = read_page((await http.get("/metrics")).text)
    told = summary(list(records))
    agreed = compare(before, after, told, tolerance=0.5)
    counts = [
        row for row in agreed["rows"] if "mean" not in row["what"] and "median" not in row["what"]
    ]
    assert counts
    assert all(row["agrees"] for row in counts), counts
    assert {row["what"] for row in counts} >= {"requests", "halts", "answer_tokens", "vector_steps"}
    told["modes"]["latent"]["answer_tokens"] += 1
    assert not compare(before, after, told, tolerance=0.5)["agrees"]


async def test_answers_to_a_task_are_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "task.json"

    def ask_all(url: str, answer: str) -> list[Record]:
        file.write_text(json.dumps([{"question": "Is a wumpus a yumpus?", "answer": answer}]))
        task = Task.load(file, Target(url=url))
        mix = replace(_MIX, modes={"none": 1}, task=task)
        names = ("stream", "whole")
        return [SCENARIOS[name](Target(url=url), mix, random.Random(1)) for name in names]

    async with listening(stub_app(stub=StubConfig(tokens_per_second=500))) as url:
        wrong = await asyncio.to_thread(ask_all, url, "neither")
        [said] = {record.text for record in wrong}
        right = await asyncio.to_thread(ask_all, url, said)
    assert [summary(each)["all"]["right"] for each in (wrong, right)] == [0, 2]
    assert summary(wrong)["all"]["looked_at"] == 2


async def test_impatient_and_wrong_clients_get_what_they_should() -> None:
    app = stub_app(stub=StubConfig(tokens_per_second=50))
    async with listening(app) as url:
        asking = (
            asyncio.to_thread(SCENARIOS[name], Target(url=url), _MIX, random.Random(seed))
            for seed in range(4)
            for name in ("disconnect", "bad", "half", "slow")
        )
        told = summary(list(await asyncio.gather(*asking)))
    assert not told["unexpected"]
    assert told["scenarios"] == {"disconnect": 4, "bad": 4, "half": 4, "slow": 4}
    assert told["all"]["requests"] == 4, "only polite clients are judged"


def test_violations_are_named() -> None:
    slo = {
        "min_requests": 2,
        "modes": {"default": {"ttfot_p95_seconds": 0.4, "e2e_max_seconds": 2}},
    }
    assert judge(summary([record()]), slo) == [
        "answered requests is 1, below 2",
        "latent: ttfot_p95_seconds is 0.5, above 0.4",
    ]
    assert not judge(summary([record(), record()]), {"min_requests": 2})


def test_failed_and_refused_requests_count_against_the_run() -> None:
    failed = record(status=500, error="x", finish_reason="")
    assert judge(summary([record(), failed]), {}) == ["unexpected outcomes is 1, above 0"]
    refused = record(status=429, finish_reason="", e2e=0.01, retry_after="1")
    assert judge(summary([record(), refused]), {}) == ["rejected ratio is 0.5, above 0"]
    allowed = {"max_rejected_ratio": 1, "retry_after": True, "max_reject_p95_seconds": 0.1}
    assert not judge(summary([record(), refused]), allowed)
    silent = replace(refused, retry_after="")
    assert judge(summary([record(), silent]), allowed) == [
        "refusals without Retry-After is 1, above 0"
    ]
    peak = summary([record(), record(), record()])
    low = judge(summary([record(), refused]), {**allowed, "min_goodput_of_peak": 0.9}, peak)
    assert low == ["goodput of peak is 0.3333, below 0.9"]


def test_report_compares_latent_with_cot_and_overload_with_peak() -> None:
    run = summary([record(), record(mode="cot", ttfot=1.0, e2e=2.0)])
    assert ratios(run)["ttfot_p50"] == 0.5
    assert ratios(run)["e2e_p50"] == 0.5
    refused = record(status=429, finish_reason="", e2e=0.01, retry_after="1")
    told = goodput(summary([record(), record()]), summary([record(), refused]))
    assert told["share_of_peak"] == 0.5
    assert told["rejected_ratio"] == 0.5


@pytest.mark.parametrize("name", ["smoke", "overload"])
def test_slo_files_can_be_judged(name: str) -> None:
    slo = read_slo(str(ROOT / "loadtests" / "slo" / f"{name}.yaml"))
    run = summary([record() for _ in range(100)])
    assert not judge(run, slo, run)


def test_weights_are_read() -> None:
    assert parse_weights("none=1,cot=2.5, latent") == {"none": 1, "cot": 2.5, "latent": 1}

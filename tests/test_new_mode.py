"""A mode is one file and one line: everything else finds it by itself."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest
import torch

from coconut_serve.cli import build_parser
from coconut_serve.params import SwitchParams
from coconut_serve.reasoning import registry
from coconut_serve.reasoning.registry import mode_names, properties_of
from coconut_serve.types import StepStats
from tests import test_docs
from tests.fakes import listening, make_metrics, make_request, native_engine, run, stub_app
from tests.models import load_plain

pytestmark = pytest.mark.torch

PACKAGE = Path(registry.__file__).parents[1]
# What may name a mode: what it is, published settings of it, tools that write checkpoints, and
# the client's types, which are generated.
_MAY_NAME_MODES = (
    "reasoning/modes/", "reasoning/registry.py", "service/presets.py",
    "convert/", "evaluation/", "training/", "client/settings.py",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        registry._MODES, "negated", registry.ModeProperties(where="tests.toy_mode:NegatedMode")
    )


async def test_help_models_metrics_and_api_show_it() -> None:
    parser = build_parser()
    serve = next(a for a in parser._actions if a.dest == "command").choices["serve"]  # type: ignore[index]
    assert "negated" in serve.format_help()
    async with listening(stub_app()) as url, httpx.AsyncClient(base_url=url) as client:
        models = (await client.get("/v1/models")).json()["data"]
        assert "m:negated" in [model["id"] for model in models]
        body = {"model": "m:negated", "messages": [{"role": "user", "content": "hello"}]}
        body |= {"max_tokens": 3, "reasoning": {"steps": 2}}  # type: ignore[dict-item]
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        assert answer["usage"]["reasoning"]["mode"] == "negated"
        assert answer["usage"]["reasoning"]["reasoning_steps"] == 2
        page = (await client.get("/metrics")).text
    labelled = {line.split("{")[0] for line in page.splitlines() if 'reasoning_mode="' in line}
    shown = {line.split("{")[0] for line in page.splitlines() if '"negated"' in line}
    assert labelled == shown > {"coconut_requests_total", "coconut_latent_step_seconds_count"}


async def test_warnings_trace_and_cost_know_it() -> None:
    async with listening(stub_app()) as url, httpx.AsyncClient(base_url=url) as client:
        body = {
            "messages": [{"role": "user", "content": "hello"}],
            "reasoning_mode": "negated",
            "reasoning": {"steps": 2, "trace": "summary", "mixture": {"top_k": 3}},
        }
        answer = (await client.post("/v1/chat/completions", json=body)).json()
    usage = answer["usage"]
    assert usage["completion_tokens_details"]["latent_steps"] == 2
    assert usage["completion_tokens_details"]["distribution_steps"] == 0
    text = "without effect in mode negated: reasoning.mixture.top_k"
    assert usage["reasoning"]["warnings"] == [text]
    kinds = [(step["kind"], step["token_id"]) for step in answer["choices"][0]["reasoning_trace"]]
    assert kinds == [("negated", None)] * 2


def test_schema_shows_it() -> None:
    """In a process of its own: the schema is made when the module is loaded."""
    code = """
from coconut_serve.reasoning import registry
registry._MODES["negated"] = registry.ModeProperties(where="tests.toy_mode:NegatedMode")
from tests.fakes import stub_app
bodies = stub_app().openapi()["components"]["schemas"]
print(bodies["ChatRequest"]["properties"]["reasoning_mode"]["examples"])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "negated" in ast.literal_eval(shown.stdout)


@pytest.mark.parametrize("mode", [*mode_names(), "negated"])
async def test_rows_stand_under_labels_that_are_declared(tiny_llama: Path, mode: str) -> None:
    """Rows of `auto` stood under none, and made a series that nobody had declared."""
    metrics, steps = make_metrics(), []

    def note(stats: StepStats) -> None:
        metrics.observe_step(stats)
        steps.append(stats)

    def labels() -> set[tuple[str, ...]]:
        samples = (s for family in metrics.registry.collect() for s in family.samples)
        return {(s.name, *s.labels.values()) for s in samples}

    before = labels()
    own = properties_of(mode)
    thinking = {"steps": 3, "end": (11,)} if own.thinks else {}
    switch = {"switch": SwitchParams(rule="none")} if own.switches else {}
    request = make_request(mode=mode, max_tokens=4, reasoning=switch, **thinking)  # type: ignore[arg-type]
    async with native_engine(tiny_llama, note) as engine:
        await run(engine, request)
    rows = Counter[str]()
    for stats in steps:
        rows.update({phase: count for (_, phase), count in stats.num_rows.items()})
    num_vectors = 3 if own.feeds_vectors else 0
    fed = metrics.latent_step_seconds
    counts = [s.value for f in fed.collect() for s in f.samples if s.name.endswith("_count")]
    assert labels() == before
    assert rows[own.feeds.value] == (num_vectors or rows["decode"]) > 0
    assert sum(counts) == num_vectors


def test_no_mode_is_named_elsewhere() -> None:
    """What tells modes apart are their properties; values that happen to read alike are listed."""
    words = set(mode_names()) - {"negated"}
    is_value = {  # of other settings
        ("params.py", "distribution"), ("checkpoint/manifest.py", "latent"),
        ("service/model.py", "latent"), ("server/fields.py", "latent"),
    }  # fmt: skip
    is_common = {"none", "auto"}  # of many settings, so only comparisons with a mode count
    found = set[tuple[str, str]]()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(_MAY_NAME_MODES):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in words - is_common:
                found.add((name, str(node.value)))
            elif isinstance(node, ast.Compare) and "mode" in ast.unparse(node.left):
                texts = {str(n.value) for n in ast.walk(node) if isinstance(n, ast.Constant)}
                found |= {(name, word) for word in texts & is_common}
    assert found == is_value


def test_docs_must_explain_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        test_docs.test_every_mode_is_explained("negated")
    told = {name: f"{text}\n`negated`" for name, text in test_docs.DOCS.items()}
    monkeypatch.setattr(test_docs, "DOCS", told)
    test_docs.test_every_mode_is_explained("negated")


async def test_native_engine_runs_it(tiny_llama: Path) -> None:
    """Against a loop that recomputes the whole sequence."""
    ids = (5, 6, 7, 8, 9)
    async with native_engine(tiny_llama) as engine:
        result = await run(engine, make_request(mode="negated", steps=3, end=(11,), max_tokens=5))
    model = load_plain(tiny_llama)
    table = model.get_input_embeddings().weight
    inputs, answer = table[list(ids)], []
    with torch.inference_mode():
        for step in range(3 + 1 + 5):
            out = model(inputs_embeds=inputs[None], use_cache=False, output_hidden_states=True)
            row = -out.hidden_states[-1][0, -1] if step < 3 else table[11]
            if step > 3:
                answer.append(int(out.logits[0, -1].argmax()))
                row = table[answer[-1]]
            inputs = torch.cat([inputs, row[None]])
    assert result.token_ids == answer

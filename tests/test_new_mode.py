"""A mode is one file and one line: everything else finds it by itself."""

from pathlib import Path

import httpx
import pytest
import torch

from coconut_serve.cli import build_parser
from coconut_serve.reasoning import registry
from tests import test_docs
from tests.fakes import listening, make_request, native_engine, run, stub_app
from tests.models import load_plain

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._MODES, "negated", "tests.toy_mode:NegatedMode")


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
    assert 'coconut_requests_total{endpoint="chat",engine="stub"' in page
    assert 'reasoning_mode="negated"' in page


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

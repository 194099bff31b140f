"""What requests get that say nothing: the model's own sampling, and room that is left."""

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from coconut_serve.cli import parse_args
from coconut_serve.config import Settings
from coconut_serve.loading import load_service, serve_config
from tests.fakes import listening, make_metrics, stub_app

DEFAULTS = {"temperature": 0.6, "top_k": 20, "max_tokens": 7}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}


async def test_models_own_sampling_is_used_and_told() -> None:
    """generation_config.json was read for its end tokens alone."""
    async with (
        listening(stub_app(sampling_defaults=DEFAULTS)) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):
        [model, *_] = (await http.get("/v1/models")).json()["data"]
        told = {name: {"value": v, "source": "generation_config"} for name, v in DEFAULTS.items()}
        assert model["sampling_defaults"] == told
        body = {**CHAT, "top_k": 5, "reasoning": {"explain": True}}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        assert answer["usage"]["completion_tokens"] == 7
        info = answer["usage"]["reasoning"]
        assert info["changed"] == {"top_k": 5}, "the model's own are no changes"
        assert info["resolved"]["temperature"] == told["temperature"]
        assert info["resolved"]["top_k"] == {"value": 5, "source": "request"}
        assert info["resolved"]["top_p"] == {"value": 1.0, "source": "default"}
        text = (await http.post("/v1/completions", json={"prompt": "a"})).json()
        assert text["usage"]["completion_tokens"] == 16, "as in vLLM, completions have their own"


@pytest.mark.torch
@pytest.mark.parametrize(("choice", "expected"), [("auto", {"top_k": 3}), ("none", {})])
async def test_flag_says_whether_the_models_defaults_count(
    choice: str, expected: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 3, "eos_token_id": 0}))
    environ = {"COCONUT_GENERATION_CONFIG": choice, "COCONUT_MAX_MODEL_LEN": "64"}
    args = parse_args(["serve", str(tmp_path)], environ)
    settings = Settings.model_validate(args)
    service = await load_service(settings, serve_config(settings), make_metrics())
    try:
        assert service.prompts.sampling_defaults == expected
    finally:
        await service.engine.stop()


async def test_default_answer_is_cut_to_what_the_context_holds(client: openai.AsyncOpenAI) -> None:
    """The answer was 400, of a max_tokens that was not sent."""
    answer = await client.completions.create(model="m", prompt=[5] * 508)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert answer.choices[0].finish_reason == "length"
    latent = await client.completions.create(
        model="m", prompt=[5] * 500, extra_body={"reasoning": {"mode": "latent", "steps": 9}}
    )
    assert latent.usage is not None
    assert latent.usage.completion_tokens == 9 + 3


@pytest.mark.parametrize(
    ("path", "body", "param", "counts"),
    [
        ("/v1/completions", {"prompt": [5] * 512}, "prompt", "513 tokens (512 in the prompt, 1 in"),
        ("/v1/completions", {"prompt": [5] * 500, "max_tokens": 50}, "max_tokens",
         "550 tokens (500 in the prompt, 50 in the completion)"),
        ("/v1/completions", {"prompt": [5] * 700}, "prompt", "the prompt has 700"),
        ("/v1/completions", {"prompt": "a" * 100_000}, "prompt", "longer than"),
        ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 600}, "max_completion_tokens",
         "(19 in the messages, 600 in the completion)"),
        ("/v1/completions",
         {"prompt": [5] * 505, "reasoning": {"mode": "latent", "steps": 9}}, "prompt",
         "(505 in the prompt, 9 in thinking, 1 in the completion)"),
    ],
)  # fmt: skip
async def test_overflow_is_told_as_openai_does(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], param: str, counts: str
) -> None:
    """LiteLLM looks for the first words, LangChain for the code."""
    response = await http.post(path, json=body)
    error = response.json()["error"]
    assert error["message"].startswith("This model's maximum context length is 512 tokens. However")
    assert counts in error["message"]
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")


async def test_one_word_answer_is_small(http: httpx.AsyncClient) -> None:
    """It had 4,549 bytes, of which 4,053 were two copies of 38 settings."""
    body = {**CHAT, "model": "m", "max_tokens": 4, "reasoning_mode": "latent"}
    response = await http.post("/v1/chat/completions", json=body)
    assert len(response.content) < 1000
    info = response.json()["usage"]["reasoning"]
    assert info == response.json()["reasoning_info"]
    assert {*info} == {
        "mode", "latent_steps", "reasoning_steps", "forward_passes", "halt_reason", "switches",
        "latent_ms", "warnings", "changed",
    }  # fmt: skip
    body["reasoning"] = {"explain": True, "steps": 2}
    info = (await http.post("/v1/chat/completions", json=body)).json()["reasoning_info"]
    assert info["resolved"]["steps"] == {"value": 2, "source": "request"}
    assert len(info["resolved"]) > 15
    assert info["changed"]["steps"] == 2


async def test_latent_ms_is_the_time_of_the_thinking_phase() -> None:
    from coconut_serve.config import StubConfig

    stub = StubConfig(ttft_seconds=1.0, tokens_per_second=20)
    async with listening(stub_app(stub=stub)) as url, httpx.AsyncClient(base_url=url) as http:
        for mode, low, high in (("latent", 190, 990), ("none", 0, 0)):
            reasoning = {"mode": mode, **({"steps": 4} if mode == "latent" else {})}
            body = {"prompt": "a", "max_tokens": 12, "reasoning": reasoning}
            response = await http.post("/v1/completions", json=body)
            assert low <= response.json()["reasoning_info"]["latent_ms"] <= high

"""Bad input: status, OpenAI's error body, and the field by name."""

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

import httpx
import openai
import pytest
from pydantic import BaseModel, ValidationError

from coconut_serve.config import StubConfig
from coconut_serve.metrics import Metrics
from coconut_serve.server import reasoning_body, schemas
from coconut_serve.server.reasoning_body import ReasoningBody
from tests.fakes import listening, stub_app

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "a"}

# (what is wrong, body changes, the param that must be named)
BAD_CHAT: list[tuple[str, dict[str, Any], str | None]] = [
    ("no messages", {"messages": None}, "messages"),
    ("empty messages", {"messages": []}, "messages"),
    ("messages no list", {"messages": "hi"}, "messages"),
    ("message no object", {"messages": ["hi"]}, "messages"),
    ("unknown role", {"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
    ("no content", {"messages": [{"role": "user"}]}, "messages.0.content"),
    (
        "image part",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content",
    ),
    ("temperature too high", {"temperature": 2.1}, "temperature"),
    ("temperature text", {"temperature": "hot"}, "temperature"),
    ("temperature boolean", {"temperature": True}, "temperature"),
    ("top_p zero", {"top_p": 0}, "top_p"),
    ("top_k", {"top_k": -2}, "top_k"),
    ("min_p", {"min_p": 1.5}, "min_p"),
    ("max_tokens zero", {"max_tokens": 0}, "max_tokens"),
    ("max_tokens fraction", {"max_tokens": 1.5}, "max_tokens"),
    ("max_tokens beyond context", {"max_tokens": 10_000}, "max_tokens"),
    ("min over max", {"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
    ("beyond context", {"max_completion_tokens": 10_000}, "max_completion_tokens"),
    ("n zero", {"n": 0}, "n"),
    ("n huge", {"n": 20_000}, "n"),
    ("n boolean", {"n": True}, "n"),
    ("five stops", {"stop": list("abcde")}, "stop"),
    ("empty stop", {"stop": [""]}, "stop"),
    ("long stop", {"stop": ["a" * 257]}, "stop"),
    ("stop number", {"stop": 3}, "stop"),
    ("bias value", {"logit_bias": {"5": 101}}, "logit_bias"),
    ("bias key", {"logit_bias": {"hello": 1}}, "logit_bias"),
    ("bias id", {"logit_bias": {"99999": 1}}, "logit_bias"),
    ("bias many", {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ("top_logprobs alone", {"top_logprobs": 3}, "top_logprobs"),
    ("top_logprobs many", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("presence", {"presence_penalty": 3}, "presence_penalty"),
    ("frequency", {"frequency_penalty": -2.5}, "frequency_penalty"),
    ("repetition", {"repetition_penalty": 0}, "repetition_penalty"),
    ("seed", {"seed": 2**63}, "seed"),
    ("stop id", {"stop_token_ids": [999]}, "stop_token_ids"),
    ("stream options alone", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("tools", {"tools": [{"type": "function"}]}, "tools"),
    ("chat_template", {"chat_template": "{{ x }}"}, "chat_template"),
    ("json", {"response_format": {"type": "json_object"}}, "response_format"),
    ("unknown mode", {"reasoning_mode": "latant"}, "reasoning_mode"),
    ("mode number", {"reasoning_mode": 3}, "reasoning_mode"),
    ("misspelt", {"reasoning_mod": "latent"}, "reasoning_mod"),
    ("misspelt latent", {"latent_step": 3}, "latent_step"),
    ("effort", {"reasoning_effort": "extreme"}, "reasoning_effort"),
    ("steps negative", {"reasoning": {"steps": -1}}, "reasoning.steps"),
    ("steps huge", {"reasoning_mode": "latent", "reasoning": {"steps": 999}}, "reasoning.steps"),
    ("reasoning unknown", {"reasoning": {"stepz": 1}}, "reasoning.stepz"),
    ("mixture unknown", {"reasoning": {"mixture": {"topk": 1}}}, "reasoning.mixture.topk"),
    (
        "mixture range",
        {"reasoning_mode": "distribution", "reasoning": {"mixture": {"top_k": 65}}},
        "reasoning.mixture.top_k",
    ),
    (
        "no gate",
        {"reasoning_mode": "distribution", "reasoning": {"mixture": {"kind": "gated"}}},
        "reasoning.mixture.kind",
    ),
    (
        "clamp",
        {"reasoning_mode": "distribution", "reasoning": {"mixture": {"noise_clamp": [2, 1]}}},
        "reasoning.mixture.noise_clamp",
    ),
    (
        "clamp beyond float32",
        {"reasoning_mode": "distribution", "reasoning": {"mixture": {"noise_clamp": [0, 1e300]}}},
        "reasoning.mixture.noise_clamp",
    ),
    (
        "hard token that no model has",
        {"reasoning_mode": "auto", "reasoning": {"switch": {"hard_tokens": [2**70]}}},
        "reasoning.switch.hard_tokens",
    ),
    (
        "greedy multiplex",
        {"reasoning_mode": "distribution", "temperature": 0, "reasoning": {"preset": "multiplex"}},
        "temperature",
    ),
    (
        "blocks",
        {"reasoning_mode": "latent", "reasoning": {"max_blocks": 2}},
        "reasoning.max_blocks",
    ),
    (
        "switch",
        {"reasoning_mode": "auto", "reasoning": {"switch": {"rule": "x"}}},
        "reasoning.switch.rule",
    ),
    (
        "answer tokens",
        {"reasoning_mode": "auto", "reasoning": {"switch": {"answer_tokens": -1}}},
        "reasoning.switch.answer_tokens",
    ),
    (
        "hard tokens",
        {"reasoning_mode": "auto", "reasoning": {"switch": {"hard_tokens": "x"}}},
        "reasoning.switch.hard_tokens",
    ),
    (
        "window",
        {"reasoning_mode": "auto", "reasoning": {"switch": {"window": -1}}},
        "reasoning.switch.window",
    ),
    (
        "branches alike",
        {"reasoning_mode": "latent", "reasoning": {"branches": 2}},
        "reasoning.branches",
    ),
    (
        "too many branches",
        {"reasoning_mode": "latent", "reasoning": {"branches": 33, "latent_noise_std": 1}},
        "reasoning.branches",
    ),
    (
        "picked stream",
        {
            "reasoning_mode": "latent",
            "stream": True,
            "reasoning": {"branches": 2, "latent_noise_std": 1},
        },
        "reasoning.select",
    ),
    ("source", {"reasoning_mode": "latent", "reasoning": {"source": "x"}}, "reasoning.source"),
    (
        "source of another mode",
        {"reasoning_mode": "distribution", "reasoning": {"source": "constant"}},
        "reasoning.source",
    ),
    ("start", {"reasoning_mode": "latent", "reasoning": {"start": "xyz"}}, "reasoning.start"),
    ("end", {"reasoning_mode": "latent", "reasoning": {"end": [1.5]}}, "reasoning.end"),
    (
        "no constant",
        {"reasoning_mode": "latent", "reasoning": {"source": "constant"}},
        "reasoning.source",
    ),
    ("adapter", {"reasoning_mode": "latent", "reasoning": {"adapter": "x"}}, "reasoning.adapter"),
    (
        "no learned rows",
        {"reasoning_mode": "latent", "reasoning": {"halt": {"rule": "learned"}}},
        "reasoning.halt.rule",
    ),
    (
        "halt rule",
        {"reasoning_mode": "latent", "reasoning": {"halt": {"rule": ["x"]}}},
        "reasoning.halt.rule",
    ),
    (
        "fixed and another",
        {"reasoning_mode": "latent", "reasoning": {"halt": {"rule": ["fixed", "learned"]}}},
        "reasoning.halt.rule",
    ),
    (
        "no rules",
        {"reasoning_mode": "latent", "reasoning": {"halt": {"rule": []}}},
        "reasoning.halt.rule",
    ),
    (
        "rule without its setting",
        {"reasoning_mode": "latent", "reasoning": {"halt": {"rule": "cold_stop"}}},
        "reasoning.halt.entropy_below",
    ),
    (
        "no bound",
        {"reasoning_mode": "latent", "reasoning": {"halt": {"converge_metric": "cosine"}}},
        "reasoning.halt.converge_below",
    ),
    (
        "stop_test",
        {"reasoning_mode": "latent", "reasoning": {"halt": {"stop_test": "x"}}},
        "reasoning.halt.stop_test",
    ),
    (
        "min_steps",
        {"reasoning_mode": "latent", "reasoning": {"steps": 2, "min_steps": 3}},
        "reasoning.min_steps",
    ),
    (
        "stop token",
        {"reasoning_mode": "latent", "reasoning": {"halt": {"stop_tokens": [9999]}}},
        "reasoning.halt.stop_tokens",
    ),
    (
        "negative stop token",
        {"reasoning_mode": "latent", "reasoning": {"halt": {"stop_tokens": [-3]}}},
        "reasoning.halt.stop_tokens",
    ),
    (
        "noise of a kind without",
        {
            "reasoning_mode": "distribution",
            "reasoning": {"branches": 2, "mixture": {"kind": "full", "noise": "gumbel"}},
        },
        "reasoning.branches",
    ),
    ("total", {"reasoning": {"max_total_steps": 0}}, "reasoning.max_total_steps"),
    ("after", {"reasoning": {"after": {"top_p": 0}}}, "reasoning.after.top_p"),
    ("after unknown", {"reasoning": {"after": {"topk": 1}}}, "reasoning.after.topk"),
    ("pad", {"reasoning": {"pad_positions": 1}}, "reasoning.pad_positions"),
    ("thinking seed", {"reasoning": {"seed": 2**63}}, "reasoning.seed"),
    ("speed", {"reasoning": {"speed": 0}}, "reasoning.speed"),
    ("speed in words", {"reasoning": {"speed": "fast"}}, "reasoning.speed"),
    ("speed list", {"reasoning": {"speed": [1]}}, "reasoning.speed"),
    ("no speed here", {"reasoning": {"speed": 2}}, "reasoning.speed"),
    ("preset", {"reasoning": {"preset": "magic"}}, "reasoning.preset"),
    ("trace level", {"reasoning": {"trace": "vectors"}}, "reasoning.trace"),
    ("request id", {"request_id": "a\nb"}, "request_id"),
    ("template kwargs", {"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs.a"),
    (
        "template smuggled in",
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        "chat_template_kwargs.chat_template",
    ),
    (
        "template argument",
        {"chat_template_kwargs": {"return_dict": True}},
        "chat_template_kwargs.return_dict",
    ),
    ("top_k beyond int32", {"top_k": 2**63}, "top_k"),
    ("bias key endless", {"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    (
        "patience beyond int64",
        {
            "reasoning_mode": "distribution",
            "reasoning": {"halt": {"entropy_below": 1, "entropy_patience": 2**70}},
        },
        "reasoning.halt.entropy_patience",
    ),
    (
        "two efforts",
        {"reasoning_effort": "low", "reasoning": {"effort": "high"}},
        "reasoning.effort",
    ),
]
BAD_TEXT: list[tuple[str, dict[str, Any], str | None]] = [
    ("no prompt", {"prompt": None}, "prompt"),
    ("empty prompt", {"prompt": ""}, "prompt"),
    ("no prompts", {"prompt": []}, "prompt"),
    ("empty ids", {"prompt": [[]]}, "prompt"),
    ("mixed", {"prompt": ["a", 3]}, "prompt"),
    ("id too large", {"prompt": [99999]}, "prompt"),
    ("id negative", {"prompt": [-1]}, "prompt"),
    ("too many prompts", {"prompt": ["a"] * 129}, "prompt"),
    ("prompt too long", {"prompt": "a" * 600}, "prompt"),
    ("suffix", {"suffix": "x"}, "suffix"),
    ("best_of", {"best_of": 2}, "best_of"),
]
# A value below and one above what each number of `reasoning` may be.
OUTSIDE: dict[str, tuple[float, float]] = {
    "steps": (-1, 2**40), "min_steps": (-1, 2**40), "max_blocks": (0, 65),
    "max_total_steps": (0, 2**40), "latent_noise_std": (-0.1, 11), "latent_temperature": (-1, 5.1),
    "soft_weight": (-0.1, 1.1), "branches": (0, 33), "trace_top_k": (0, 21),
    "seed": (-(2**64), 2**63), "mixture.top_k": (0, 65), "mixture.temperature": (-4, 5.1),
    "mixture.top_p": (0, 1.1), "mixture.filter_top_k": (-1, 65), "mixture.min_p": (-0.1, 1),
    "mixture.noise_temperature": (0, 11), "mixture.dirichlet_alpha": (0, 10_001),
    "mixture.moi_beta": (-50, 2e6), "halt.stop_temperature": (0, 101), "halt.stop_prob": (-0.1, 2),
    "halt.entropy_below": (-1, 21), "halt.entropy_patience": (0, 2**40),
    "halt.entropy_above": (-1, 21), "halt.converge_below": (-1, 101),
    "halt.converge_patience": (0, 2**40), "switch.p_max": (-0.1, 1.1), "switch.window": (-1, 2**40),
    "switch.alpha": (-0.1, 1.1), "switch.beta": (-0.1, 1.1), "switch.max_switches": (-1, 2**40),
    "switch.answer_tokens": (-1, 2**40), "after.temperature": (-0.1, 2.1), "after.top_p": (0, 1.1),
    "after.top_k": (-2, 2**31), "after.min_p": (-0.1, 1.1),
}  # fmt: skip
CASES = [("/v1/chat/completions", CHAT, *case) for case in BAD_CHAT] + [
    ("/v1/completions", TEXT, *case) for case in BAD_TEXT
]


def check_shape(response: httpx.Response) -> dict[str, Any]:
    """OpenAI's ErrorObject and nothing else."""
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert len(response.content) < 4096
    return error


async def test_bad_bodies_get_400_and_the_name_of_the_field(http: httpx.AsyncClient) -> None:
    assert len(CASES) >= 30
    for path, base, what, changes, param in CASES:
        body = {k: v for k, v in {**base, **changes}.items() if v is not None}
        response = await http.post(path, json=body)
        assert response.status_code == 400, (what, response.text)
        error = check_shape(response)
        assert error["param"] == param, (what, error)


@pytest.mark.parametrize("mode", ["none", "cot", "latent", "distribution", "auto"])
async def test_numbers_out_of_range_are_refused_in_modes_that_do_not_read_them_too(
    http: httpx.AsyncClient, mode: str
) -> None:
    """`cot` with `latent_noise_std: 11` was answered, with no more than a warning."""
    for name, values in OUTSIDE.items():
        part, _, key = name.rpartition(".")
        for value in values:
            asked = {part: {key: value}} if part else {key: value}
            body = {**CHAT, "reasoning_mode": mode, "reasoning": asked}
            response = await http.post("/v1/chat/completions", json=body)
            assert response.status_code == 400, (name, value, response.text)
            assert check_shape(response)["param"] == f"reasoning.{name}", (name, value)


def test_every_number_of_reasoning_has_values_out_of_range() -> None:
    def numbers(body: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, declared in body.model_fields.items():
            for part in get_args(declared.annotation):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    yield from numbers(part, f"{prefix}{name}.")
                    continue
                inner = get_args(part)[0] if get_origin(part) is Annotated else part
                if inner in (int, float):
                    yield prefix + name

    others = {"start", "end", "speed", "halt.rule", "replay.steps", "replay.steps.token_id"}
    assert {*numbers(ReasoningBody, "")} - others == {*OUTSIDE}


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b"", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b'{"model": "m", "prompt": NaN}', {}, 400),
        (b'{"a":' * 100_000, {}, 400),
        (b'{"model": "m", "prompt": "\\ud800"}', {}, 400),
        (b'{"model": "m", "prompt": ' + b"[" * 900 + b"1" + b"]" * 900 + b"}", {}, 400),
        (b'{"model": "m", "prompt": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}", {}, 200),
        (b"x" * (4 * 1024 * 1024 + 1), {}, 413),
        (b"prompt=a", {"content-type": "application/x-www-form-urlencoded"}, 415),
    ],
)
async def test_odd_bodies(
    http: httpx.AsyncClient, content: bytes, headers: dict[str, str], status: int
) -> None:
    response = await http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == status
    if status != 200:
        check_shape(response)


async def test_misspelling_gets_a_suggestion(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/chat/completions", json={**CHAT, "reasoning_mod": "latent"})
    assert "did you mean 'reasoning_mode'?" in response.json()["error"]["message"]
    response = await http.post("/v1/chat/completions", json={**CHAT, "reasoning_mode": "latant"})
    assert "did you mean 'latent'?" in response.json()["error"]["message"]


async def test_two_different_modes_are_a_conflict(http: httpx.AsyncClient) -> None:
    clashes: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"reasoning_mode": "latent", "reasoning": {"mode": "cot"}}, {}),
        ({"reasoning_mode": "latent"}, {"X-Reasoning-Mode": "cot"}),
        ({"reasoning_mode": "latent", "model": "m:cot"}, {}),
        ({"reasoning_mode": "latent", "reasoning_effort": "none"}, {}),
    ]
    for body, headers in clashes:
        response = await http.post("/v1/chat/completions", json={**CHAT, **body}, headers=headers)
        assert check_shape(response)["code"] == "reasoning_mode_conflict"
    same = {"reasoning_mode": "latent", "model": "m:latent", "max_tokens": 1}
    response = await http.post("/v1/chat/completions", json={**CHAT, **same})
    assert response.status_code == 200


async def test_unknown_model_and_route(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/chat/completions", json={**CHAT, "model": "gpt-9"})
    assert response.status_code == 404
    assert check_shape(response)["code"] == "model_not_found"
    response = await http.get("/v1/nothing")
    assert response.status_code == 404
    check_shape(response)
    response = await http.get("/v1/chat/completions")
    assert response.status_code == 405
    check_shape(response)


async def test_strict_params_rejects_unknown_fields() -> None:
    async with listening(stub_app(strict_params=True)) as url, httpx.AsyncClient(base_url=url) as c:
        response = await c.post("/v1/chat/completions", json={**CHAT, "frobnicate": 1})
        assert response.status_code == 400
        assert check_shape(response)["param"] == "frobnicate"


async def test_keys_guard_everything_but_probes() -> None:
    app = stub_app(api_keys=("secret-1", "secret-2"))
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as c:
        for path in ("/health", "/ready"):
            assert (await c.get(path)).status_code == 200
        for path in ("/metrics", "/v1/models", "/version", "/openapi.json", "/nothing"):
            response = await c.get(path)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            check_shape(response)
        for key in ("x", "secret", "secret-11", "SECRET-1"):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await c.get("/v1/models", headers=headers)).status_code == 401
        for key in ("secret-1", "secret-2"):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await c.get("/v1/models", headers=headers)).status_code == 200
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="no", max_retries=0) as stock:
            with pytest.raises(openai.AuthenticationError) as caught:
                await stock.models.list()
            assert caught.value.code == "invalid_api_key"


async def test_request_ids_are_echoed_only_when_well_formed(http: httpx.AsyncClient) -> None:
    response = await http.get("/health", headers={"X-Request-Id": "abc-1.2_3"})
    assert response.headers["x-request-id"] == "abc-1.2_3"
    for bad in ("a b", "x" * 129, 'a"b'):
        response = await http.get("/health", headers={"X-Request-Id": bad})
        assert response.headers["x-request-id"] != bad
        assert len(response.headers["x-request-id"]) == 32
    assert response.headers["openai-processing-ms"].isdigit()


async def test_error_after_the_first_byte_is_an_event_then_done() -> None:
    app = stub_app(stub=StubConfig(fail_at_token=2))
    async with listening(app) as url:
        async with httpx.AsyncClient(base_url=url) as c:
            body = {**TEXT, "stream": True}
            response = await c.post("/v1/completions", json=body)
            assert response.status_code == 200
            events = [line for line in response.text.split("\n\n") if line]
            assert events[-1] == "data: [DONE]"
            error = json.loads(events[-2].removeprefix("data: "))["error"]
            assert error["code"] == "generation_failed"
            metrics: Metrics = app.state.metrics
            assert metrics.total(metrics.errors) == 1
            response = await c.post("/v1/completions", json=TEXT)
            assert response.status_code == 500
            assert response.headers["x-should-retry"] == "false"
            check_shape(response)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as stock:
            stream = await stock.completions.create(model="m", prompt="a", stream=True)
            with pytest.raises(openai.APIError, match="scripted"):
                async for _ in stream:
                    pass


async def test_dead_engine_answers_503_everywhere() -> None:
    app = stub_app(stub=StubConfig(fail_after_requests=1))
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as c:
        assert (await c.post("/v1/completions", json=TEXT)).status_code == 200
        for _ in range(2):
            response = await c.post("/v1/completions", json=TEXT)
            assert response.status_code == 503
            assert check_shape(response)["code"] == "engine_dead"
            assert response.headers["retry-after"] == "5"
        assert (await c.get("/health")).status_code == 503
        assert (await c.get("/ready")).status_code == 503
        assert "coconut_engine_up" in (await c.get("/metrics")).text


async def test_full_queue_answers_429_and_every_request_ends() -> None:
    """200 requests against a queue of 32: each gets an answer or a 429 with Retry-After."""
    app = stub_app(stub=StubConfig(tokens_per_second=400.0), max_num_seqs=8, max_queue=32)
    async with listening(app) as url:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as c:
            body = {**TEXT, "max_tokens": 8}
            responses = await asyncio.gather(
                *(c.post("/v1/completions", json=body) for _ in range(200))
            )
            codes = [r.status_code for r in responses]
            assert set(codes) == {200, 429}
            assert codes.count(200) >= 40
            for response in responses:
                if response.status_code == 429:
                    assert check_shape(response)["code"] == "queue_full"
                    assert 1 <= int(response.headers["retry-after"]) <= 60
                else:
                    assert response.json()["usage"]["completion_tokens"] == 8
            assert (await c.post("/v1/completions", json=body)).status_code == 200
        assert app.state.service.admission.num_in_flight == 0


async def test_n_larger_than_the_server_is_refused_for_good() -> None:
    """A 429 would promise that coming back helps."""
    app = stub_app(max_num_seqs=2, max_queue=1)
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as c:
        response = await c.post("/v1/completions", json={**TEXT, "n": 4})
        assert response.status_code == 400
        assert check_shape(response)["param"] == "n"
        response = await c.post("/v1/completions", json={**TEXT, "n": 3})
        assert response.status_code == 200


async def test_null_means_not_given(http: httpx.AsyncClient) -> None:
    body = {**TEXT, "echo": None, "skip_special_tokens": None, "n": None, "reasoning": None}
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200
    nested: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": None},
        "reasoning": {"steps": None, "mixture": {"top_k": None}, "unheard_of": None},
    }
    response = await http.post("/v1/completions", json={**TEXT, **nested})
    assert response.status_code == 200


async def test_two_calls_with_the_same_id_get_their_own_answers(http: httpx.AsyncClient) -> None:
    """The engine once keyed its streams by the client's id: answers went to the wrong client."""
    headers = {"X-Request-Id": "same"}
    prompts = ["ab", "cd", "ef", "gh"]
    answers = await asyncio.gather(
        *(
            http.post("/v1/completions", json={**TEXT, "prompt": p, "n": 2}, headers=headers)
            for p in prompts
        )
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.json()["id"] == "cmpl-same"
        assert [c["text"][:2] for c in answer.json()["choices"]] == [prompt, prompt]


async def test_settings_that_do_not_apply_are_named_in_a_warning(http: httpx.AsyncClient) -> None:
    reasoning = {"mode": "cot", "mixture": {"top_k": 5}, "end": "none"}
    response = await http.post("/v1/completions", json={**TEXT, "reasoning": reasoning})
    [warning] = response.json()["usage"]["reasoning"]["warnings"]
    assert "reasoning.end, reasoning.mixture.top_k" in warning


async def test_preset_wins_over_the_servers_default_mode() -> None:
    app = stub_app(default_reasoning_mode="cot")
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as c:
        body = {**TEXT, "reasoning": {"preset": "soft_thinking", "steps": 2}}
        response = await c.post("/v1/completions", json=body)
        assert response.headers["x-reasoning-mode"] == "distribution"
        response = await c.post("/v1/completions", json=TEXT)
        assert response.headers["x-reasoning-mode"] == "cot"


@pytest.mark.parametrize(
    "part",
    [
        {"tokens": {"never_emit": [99999]}},
        {"tokens": {"think_end": {"id": 99999}}},
        {"prompt": {"mode_suffix_ids": {"none": [99999]}}},
    ],
)
async def test_token_ids_that_the_model_lacks_are_refused_at_start(part: dict[str, Any]) -> None:
    from coconut_serve.checkpoint.manifest import Manifest

    manifest = Manifest.model_validate({"schema": 1, **part})
    failures: list[object] = []
    app = stub_app(manifest=manifest)
    app.state.on_loaded = failures.append
    async with app.router.lifespan_context(app):
        async with asyncio.timeout(5):
            while not failures:
                await asyncio.sleep(0.01)
    assert "99999" not in str(failures[0])
    assert "259 and above" in str(failures[0])


BODIES = (
    schemas.ChatRequest, schemas.CompletionRequest, schemas.TokenizeRequest,
    schemas.DetokenizeRequest, reasoning_body.ReasoningBody, reasoning_body.MixtureBody,
    reasoning_body.HaltBody, reasoning_body.SwitchBody, reasoning_body.AfterBody,
    reasoning_body.ReplayBody,
)  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_a_list_of_wrong_items_is_one_complaint(body: type[BaseModel]) -> None:
    """One for each of a million took twenty seconds and a gigabyte, on everybody's event loop."""
    many = 2000
    lists: list[Any] = [[object()] * many, [[object()] * many] * many]
    for name in body.model_fields:
        for wrong in (*lists, {str(i): object() for i in range(many)}):
            try:
                body.model_validate({name: wrong})
            except ValidationError as error:
                complaints = [e for e in error.errors() if e["loc"][0] == name]
                assert len(complaints) < 10, name


async def test_long_ids_are_refused_before_they_are_looked_at(http: httpx.AsyncClient) -> None:
    for prompt in ([5] * 100_000, [[5], [-7] * 100_000]):
        response = await http.post("/v1/completions", json={**TEXT, "prompt": prompt})
        assert response.status_code == 400
        assert check_shape(response)["code"] == "context_length_exceeded"


async def test_media_types_have_no_case(http: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    response = await http.post("/v1/completions", content=json.dumps(TEXT), headers=headers)
    assert response.status_code == 200


async def test_long_text_is_refused_before_it_is_tokenised(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={**TEXT, "prompt": "a" * 100_000})
    assert response.status_code == 400
    assert check_shape(response)["code"] == "context_length_exceeded"


async def test_log_lines_hold_no_line_breaks_of_a_client(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="coconut_serve.access")
    await http.get("/v1/x%0aFAKE%20LINE")
    [message] = [r.getMessage() for r in caplog.records if "FAKE" in r.getMessage()]
    assert "\n" not in message


async def test_effort_and_preset_without_effect_are_named(http: httpx.AsyncClient) -> None:
    body = {**TEXT, "reasoning_effort": "low", "reasoning": {"preset": "coconut", "mode": "cot"}}
    response = await http.post("/v1/completions", json=body)
    [warning] = response.json()["usage"]["reasoning"]["warnings"]
    assert "reasoning.preset, reasoning_effort" in warning

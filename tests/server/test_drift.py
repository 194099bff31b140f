"""Each request field of OpenAI, vLLM, SGLang and llama.cpp is supported, accepted or rejected."""

import time
import typing
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from coconut_serve.server import fields, schemas
from tests.fakes import listening, stub_app


def words(text: str) -> list[str]:
    return text.split()


SUPPORTED = {*schemas.ChatRequest.model_fields, *schemas.CompletionRequest.model_fields}
# As of SGLang 004c82e, ChatCompletionRequest and CompletionRequest.
SGLANG = words("""
    best_of bootstrap_host bootstrap_port bootstrap_room cache_salt chat_template_kwargs
    continue_final_message custom_labels custom_logit_processor custom_params
    data_parallel_rank disagg_prefill_dp_rank ebnf echo extra_key frequency_penalty ignore_eos
    images_config input_ids json_schema logit_bias logprobs lora_path max_completion_tokens
    max_dynamic_patch max_tokens messages min_dynamic_patch min_p min_tokens model n
    ngram_corpus_id no_stop_trim parallel_tool_calls presence_penalty priority prompt reasoning
    reasoning_effort regex repetition_penalty response_format return_cached_tokens_details
    return_hidden_states return_meta_info return_prompt_token_ids return_routed_experts
    return_token_ids rid routed_dp_rank routed_experts_start_len seed separate_reasoning
    session_id session_params skip_special_tokens stop stop_regex stop_token_ids stream
    stream_options stream_reasoning suffix task temperature tool_choice tools top_k
    top_logprobs top_p use_audio_in_video user
""")
# As of llama.cpp 00dc805, tools/server/README.md, and older names of its own that clients send.
LLAMA_CPP = words("""
    add_generation_prompt cache_prompt chat_template_kwargs dry_allowed_length dry_base
    dry_multiplier dry_penalty_last_n dry_sequence_breakers dynatemp_exponent dynatemp_range
    frequency_penalty generation_prompt grammar grammar_lazy grammar_triggers id_slot
    ignore_eos image_data json_schema logit_bias lora max_tokens messages min_keep min_p
    mirostat mirostat_eta mirostat_tau n_cache_reuse n_cmpl n_indent n_keep n_predict n_probs
    parallel_tool_calls parse_tool_calls penalize_nl post_sampling_probs presence_penalty
    preserved_tokens prompt reasoning_budget_tokens reasoning_control reasoning_format
    repeat_last_n repeat_penalty response_fields response_format return_progress return_tokens
    samplers seed sse_ping_interval stop stream t_max_predict_ms temperature tfs_z
    thinking_budget_tokens timings_per_token top_k top_n_sigma top_p typical_p xtc_probability
    xtc_threshold
""")
# Fields that clients send to any server, of no API above; ignored, and named in a header.
HARMLESS = words("""
    api_base app cache code conversation_id custom_id debug end_user extra extra_headers
    fallbacks finish_reason group id input kwargs label latest locale mask name node
    num_retries organization output project query region request_timeout retries rethink scale
    softmax_dtype state stop_reason tag tags tenant thread_id timeout timestamp top_a trace_id
    type user_id value version
""")
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
TEXT: dict[str, Any] = {"prompt": "a", "max_tokens": 1}


def unsorted(names: typing.Iterable[str]) -> set[str]:
    return {*names} - SUPPORTED - fields.ACCEPTED - {*fields.REJECTED}


@pytest.mark.parametrize(
    "params",
    [chat_params.CompletionCreateParamsStreaming, text_params.CompletionCreateParamsStreaming],
)
def test_every_openai_field_is_sorted(params: type) -> None:
    assert not unsorted(typing.get_type_hints(params)), "decide what the server does with these"


@pytest.mark.parametrize("names", [SGLANG, LLAMA_CPP], ids=["sglang", "llama.cpp"])
def test_every_field_of_other_servers_is_sorted(names: list[str]) -> None:
    assert not unsorted(names)


@pytest.mark.vllm
def test_every_vllm_field_is_sorted() -> None:
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as completion

    bodies = [chat.ChatCompletionRequest, chat.BatchChatCompletionRequest]
    for body in (*bodies, completion.CompletionRequest):
        assert not unsorted(body.model_fields), body.__name__


def test_sorting_is_disjoint() -> None:
    assert not SUPPORTED & fields.ACCEPTED
    assert not SUPPORTED & {*fields.REJECTED}
    assert not fields.ACCEPTED & {*fields.REJECTED}
    assert {*fields.INSTEAD} <= {*fields.REJECTED}


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)]
)
async def test_what_changes_an_answer_is_refused_by_name(
    http: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    """structured_outputs, grammar and the like were only named in a header, with 200."""
    for name, neutral in fields.REJECTED.items():
        response = await http.post(path, json={**body, name: {"a": "b"}})
        assert response.status_code == 400, name
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        for value in neutral:
            taken = await http.post(path, json={**body, name: value})
            assert taken.status_code == 200, (name, value)
    taken = await http.post(path, json={**body, **dict.fromkeys(fields.ACCEPTED, "x")})
    assert taken.status_code == 200
    assert "x-coconut-ignored-params" not in taken.headers


async def test_fields_of_the_other_endpoint_are_refused(http: httpx.AsyncClient) -> None:
    """max_completion_tokens of a completion had no effect."""
    for url, body, name in (
        ("/v1/completions", TEXT, "max_completion_tokens"),
        ("/v1/completions", TEXT, "continue_final_message"),
        ("/v1/chat/completions", CHAT, "echo"),
    ):
        response = await http.post(url, json={**body, name: True})
        assert response.json()["error"]["param"] == name
        assert (await http.post(url, json={**body, name: False})).status_code == 200


async def test_structured_completions_are_refused(http: httpx.AsyncClient) -> None:
    """response_format of a completion was ignored."""
    answers = [
        await http.post("/v1/completions", json={**TEXT, "response_format": {"type": kind}})
        for kind in ("text", "json_object")
    ]
    assert [answer.status_code for answer in answers] == [200, 400]
    assert answers[1].json()["error"]["param"] == "response_format"


async def test_harmless_fields_are_like_none_of_ours(http: httpx.AsyncClient) -> None:
    for url, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        response = await http.post(url, json={**body, **dict.fromkeys(HARMLESS, "x")})
        assert response.status_code == 200, response.text
        named = response.headers["x-coconut-ignored-params"].split(",")
        assert sorted(named) == sorted(HARMLESS)


@pytest.mark.parametrize(
    ("extra", "param", "meant"),
    [
        ({"resoning_mode": "latent"}, "resoning_mode", "reasoning_mode"),
        ({"reasonning_mode": "latent"}, "reasonning_mode", "reasoning_mode"),
        ({"reasoningMode": "latent"}, "reasoningMode", "reasoning_mode"),
        ({"mode": "latent"}, "mode", "reasoning.mode"),
        ({"reasoning_steps": 3}, "reasoning_steps", "reasoning.steps"),
        ({"preste": "coconut"}, "preste", "reasoning.preset"),
        ({"mixture_top_k": 3}, "mixture_top_k", "reasoning.mixture.top_k"),
        ({"temprature": 0}, "temprature", "temperature"),
        ({"topk": 3}, "topk", "top_k"),
        ({"maxTokens": 3}, "maxTokens", "max_tokens"),
        ({"reasoning": {"top_k": 3}}, "reasoning.top_k", "reasoning.mixture.top_k"),
        ({"reasoning": {"mixture": {"rule": "swi"}}}, "reasoning.mixture.rule",
         "reasoning.halt.rule"),
        ({"reasoning": {"halt": {"rul": "auto"}}}, "reasoning.halt.rul", "reasoning.halt.rule"),
        ({"reasoning": {"mixtur": {"top_k": 3}}}, "reasoning.mixtur", "reasoning.mixture"),
        ({"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge",
         "stream_options.include_usage"),
        ({"latent_speed_up": 3}, "latent_speed_up", None),
    ],
)  # fmt: skip
async def test_misspelt_and_misplaced_fields_name_the_right_path(
    http: httpx.AsyncClient, extra: dict[str, Any], param: str, meant: str | None
) -> None:
    """resoning_mode and a top-level mode answered in the default mode; suggestions had no path."""
    response = await http.post("/v1/chat/completions", json={**CHAT, **extra})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, "unknown_parameter")
    hint = f"; did you mean {meant!r}?" if meant else ""
    assert error["message"] == f"unknown field {param!r}{hint}"


async def test_unknown_fields_cost_little_and_are_bounded(http: httpx.AsyncClient) -> None:
    """Each is compared with every field: ten thousand must not hold everybody up."""
    many = {"x" * 100_000: 1} | {f"frobnicate_{i}": 1 for i in range(10_000)}
    response = await http.post("/v1/completions", json={**TEXT, **many})
    assert response.status_code == 400
    assert "more than 64 unknown fields" in response.json()["error"]["message"]


async def test_unknown_parts_of_options_are_named(http: httpx.AsyncClient) -> None:
    """They were dropped in silence."""
    options = {"include_usage": True, "frobnicate": 1}
    body = {**TEXT, "stream": True, "stream_options": options}
    response = await http.post("/v1/completions", json=body)
    assert response.headers["x-coconut-ignored-params"] == "stream_options.frobnicate"
    async with listening(stub_app(strict_params=True)) as url, httpx.AsyncClient() as strict:
        response = await strict.post(f"{url}/v1/completions", json=body)
        assert response.json()["error"]["param"] == "stream_options.frobnicate"


async def test_continued_message_is_continued(http: httpx.AsyncClient) -> None:
    """continue_final_message and add_generation_prompt were only named in a header."""
    path, messages = "/v1/chat/completions", [{"role": "assistant", "content": "ab"}]
    for options, prompt in (
        ({}, "assistant: ab\nassistant: "),
        ({"continue_final_message": True}, "assistant: ab"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "assistant: ab"),
        ({"add_generation_prompt": False}, "assistant: ab\n"),
    ):
        body = {"messages": messages, "max_tokens": 1, "return_token_ids": True, **options}
        answer = (await http.post(path, json=body)).json()
        assert bytes(answer["prompt_token_ids"]).decode() == prompt
        ids = (await http.post("/tokenize", json={"messages": messages, **options})).json()
        assert ids["tokens"] == answer["prompt_token_ids"]
    both = {"continue_final_message": True, "add_generation_prompt": True}
    response = await http.post(path, json={"messages": messages, **both})
    assert response.json()["error"]["param"] == "continue_final_message"


async def test_truncated_prompt_is_echoed_as_it_was_used(http: httpx.AsyncClient) -> None:
    body = {**TEXT, "prompt": "abcdef", "truncate_prompt_tokens": 2, "echo": True}
    answer = (await http.post("/v1/completions", json=body)).json()
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["choices"][0]["text"].startswith("ef")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("allowed_token_ids", []), ("allowed_token_ids", [999]), ("allowed_token_ids", [1] * 1025),
        ("bad_words", [""]), ("bad_words", ["a"] * 129), ("bad_words", ["a" * 1025]),
        ("bad_words", "a"), ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", 513),
        ("truncate_prompt_tokens", -2), ("add_special_tokens", "yes"),
    ],
)  # fmt: skip
async def test_restrictions_out_of_range_are_refused(
    http: httpx.AsyncClient, name: str, wrong: object
) -> None:
    response = await http.post("/v1/completions", json={**TEXT, name: wrong})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name
    kept = {**TEXT, "allowed_token_ids": [5], "bad_words": ["ab"], "add_special_tokens": False}
    assert (await http.post("/v1/completions", json=kept)).status_code == 200


async def test_a_name_of_many_words_costs_nothing(http: httpx.AsyncClient) -> None:
    """Each word was compared with ours: 270 kB of them stopped the server for three seconds."""
    name = "_".join(["thinkxxx"] * 30_000)
    started = time.perf_counter()
    response = await http.post("/v1/chat/completions", json={**CHAT, name: 1})
    assert response.status_code == 200
    assert time.perf_counter() - started < 1
    long = await http.post("/v1/chat/completions", json={**CHAT, "reasoning": {"think" * 999: 1}})
    assert len(long.text) < 4000


async def test_what_is_kept_fits_beside_the_default_answer(http: httpx.AsyncClient) -> None:
    """truncate_prompt_tokens -1 left one token for an answer that has sixteen by default."""
    body = {"prompt": "x" * 600, "truncate_prompt_tokens": -1}
    usage = (await http.post("/v1/completions", json=body)).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (512 - 16, 16)

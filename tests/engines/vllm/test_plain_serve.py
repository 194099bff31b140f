"""vLLM's own OpenAI server with our plugin: `vllm_xargs` choose how a request thinks."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes import free_port, make_request, native_engine, run

pytestmark = pytest.mark.vllm

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def server(wide_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`vllm serve` of the golden Llama; its CPU build has no such command, only the module."""
    port = free_port()
    environment = {
        **os.environ,
        "COCONUT_VLLM": "1",
        "COCONUT_TEST_KERNELS": "torch",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(wide_llama),
        "--skip-tokenizer-init", "--dtype", "float32", "--enforce-eager", "--block-size", "32",
        "--max-model-len", "96", "--max-num-seqs", "8", "--host", "127.0.0.1",
        "--port", str(port), "--served-model-name", "m", "--enable-prompt-embeds",
        "--logits-processors", "coconut_serve.engines.vllm.params:ReasoningParamsCheck",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("plain") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline:
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def ask(server: str, max_tokens: int, **body: Any) -> httpx.Response:
    body = {
        "model": "m", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0,
        "detokenize": False, "return_token_ids": True, "ignore_eos": True, **body,
    }  # fmt: skip
    return httpx.post(f"{server}/v1/completions", json=body, timeout=60)


def token_ids(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    found: list[int] = response.json()["choices"][0]["token_ids"]
    return found


async def test_modes_by_xargs_give_what_our_engines_give(server: str, wide_llama: Path) -> None:
    """Also side by side, and a plain request is not touched."""
    thinking: dict[str, Any] = {"reasoning_steps": 3, "reasoning_end_token_ids": [126]}
    bodies: list[dict[str, Any]] = [
        {},
        {"vllm_xargs": {"reasoning_mode": "cot", **thinking}},
        {"vllm_xargs": {"reasoning_mode": "latent", "reasoning_hidden_token_id": 127, **thinking}},
        {"vllm_xargs": {"reasoning_mode": "distribution", "reasoning_top_k": 4, **thinking}},
    ]
    answers = await asyncio.gather(
        *(asyncio.to_thread(ask, server, 5 if not body else 9, **body) for body in bodies)
    )
    from coconut_serve.params import MixtureParams

    async with native_engine(wide_llama) as native:
        for mode, answer in zip(("none", "cot", "latent", "distribution"), answers, strict=True):
            mixture = MixtureParams(top_k=4)
            request = make_request(
                mode=mode, steps=0 if mode == "none" else 3,
                end=() if mode == "none" else (126,), max_tokens=5,
                reasoning={"mixture": mixture},
            )  # fmt: skip
            result = await run(native, request)
            thought = [127 if t is None else t for t in result.thinking_ids]
            expected = [*thought, *([126] if mode != "none" else []), *result.token_ids]
            assert token_ids(answer) == expected, mode


def test_log_probabilities_of_a_thinking_step_are_the_models(server: str) -> None:
    xargs = {
        "reasoning_mode": "latent", "reasoning_steps": 2, "reasoning_hidden_token_id": 127,
    }  # fmt: skip
    answer = ask(server, 3, vllm_xargs=xargs, logprobs=2, return_tokens_as_token_ids=True)
    assert token_ids(answer)[:2] == [127, 127]
    logprobs = answer.json()["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == 3
    assert all(-20 < value < 0 for value in logprobs["token_logprobs"])


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"reasoning_mode": "latnet"}, "reasoning_mode must be one of"),
        ({"reasoning_mode": "latent", "reasoning_steps": 3}, "reasoning_hidden_token_id"),
        ({"reasoning_mode": "cot"}, "reasoning_steps is needed"),
        ({"reasoning_mode": "cot", "reasoning_steps": 10**9, "reasoning_x": 1}, "is not known"),
    ],
)
def test_bad_settings_get_400_and_the_server_lives(
    server: str, xargs: dict[str, Any], message: str
) -> None:
    answer = ask(server, 3, vllm_xargs=xargs)
    assert answer.status_code == 400
    assert message in answer.text
    assert len(token_ids(ask(server, 3))) == 3

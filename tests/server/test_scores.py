"""echo with logprobs, as evaluations of log-likelihoods ask for it."""

import httpx
import pytest

from tests.fakes import listening, stub_app

ASK = {"prompt": "héllo", "max_tokens": 2, "echo": True, "logprobs": 1, "temperature": 0}


async def test_prompt_and_answer_are_scored_in_one_list() -> None:
    async with listening(stub_app()) as url, httpx.AsyncClient(base_url=url) as client:
        answer = (await client.post("/v1/completions", json=ASK)).json()
    [choice] = answer["choices"]
    told = choice["logprobs"]
    num_prompt = len("héllo".encode())
    assert choice["text"] == "héllohé"[: len(choice["text"])]
    assert len(told["tokens"]) == num_prompt + 2
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert all(value == 0.0 for value in told["token_logprobs"][1:])
    assert told["tokens"][3] == "l"
    assert told["top_logprobs"][3] == {"l": 0.0}
    offsets = told["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[num_prompt] == len("héllo"), "the answer's count from the start of the text"


async def test_many_prompts_of_ids_and_choices_have_their_own_scores() -> None:
    body = ASK | {"prompt": [[104, 105], [106, 107, 108]], "n": 2, "temperature": 1}
    async with listening(stub_app()) as url, httpx.AsyncClient(base_url=url) as client:
        answer = (await client.post("/v1/completions", json=body)).json()
    heads = [choice["logprobs"]["tokens"][:-2] for choice in answer["choices"]]
    assert heads == [["h", "i"], ["h", "i"], ["j", "k", "l"], ["j", "k", "l"]]


@pytest.mark.parametrize("mode", ["cot", "latent"])
async def test_forced_tokens_behind_the_prompt_are_not_part_of_it(mode: str) -> None:
    body = ASK | {"reasoning_mode": mode, "reasoning": {"steps": 2}}
    async with listening(stub_app()) as url, httpx.AsyncClient(base_url=url) as client:
        answer = (await client.post("/v1/completions", json=body)).json()
    told = answer["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len("héllo".encode()) + 2


async def test_a_stream_of_scores_is_refused() -> None:
    async with listening(stub_app()) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.post("/v1/completions", json=ASK | {"stream": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "echo"

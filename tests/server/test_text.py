"""Text of answers with real tokenizers, over the stub, which repeats the prompt's ids."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from coconut_serve.checkpoint.tokenizer import load_tokenizer
from tests import tokenizer_files
from tests.fakes import listening, stub_app

pytestmark = pytest.mark.torch  # transformers imports it
LLAMA, CUT = "\U0001f999".encode(), b"\xe4\xbb"


async def complete(directory: Path, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The whole answer, and the text of the same one streamed."""
    app = stub_app(tokenizer=load_tokenizer(directory), vocab_size=600)
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as client:
        whole = await client.post("/v1/completions", json=body)
        assert whole.status_code == 200, whole.text
        streamed = await client.post("/v1/completions", json={**body, "stream": True})
    lines = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    return whole.json()["choices"][0], text


@pytest.fixture
def own(tmp_path: Path) -> Tokenizer:
    return tokenizer_files.llama2(tmp_path)


async def test_answer_continues_its_prompt(own: Tokenizer, tmp_path: Path) -> None:
    """'...France is' + ' capital' came out glued, and names of tokens lost their space."""
    prompt = own.encode(" capital of France is", add_special_tokens=False).ids[1:]
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0}
    choice, streamed = await complete(tmp_path, {**body, "echo": True})
    assert choice["text"] == streamed == "capital of France is capital of"
    choice, streamed = await complete(tmp_path, {**body, "logprobs": 1})
    assert choice["text"] == streamed == " capital of"
    assert choice["logprobs"]["tokens"] == [" capital", " of"]
    assert list(choice["logprobs"]["top_logprobs"][0]) == [" capital"]
    assert choice["logprobs"]["text_offset"] == [0, 8]


@pytest.mark.parametrize(
    ("max_tokens", "text"),
    [(2, ""), (4, "\U0001f999"), (6, "\U0001f999"), (7, "\U0001f999\ufffd\ufffd The")],
)
async def test_broken_bytes_lose_nothing_and_half_characters_are_not_shown(
    own: Tokenizer, tmp_path: Path, max_tokens: int, text: str
) -> None:
    """What followed was lost, and a character cut by max_tokens was shown as U+FFFD."""
    ids = [*tokenizer_files.byte_ids(own, LLAMA + CUT), tokenizer_files.id_of(own, "\u2581The")]
    body = {"prompt": ids, "max_tokens": max_tokens, "temperature": 0}
    choice, streamed = await complete(tmp_path, body)
    assert choice["text"] == streamed == text


async def test_a_chat_answer_is_a_text_of_its_own(own: Tokenizer, tmp_path: Path) -> None:
    """It begins without the space that joins words."""
    template = "{{ messages[0].content }}"
    config = {"tokenizer_class": "LlamaTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    app = stub_app(tokenizer=load_tokenizer(tmp_path), vocab_size=600)
    body = {"model": "m", "messages": [{"role": "user", "content": "The capital"}], "max_tokens": 9}
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as client:
        answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["message"]["content"].startswith("The capital The")

"""The line that `serve` prints for a shell is a request that the model answers."""

import json
import shlex
from dataclasses import replace

import httpx

from coconut_serve.checkpoint.manifest import Manifest, Prompt
from coconut_serve.server.example import example_request
from tests.fakes import listening, stub_app

QUESTION = 'Who\'s "Ada" → rome or $HOME `x`?'


async def test_example_is_answered_and_asks_what_the_manifest_says() -> None:
    manifest = Manifest(prompt=Prompt(example=QUESTION))
    app = stub_app(manifest=manifest, api_keys=("sk-1",))
    async with listening(app) as url, httpx.AsyncClient() as client:
        line = example_request(app.state.service, f"{url}/v1")
        curl, address, *words = shlex.split(line.replace("$COCONUT_API_KEY", "sk-1"))
        assert curl == "curl"
        options = list(zip(words[::2], words[1::2], strict=True))
        headers = dict(text.split(": ", 1) for flag, text in options if flag == "-H")
        [body] = [text for flag, text in options if flag == "-d"]
        assert json.loads(body)["messages"] == [{"role": "user", "content": QUESTION}]
        answer = await client.post(address, headers=headers, content=body)
        assert answer.status_code == 200, answer.text


async def test_example_without_manifest_or_tokenizer() -> None:
    app = stub_app()
    async with listening(app) as url, httpx.AsyncClient() as client:
        service = replace(app.state.service, manifest=None)
        assert "What is the capital of France?" in example_request(service, url)
        line = example_request(replace(service, tokenizer=None), f"{url}/v1")
        _, address, *_, body = shlex.split(line)
        assert address == f"{url}/v1/completions"
        answer = await client.post(address, content=body)
        assert answer.status_code == 200, answer.text

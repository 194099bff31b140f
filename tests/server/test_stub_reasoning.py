"""What `serve --engine stub` gives clients to be tested with: reasoning text beside the answer."""

from typing import Any

import openai

from coconut_serve.loading import stub_manifest
from tests.fakes import listening, stub_app


async def test_cot_says_reasoning_text_whole_and_streamed() -> None:
    """The bug: the stub thought nothing in `cot`, so no client could be tested against it."""
    async with (
        listening(stub_app(manifest=stub_manifest())) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        create: Any = client.chat.completions.create
        body = {
            "model": "m:cot",
            "messages": [{"role": "user", "content": "What is 2+2?"}],
            "max_tokens": 8,
        }
        whole = await create(**body)
        message, usage = whole.choices[0].message, whole.usage
        assert message.reasoning_content == message.reasoning == "user: What is 2+"
        assert message.content == "user: Wh"
        assert usage.prompt_tokens == len("user: What is 2+2?\nassistant: ") + 1, "and <think>"
        assert usage.completion_tokens_details.reasoning_tokens == 16
        assert usage.completion_tokens == 16 + 1 + 8, "thinking, </think>, answer"
        assert usage.reasoning["halt_reason"] == "stop_token"
        again = await create(**body)
        assert again.choices[0].message == message
        thought = said = ""
        async for chunk in await create(**body, stream=True):
            for choice in chunk.choices:
                thought += getattr(choice.delta, "reasoning_content", None) or ""
                assert not said or not getattr(choice.delta, "reasoning_content", None)
                said += choice.delta.content or ""
        assert (thought, said) == (message.reasoning_content, message.content)
        quiet = await create(**body | {"model": "m:none"})
        assert getattr(quiet.choices[0].message, "reasoning_content", None) is None
        assert quiet.usage.completion_tokens == 8

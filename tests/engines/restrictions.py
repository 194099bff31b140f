"""What allowed_token_ids and bad_words must do on any engine with a model."""

from typing import Any

from coconut_serve.engines.base import Engine
from coconut_serve.params import Phase
from coconut_serve.types import RequestOutput
from tests.fakes import make_request, run

END = 11
SOME = tuple(range(20, 28))


def second(output: RequestOutput) -> int:
    """The runner-up of a greedy token."""
    assert output.logprobs is not None
    assert output.logprobs.top[0][0] == output.token_id
    return output.logprobs.top[1][0]


async def check_bad_words(engine: Engine) -> None:
    """A word is never completed; where its beginning was not said, it changes nothing."""
    common: dict[str, Any] = {"max_tokens": 6, "num_logprobs": 3}
    free = await run(engine, make_request("free", **common))
    ids = free.token_ids

    async def without(*words: tuple[int, ...]) -> list[int]:
        return (await run(engine, make_request("w", bad_words=words, **common))).token_ids

    for length in (1, 2, 4):
        said = await without(tuple(ids[:length]))
        assert said[: length - 1] == ids[: length - 1]
        assert said[length - 1] == second(free.outputs[length - 1])
    assert ids[1] not in await without((ids[1],), (1, 2, 3))
    prompt = make_request().prompt_token_ids
    assert await without((prompt[-1], ids[0])) == ids, "a prompt begins no word"
    assert await without((ids[0], ids[0], ids[1])) == ids, "longer than what was said"


async def check_bad_words_of_thoughts(engine: Engine) -> None:
    """Thoughts and forced tokens are part of what was said; latent steps interrupt it."""
    common: dict[str, Any] = {"mode": "cot", "steps": 3, "end": (END,), "max_tokens": 3}
    free = await run(engine, make_request("free", **common))
    a, b, c = free.thinking_ids
    assert a is not None
    assert b is not None
    other = await run(engine, make_request("w", bad_words=((a, b),), **common))
    assert other.thinking_ids[0] == a
    assert other.thinking_ids[1] != b
    first = free.token_ids[0]
    other = await run(engine, make_request("w", bad_words=((END, first), (c or 0, END)), **common))
    assert other.thinking_ids == free.thinking_ids
    assert [o.token_id for o in other.outputs if o.phase is Phase.BOUNDARY] == [END]
    assert other.token_ids[0] != first
    latent: dict[str, Any] = {"mode": "latent", "steps": 2, "max_tokens": 3}
    free = await run(engine, make_request("free", **latent))
    words = tuple((i, free.token_ids[0]) for i in range(60))
    other = await run(engine, make_request("w", bad_words=words, **latent))
    assert other.token_ids[0] == free.token_ids[0]


async def check_allowed_tokens(engine: Engine) -> None:
    """No other is drawn or mixed, in thought and answer; forced tokens are fed all the same."""
    asked: list[tuple[str, dict[str, Any]]] = [
        ("none", {}),
        ("cot", {"temperature": 1.0, "seed": 3}),
        ("cot", {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}),
        ("distribution", {}),
        ("auto", {"temperature": 0.7}),
        ("latent", {}),
    ]
    for mode, sampling in asked:
        steps = 0 if mode == "none" else 4
        end = () if mode == "none" else (END,)
        request = make_request(
            f"{mode}", mode=mode, steps=steps, end=end, allowed_token_ids=SOME, **sampling
        )
        result = await run(engine, request)
        assert {*result.token_ids} <= {*SOME}
        assert len(result.token_ids) == 8
        assert {*result.thinking_ids} <= {*SOME, None}
        assert [o.token_id for o in result.outputs if o.phase is Phase.BOUNDARY] == [*end]

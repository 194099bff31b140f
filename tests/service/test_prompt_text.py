"""How texts become prompts when a request says how: continued, cut, with special tokens or not."""

from collections.abc import Sequence
from typing import Any

import pytest

from coconut_serve.errors import InvalidRequestError
from coconut_serve.service.ask import GenerateCall, SamplingFields
from coconut_serve.service.prompt_text import bad_word_ids, keep_last
from coconut_serve.service.tokenizer import ByteTokenizer
from tests.service.test_prompt import OpeningTokenizer, chat, make_builder, text_of

BOS = 257


class BosTokenizer(ByteTokenizer):
    """Puts a special token in front of texts."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = super().encode(text, add_special_tokens=False)
        return [BOS, *ids] if add_special_tokens else ids


class WordTokenizer(ByteTokenizer):
    """A space belongs to the word behind it, as in byte-level BPE."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        known = {"cat": [1], " cat": [2], "black cat": [3, 2], " black cat": [4, 2], " ": []}
        return known.get(text) or super().encode(text, add_special_tokens=add_special_tokens)


def continued(text: str, mode: str, tokenizer: ByteTokenizer | None = None, **more: Any) -> Any:
    ask = GenerateCall(
        request_id="r", endpoint="chat", mode=mode, sampling=SamplingFields(max_tokens=10),
        messages=[{"role": "user", "content": "a < b"}, {"role": "assistant", "content": text}],
        chat_template_options={"continue_final_message": True, "add_generation_prompt": False},
        **more,
    )  # fmt: skip
    return make_builder(tokenizer).prepare(ask)


@pytest.mark.parametrize("mode", ["none", "cot"])
def test_continued_message_is_the_end_of_the_prompt(mode: str) -> None:
    """continue_final_message was only named in a header: the model answered anew."""
    prepared = continued("It is", mode)
    assert text_of(prepared) == "user: a < b\nassistant: It is"
    assert prepared.requests[0].reasoning.steps == 0, "it goes on with the answer"


def test_continued_thought_goes_on_or_is_closed() -> None:
    thought = continued("<hm, let me see", "cot")
    assert text_of(thought).endswith("assistant: <hm, let me see")
    assert thought.requests[0].reasoning.steps > 100
    assert text_of(continued("<hm", "none")).endswith("assistant: <hm>")
    assert text_of(continued("<hm>So", "none")).endswith("assistant: <hm>So")
    assert text_of(continued("It is", "distribution")).endswith("assistant: It is<")


def test_chat_without_generation_prompt_ends_with_its_last_message() -> None:
    options = {"add_generation_prompt": False}
    prepared = chat(make_builder(), "cot", chat_template_options=options)
    assert text_of(prepared) == "user: hi\n"
    assert prepared.requests[0].reasoning.steps == 0
    assert text_of(chat(make_builder(), "none", chat_template_options=options)) == "user: hi\n"


def test_special_tokens_are_added_as_the_request_says() -> None:
    def first(special: bool | None, **own: Any) -> int:
        ask = GenerateCall(
            request_id="r", endpoint="c", mode="none", add_special_tokens=special,
            sampling=SamplingFields(max_tokens=1), **own,
        )  # fmt: skip
        return make_builder(BosTokenizer()).prepare(ask).prompt_token_ids[0][0]

    messages = [{"role": "user", "content": "a"}]
    for special, of_text, of_chat in ((None, BOS, 117), (True, BOS, BOS), (False, 97, 117)):
        assert first(special, prompts=["a"]) == of_text
        assert first(special, messages=messages) == of_chat


def truncated(
    count: int, prompts: Sequence[Any], tokenizer: Any = None, **more: Any
) -> list[tuple[int, ...]]:
    ask = GenerateCall(
        request_id="r", endpoint="c", prompts=prompts, truncate_prompt_tokens=count,
        sampling=SamplingFields(max_tokens=10), **{"mode": "none", **more},
    )  # fmt: skip
    builder = make_builder(tokenizer, thinks=False, modes=["none", "latent"], steps=6)
    return list(builder.prepare(ask).prompt_token_ids)


def test_truncated_prompts_keep_their_last_tokens_and_bos() -> None:
    """truncate_prompt_tokens was only named in a header."""
    ids = tuple(range(50))
    assert truncated(3, ["abcdef", "ab", ids]) == [tuple(b"def"), tuple(b"ab"), (47, 48, 49)]
    assert truncated(3, ["abcdef"], BosTokenizer()) == [(BOS, *b"ef")]
    assert truncated(3, ["abcdef"], BosTokenizer(), add_special_tokens=False) == [tuple(b"def")]
    long = "x" * 100_000
    assert truncated(-1, [long]) == [tuple(b"x" * 190)], "room for max_tokens"
    assert len(truncated(-1, [long], mode="latent")[0]) == 184, "and for thinking"
    for count in (0, 201):
        with pytest.raises(InvalidRequestError) as caught:
            truncated(count, ["abc"])
        assert caught.value.param == "truncate_prompt_tokens"


def test_truncated_chat_still_opens_its_thought() -> None:
    prepared = chat(make_builder(), "cot", "a" * 500, truncate_prompt_tokens=13)
    assert text_of(prepared) == "\nassistant: <"
    opening = chat(make_builder(OpeningTokenizer()), "none", "a" * 500, truncate_prompt_tokens=5)
    assert text_of(opening) == ": <\n>"


def test_ends_of_ids() -> None:
    assert keep_last((9, 1, 2, 3), 3, (9,)) == (9, 2, 3)
    assert keep_last((9, 1, 2, 3), 1, (9,)) == (9,)
    assert keep_last((8, 1, 2, 3), 2, (9,)) == (2, 3)
    assert keep_last((1, 2), 5, ()) == (1, 2)


def test_bad_words_are_the_sequences_that_vllm_finds() -> None:
    """SamplingParams.update_from_tokenizer: behind a space too, where that is another token."""
    words = ["cat", "  cat", "black cat", "xy"]
    assert bad_word_ids(words, WordTokenizer(), 258) == (
        (1,), (2,), (1,), (2,), (3, 2), (4, 2), (120, 121),
    )  # fmt: skip
    for wrong in ("", " "):
        with pytest.raises(InvalidRequestError) as caught:
            bad_word_ids([wrong], ByteTokenizer(), 258)
        assert caught.value.param == "bad_words"
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        bad_word_ids(["a"], None, 258)


def test_restrictions_reach_the_engine() -> None:
    sampling = SamplingFields(max_tokens=3, allowed_token_ids=(5, 6), bad_words=("ab",))
    [request] = chat(make_builder(), "none").requests
    assert request.sampling.allowed_token_ids == ()
    assert request.sampling.bad_words == ()
    ask = GenerateCall(
        request_id="r", endpoint="c", mode="cot", prompts=["a<"], sampling=sampling,
        reasoning={"seed": 3},
    )  # fmt: skip
    [request] = make_builder().prepare(ask).requests
    for each in (request.sampling, request.thinking):
        assert each is not None
        assert each.allowed_token_ids == (5, 6)
        assert each.bad_words == ((97, 98),)


def test_question_models_refuse_what_needs_a_template_and_warn_of_the_rest() -> None:
    """chat_template_kwargs had no effect there, and nothing said so."""
    own: dict[str, Any] = {"prompt": {"template": "{question}\n", "chat_template": False}}
    for name in ("continue_final_message", "add_generation_prompt"):
        with pytest.raises(InvalidRequestError) as caught:
            chat(make_builder(**own), "none", chat_template_options={name: True})
        assert caught.value.param == name
    prepared = chat(make_builder(**own), "none", chat_template_options={"style": "short"})
    [warning] = prepared.resolved.warnings
    assert "chat_template_kwargs" in warning

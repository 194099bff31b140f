"""Prompts become token ids; thinking models get their bounds."""

from dataclasses import replace
from typing import Any

import pytest

from coconut_serve.checkpoint.manifest import Manifest
from coconut_serve.engines.base import EngineInfo
from coconut_serve.errors import InvalidRequestError
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.service.admission import Admission
from coconut_serve.service.ask import GenerateCall, SamplingFields
from coconut_serve.service.model import ModelReasoning
from coconut_serve.service.prompt import Prepared, PromptBuilder
from coconut_serve.service.tokenizer import ByteTokenizer

THINK, ANSWER = ord("<"), ord(">")
INFO = EngineInfo(
    engine="stub",
    vocab_size=258,
    max_model_len=200,
    kv_cache_positions=1000,
    block_size=16,
    modes=mode_names(),
)


class OpeningTokenizer(ByteTokenizer):
    """A chat template that opens the thinking phase itself."""

    def render_chat(self, messages: Any, **options: object) -> str:
        text = super().render_chat(messages, **options)
        return text + "<\n"


def make_builder(
    tokenizer: ByteTokenizer | None = None, thinks: bool = True, **declared: Any
) -> PromptBuilder:
    tokens = {"think_start": {"id": THINK}, "think_end": {"id": ANSWER}} if thinks else {}
    manifest = Manifest.model_validate({"schema": 1, "tokens": tokens, **declared})
    tokenizer = tokenizer or ByteTokenizer()
    model = ModelReasoning.read(
        manifest,
        tokenizer,
        engine_modes=mode_names(),
        allowed_modes=None,
        default_mode=None,
        max_model_len=INFO.max_model_len,
        eos_token_ids=(256,),
    )
    return PromptBuilder(
        tokenizer=tokenizer,
        model=model,
        info=INFO,
        max_n=8,
        trace_bounds=("none", "topk"),
        check_size=Admission(max_running=64, max_queue=64, step_seconds=float).check_size,
    )


def chat(builder: PromptBuilder, mode: str, text: str = "hi", **changes: Any) -> Prepared:
    ask = GenerateCall(
        request_id="r",
        endpoint="chat",
        mode=mode,
        messages=[{"role": "user", "content": text}],
        sampling=SamplingFields(max_tokens=10),
        **changes,
    )
    return builder.prepare(ask)


def text_of(prepared: Prepared) -> str:
    return bytes(prepared.requests[0].prompt_token_ids).decode()


def test_thinking_phase_is_opened_once() -> None:
    for mode in ("cot", "distribution"):
        assert text_of(chat(make_builder(), mode)).endswith("assistant: <")
        assert text_of(chat(make_builder(OpeningTokenizer()), mode)).endswith("assistant: <\n")


def test_none_closes_a_phase_that_the_template_opened() -> None:
    assert text_of(chat(make_builder(), "none")).endswith("assistant: ")
    assert text_of(chat(make_builder(OpeningTokenizer()), "none")).endswith("assistant: <\n>")


def test_think_tokens_in_a_users_text_open_nothing() -> None:
    for text in ("a <", "a < b > c", "> <"):
        assert text_of(chat(make_builder(), "cot", text)).endswith("assistant: <")
        assert text_of(chat(make_builder(), "none", text)).endswith("assistant: ")


def test_raw_prompt_thinks_only_if_it_ends_in_a_thought() -> None:
    """`max_tokens` of a plain completion once bounded nothing: all of it was thinking."""

    def steps(prompt: str, mode: str | None) -> tuple[int, int]:
        ask = GenerateCall(
            request_id="r",
            endpoint="completions",
            mode=mode,
            prompts=[prompt],
            sampling=SamplingFields(max_tokens=10),
        )
        request = builder.prepare(ask).requests[0]
        return request.reasoning.steps, request.prompt_token_ids[-1]

    builder = make_builder()
    assert steps("abc", None) == (0, ord("c"))
    assert steps("abc<", None)[0] > 100
    assert steps("a<" + "b" * 20, None)[0] > 100, "a thought that has gone on for a while"
    assert steps("a<b>" + "c" * 20, None)[0] == 0
    assert steps("abc", "distribution") == (200 - 4 - 10 - 1, THINK)


TURN = ord("|")  # Llama's end of turn
SUFFIXES: dict[str, Any] = {
    "prompt": {
        "template": "{question}",
        "chat_template": False,
        "mode_suffix_ids": {
            "none": [TURN, ANSWER], "cot": [TURN, THINK], "distribution": [TURN, THINK],
        },
    }
}  # fmt: skip
ENDS = {"none": "|>", "cot": "|<", "distribution": "|<"}


@pytest.mark.parametrize("mode", ENDS)
def test_question_ends_as_the_manifest_says_for_its_mode(mode: str) -> None:
    """A model of several modes got `none` without its `<|eocot|>`, and no end of turn at all."""
    builder = make_builder(**SUFFIXES)
    for text in ("2 < 3", "b >", "<"):
        prepared = chat(builder, mode, text)
        assert text_of(prepared) == text + ENDS[mode], "a user's text bounds no thought"
        assert (prepared.requests[0].reasoning.steps > 0) == (mode != "none")


@pytest.mark.parametrize(
    ("mode", "prompt", "whole"),
    [
        ("none", "abc", "abc|>"),
        ("cot", "abc", "abc|<"),
        ("distribution", "abc", "abc|<"),
        ("cot", "abc|<so", "abc|<so"),
        ("none", "abc|<so", "abc|<so>"),
        ("none", "abc|<so>4", "abc|<so>4"),
        ("cot", "abc|<so>4", "abc|<so>4"),
    ],
)
def test_raw_prompt_ends_so_too_unless_it_has_bounds(mode: str, prompt: str, whole: str) -> None:
    ask = GenerateCall(
        request_id="r", endpoint="c", mode=mode, prompts=[prompt],
        sampling=SamplingFields(max_tokens=10),
    )  # fmt: skip
    prepared = make_builder(**SUFFIXES).prepare(ask)
    assert text_of(prepared) == whole
    thinks = mode != "none" and ">" not in whole
    assert (prepared.requests[0].reasoning.steps > 0) == thinks


def test_raw_text_that_is_no_thought_says_that_it_takes_no_steps() -> None:
    """It said how many steps there was room for, and the engine got none."""
    ask = GenerateCall(
        request_id="r", endpoint="c", mode="cot", prompts=["abc"], reasoning={"steps": 9}
    )
    resolved = make_builder().prepare(ask).resolved
    assert resolved.params.steps == 0
    assert resolved.parameters["steps"] == {"value": 0, "source": "default"}
    assert resolved.warnings == ("without effect in mode cot: reasoning.steps",)


def test_start_token_that_the_template_has_written_is_not_repeated() -> None:
    def ends(tokenizer: ByteTokenizer | None) -> tuple[int, ...]:
        builder = make_builder(tokenizer, modes=["latent"], max_steps=100)
        prepared = chat(builder, "latent", reasoning={"start": [THINK]})
        return prepared.requests[0].prompt_token_ids[-3:]

    assert ends(None).count(THINK) == 1
    assert ends(OpeningTokenizer()).count(THINK) == 1


def test_speed_fills_its_place_in_the_template() -> None:
    template = "{question}(Thinking speed: {speed})###"
    prompt = {"template": template, "chat_template": False, "speed": 5}
    halting = {"rule": "stop_token", "token_ids": [35], "test": "sampled"}
    colar = make_builder(thinks=False, modes=["latent"], prompt=prompt, halting=halting)

    def ask(text: str = "hi {speed}", **asked: Any) -> tuple[str, Any]:
        prepared = chat(colar, "latent", text, reasoning={"preset": "colar", **asked})
        return text_of(prepared), prepared.resolved.parameters["speed"]

    end = "(Thinking speed: {})###"
    assert ask() == ("hi {speed}" + end.format(5), {"value": 5, "source": "manifest"})
    assert ask(speed=2) == ("hi {speed}" + end.format(2), {"value": 2, "source": "request"})
    assert ask(speed="auto")[0].endswith(end.format("auto"))
    raw = GenerateCall(
        request_id="r", endpoint="c", mode=None, prompts=["a"], reasoning={"speed": 2}
    )
    for builder, asked in ((colar, raw), (make_builder(), raw)):
        with pytest.raises(InvalidRequestError, match=r"whose prompt template has \{speed\}"):
            builder.prepare(asked)
    with pytest.raises(InvalidRequestError, match=r"reasoning\.speed needs a chat"):
        chat(make_builder(), "cot", reasoning={"speed": 2})


def test_choices_have_unrelated_seeds_and_the_first_has_the_clients() -> None:
    prepared = chat(make_builder(), "none", n=4)
    again = chat(make_builder(), "none", n=4)
    seeds = [r.sampling.seed for r in prepared.requests]
    assert len(set(seeds)) == 4
    assert seeds != [r.sampling.seed for r in again.requests], "no seed given"
    ask = GenerateCall(
        request_id="r", endpoint="c", mode=None, prompts=["a"], n=3, sampling=SamplingFields(seed=5)
    )
    one, two = make_builder().prepare(ask), make_builder().prepare(ask)
    assert [r.sampling.seed for r in one.requests] == [r.sampling.seed for r in two.requests]
    assert one.requests[0].sampling.seed == 5
    assert len({r.request_id for r in (*one.requests, *two.requests)}) == 6


def test_answer_may_be_drawn_otherwise_than_thinking() -> None:
    sampling = SamplingFields(params={"temperature": 0.5, "top_k": 7}, seed=3)
    for mode in ("cot", "latent", "none"):
        ask = GenerateCall(
            request_id="r", endpoint="c", mode=mode, prompts=["a<"], sampling=sampling,
            reasoning={"after.temperature": 0.0, "after.top_p": 0.9},
        )  # fmt: skip
        prepared = make_builder(modes=["none", "cot", "latent"]).prepare(ask)
        [request] = prepared.requests
        answer, thinking = request.sampling, request.thinking
        assert thinking is not None
        assert (answer.temperature, answer.top_p, answer.top_k, answer.seed) == (0.0, 0.9, 7, 3)
        assert (thinking.temperature, thinking.top_p, thinking.top_k) == (0.5, 1.0, 7)
        parameters = prepared.resolved.parameters
        assert parameters["after.top_p"] == {"value": 0.9, "source": "request"}
        assert parameters["after.min_p"] == {"value": None, "source": "default"}
        assert prepared.resolved.warnings == ()


def test_padded_positions_are_counted_before_they_are_known() -> None:
    """A thinking model's phase is open-ended; padded, its whole cap stands before the answer."""
    for asked, expected in (({}, 200 - 2), ({"pad_positions": True}, 200 - 2 - 101)):
        ask = GenerateCall(
            request_id="r", endpoint="c", mode="cot", prompts=["a<"],
            reasoning={"steps": 100, **asked}, sampling=SamplingFields(max_tokens=None),
        )  # fmt: skip
        builder = make_builder()
        prepared = builder.prepare(replace(ask, sampling=SamplingFields(max_tokens=1)))
        [request] = prepared.requests
        prompt, params = request.prompt_token_ids, request.reasoning
        assert builder._answer_tokens(prompt, params, None, ask) == expected
        assert request.reasoning.pad_positions is bool(asked)


def test_too_many_sequences_are_refused_before_they_are_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """128 prompts of 8 choices of 32 branches once took a second of everybody's streams."""
    ask = GenerateCall(
        request_id="r", endpoint="c", mode="distribution", prompts=["a"] * 128, n=8,
        reasoning={"branches": 32, "select": "all", "mixture.kind": "multiplex"},
    )  # fmt: skip
    monkeypatch.setattr(PromptBuilder, "_requests", None)
    with pytest.raises(InvalidRequestError, match="makes 32768 sequences"):
        make_builder().prepare(ask)


def test_equal_prompts_of_a_seeded_call_are_drawn_alike() -> None:
    """The second was drawn otherwise, so that it could not be asked for alone."""

    def seeds(*prompts: str, seed: int | None = 5) -> list[int]:
        ask = GenerateCall(
            request_id="r", endpoint="c", mode=None, prompts=prompts, n=2,
            sampling=SamplingFields(seed=seed),
        )  # fmt: skip
        return [r.sampling.seed for r in make_builder().prepare(ask).requests]

    assert seeds("a", "b", "a") == seeds("a") * 3
    assert len(set(seeds("a", "a", seed=None))) == 4, "else a list of prompts is drawn once"


def test_thinking_may_have_a_seed_of_its_own() -> None:
    def seeds(**asked: Any) -> list[tuple[int, int]]:
        ask = GenerateCall(
            request_id="r", endpoint="c", mode="distribution", prompts=["a"], n=3,
            sampling=SamplingFields(seed=5), reasoning=asked,
        )  # fmt: skip
        prepared = make_builder().prepare(ask)
        expected = {"value": asked.get("seed", 5), "source": "request"}
        assert prepared.resolved.parameters["seed"] == expected
        return [(r.sampling.seed, r.thinking_seed) for r in prepared.requests]

    plain, own = seeds(), seeds(seed=9)
    assert all(answer == thinking for answer, thinking in plain)
    assert [answer for answer, _ in own] == [answer for answer, _ in plain]
    assert own[0] == (5, 9)
    assert len({thinking for _, thinking in own}) == 3
    assert seeds(seed=5) == plain


def test_a_seed_that_the_server_drew_is_told_and_repeats_the_request() -> None:
    def prepare(seed: int | None) -> tuple[Any, list[tuple[int, int]]]:
        ask = GenerateCall(
            request_id="r", endpoint="c", mode="distribution", prompts=["a"], n=2,
            sampling=SamplingFields(seed=seed),
        )  # fmt: skip
        prepared = make_builder().prepare(ask)
        told = prepared.resolved.parameters["seed"]
        return told, [(r.sampling.seed, r.thinking_seed) for r in prepared.requests]

    told, drawn = prepare(None)
    assert told["source"] == "server"
    assert 0 <= told["value"] < 2**53
    assert prepare(told["value"]) == ({**told, "source": "request"}, drawn)
    assert prepare(None)[0] != told


@pytest.mark.parametrize("thinks", [True, False])
def test_answer_gets_what_the_context_leaves(thinks: bool) -> None:
    ask = GenerateCall(
        request_id="r", endpoint="chat", mode="none", messages=[{"role": "user", "content": "x"}]
    )
    request = make_builder(thinks=thinks).prepare(ask).requests[0]
    assert request.sampling.max_tokens == 200 - len(request.prompt_token_ids)


class WordTokenizer(ByteTokenizer):
    """Question marks stand for words that it does not know."""

    @property
    def unknown_token_id(self) -> int | None:
        return ord("?")


def test_unknown_tokens_are_told_with_what_the_model_answers() -> None:
    """The bug: the demo answered "hi" with "bern" and said nothing."""

    def warnings(text: str, **prompt: Any) -> tuple[str, ...]:
        prompt |= {"template": "{question}", "chat_template": False}
        builder = make_builder(WordTokenizer(), thinks=False, prompt=prompt)
        messages = [{"role": "user", "content": text}]
        ask = GenerateCall(request_id="r", endpoint="chat", mode="cot", messages=messages)
        return builder.prepare(ask).resolved.warnings

    assert warnings("a or b") == ()
    [plain] = warnings("? a?")
    assert plain == "2 of 4 prompt tokens are unknown to this model"
    [told] = warnings("?", example="x or y from z")
    assert told.endswith("this model; it answers questions such as: x or y from z")

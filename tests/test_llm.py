"""LLM and AsyncLLM give what the server gives, to scripts, notebooks, threads and event loops."""

import asyncio
import gc
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from coconut_serve import LLM, AsyncLLM, SamplingParams
from coconut_serve.checkpoint.weights import DEMO_DIRECTORY
from coconut_serve.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    RequestError,
    StartupError,
)
from coconut_serve.loading import stub_manifest
from coconut_serve.reasoning.registry import mode_names
from tests.fakes import listening, native_app, stub_app

QUESTION = (
    "lima > tokyo, delhi > paris, bern > dubai, dubai > lima, bern > doha, dubai > seoul, "
    "rabat > sydney, doha > bonn, tokyo > turin, sydney > delhi, delhi > rome, tunis > rabat, "
    "rabat > lagos, lagos > riga, rome or turin from bern?"
)
CHAT = [{"role": "user", "content": QUESTION}]
SLOW: dict[str, Any] = {"stub_tokens_per_second": 2, "max_model_len": 128}


@pytest.fixture(scope="module")
def stub() -> Iterator[LLM]:
    with LLM(engine="stub") as llm:
        yield llm


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM("demo", dtype="float32", device="cpu", max_num_seqs=16) as llm:
        yield llm


def wait_until_running(llm: LLM, count: int) -> None:
    """Wait for so many sequences to be in flight."""
    deadline = time.monotonic() + 20
    while llm._loaded().admission.num_in_flight != count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_prompts_are_taken_in_each_form_and_answered_in_order(stub: LLM) -> None:
    params = SamplingParams(max_tokens=2)
    forms: list[Any] = ["ab", [97, 98], {"prompt": "ab"}, {"prompt_token_ids": [97, 98]}]
    for one in forms:
        [output] = stub.generate(one, params, use_tqdm=False)
        [choice] = output.outputs
        assert output.prompt_token_ids == choice.token_ids == [97, 98]
        assert choice.text == "ab"
        assert output.prompt == ("ab" if isinstance(one, str) or "prompt" in one else None)
        assert (choice.finish_reason, choice.stop_reason, choice.logprobs) == ("length", None, None)
    mixed: list[Any] = ["cd", [97, 98], {"prompt": "ef"}]
    many = stub.generate(mixed, params, use_tqdm=False)
    assert [output.outputs[0].text for output in many] == ["cd", "ab", "ef"]
    assert len({output.request_id for output in many}) == 3
    assert stub.generate([], params) == []


def test_each_prompt_may_have_its_own_settings(stub: LLM) -> None:
    outputs = stub.generate(
        ["abc", "abc", "abc"],
        [{"max_tokens": 1}, {"max_tokens": 2, "n": 2}, SamplingParams(max_tokens=3)],
        reasoning_mode=["none", "latent", "distribution"],
        reasoning=[{}, {"steps": 2, "trace": "topk"}, {"steps": 1}],
        use_tqdm=False,
    )
    assert [[c.text for c in o.outputs] for o in outputs] == [["a"], ["ab", "ab"], ["abc"]]
    assert [o.reasoning_info.mode for o in outputs] == ["none", "latent", "distribution"]
    assert [o.reasoning_info.reasoning_steps for o in outputs] == [0, 2, 1]
    assert [step.kind for step in outputs[1].outputs[1].trace] == ["latent", "latent"]
    with pytest.raises(InvalidRequestError, match="reasoning_mode has 1 values for 2 prompts"):
        stub.generate(["a", "b"], reasoning_mode=["cot"])


def test_chats_are_answered_alone_or_in_a_list(stub: LLM) -> None:
    chat = [{"role": "user", "content": "hi"}]
    [one] = stub.chat(chat, {"max_tokens": 4, "logprobs": 1}, use_tqdm=False)
    assert one.prompt is not None
    assert one.prompt.startswith("user: hi\nassistant: ")
    assert one.outputs[0].logprobs == [{i: 0.0} for i in one.outputs[0].token_ids]
    two = stub.chat([chat, chat], {"max_tokens": 4}, use_tqdm=False)
    assert [output.outputs[0].text for output in two] == [one.outputs[0].text] * 2
    hidden: dict[str, Any] = {"reasoning_mode": "cot", "reasoning": {"steps": 2}}
    for shows in (True, False):
        own = {"max_tokens": 1, "include_reasoning": shows}
        [output] = stub.chat(chat, own, use_tqdm=False, **hidden)
        assert output.outputs[0].reasoning == ("us" if shows else "")


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 3},
        {"temperature": float("nan")},
        {"n": 9},
        {"max_tokens": "5"},
        {"stop": ["a"] * 5},
        {"logit_bias": {"x": 1}},
        {"stream_options": {}},
        {"tempreature": 0},
        {"colour": "red"},
        {"guided_json": {}},
        {"reasoning_mode": "latnet"},
        {"reasoning_mode": "cot", "reasoning": {"mode": "latent"}},
        {"reasoning": {"stepz": 1}},
        {"reasoning": {"branches": 2}},
        {"max_tokens": 9000},
        {"model": "other"},
    ],
)
async def test_errors_are_those_of_the_server(fields: dict[str, Any]) -> None:
    app = stub_app(manifest=stub_manifest(), max_model_len=8192, strict_params=True)
    async with AsyncLLM(engine="stub", served_model_name="m") as llm, listening(app) as url:
        own = {name: fields[name] for name in fields if name.startswith("reasoning")}
        rest = {name: fields[name] for name in fields if name not in own}
        with pytest.raises(RequestError) as raised:
            await llm.generate("a", rest, **own)
        error = raised.value
        async with httpx.AsyncClient(base_url=url) as http:
            text = json.dumps({"prompt": "a", **fields})
            answer = await http.post(
                "/v1/completions", content=text, headers={"content-type": "application/json"}
            )
        told = answer.json()["error"]
        assert (error.message, error.param, error.code) == (
            told["message"], told["param"], told["code"],
        )  # fmt: skip
        assert error.status == answer.status_code


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ([["a", "b"]], "prompt must be a text or a list of token ids"),
        ([{"text": "a"}], "prompt must have one key"),
        ([object()], "object is not JSON"),
        (["\ud800"], "not JSON"),
    ],
)
def test_what_is_no_prompt_is_refused(stub: LLM, prompt: Any, told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        stub.generate(prompt, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="echo is not supported here"):
        stub.generate("a", {"echo": True}, use_tqdm=False)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"max_num_seq": 1}, "max_num_seq is no flag of serve; did you mean max_num_seqs?"),
        ({"max_num_seqs": 0}, "--max-num-seqs must be at least 1"),
        ({"engine": "vlm"}, "--engine"),
        ({"port": 80}, "port has no effect without a server"),
        ({"max_queue": 1}, "max_queue has no effect without a server"),
        ({"default_reasoning_mode": "x"}, "--default-reasoning-mode 'x' is not one of"),
    ],
)
def test_wrong_flags_are_told_by_the_constructor(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(StartupError, match=told):
        LLM(**{"engine": "stub", **flags})


def test_more_prompts_than_any_queue_holds_are_all_answered() -> None:
    with LLM(engine="stub", max_num_seqs=2) as llm:
        prompts = [[i % 200, 5] for i in range(400)]
        outputs = llm.generate(prompts, {"max_tokens": 2, "n": 2}, use_tqdm=False)
        assert [output.outputs[1].token_ids for output in outputs] == prompts


def test_bar_shows_how_many_are_done(stub: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    stub.generate(["a", "b"], {"max_tokens": 1}, use_tqdm=False)
    assert capsys.readouterr().err == ""
    stub.generate(["a", "b"], {"max_tokens": 1})
    assert "Processed prompts: 100%" in capsys.readouterr().err


def test_prompt_that_fails_cancels_the_others_and_is_named() -> None:
    with LLM(engine="stub", **SLOW) as llm:
        started = time.monotonic()
        with pytest.raises(ContextLengthError) as raised:
            llm.generate(["a", "b", "c"], [{"max_tokens": 100}] * 2 + [{"max_tokens": 200}])
        assert raised.value.__notes__ == ["prompt 2 of the list, counted from 0"]
        with pytest.raises(InvalidRequestError) as raised_early:
            llm.generate(["a", "b"], [{"max_tokens": 100}, {"max_tokens": 0}])
        assert raised_early.value.__notes__ == ["prompt 1 of the list, counted from 0"]
        assert time.monotonic() - started < 20
        assert llm._loaded().admission.num_in_flight == 0


def test_interrupt_cancels_all_and_leaves_the_llm_usable() -> None:
    main = threading.main_thread()
    if threading.current_thread() is not main:
        pytest.skip("signals reach the main thread alone")
    with LLM(engine="stub", **SLOW) as llm:

        def interrupt() -> None:
            wait_until_running(llm, 3)
            signal.pthread_kill(main.ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b", "c"], {"max_tokens": 100}, use_tqdm=False)
        thread.join()
        wait_until_running(llm, 0)
        assert llm.generate("a", {"max_tokens": 1}, use_tqdm=False)[0].outputs[0].text == "a"


async def test_it_works_inside_a_running_loop(stub: LLM) -> None:
    """As in a notebook, whose kernel is an event loop."""
    assert asyncio.get_running_loop().is_running()
    assert stub.generate("ab", {"max_tokens": 2})[0].outputs[0].text == "ab"


def test_threads_share_it(stub: LLM) -> None:
    def ask(text: str) -> str:
        return stub.generate(text, {"max_tokens": 2}, use_tqdm=False)[0].outputs[0].text

    texts = [f"{i:02}" for i in range(20)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, texts)) == texts


def test_closing_ends_what_runs_and_may_be_repeated() -> None:
    llm = LLM(engine="stub", **SLOW)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(llm.generate, "a", {"max_tokens": 100})
        wait_until_running(llm, 1)
        llm.close()
        with pytest.raises(EngineDeadError):
            running.result(timeout=20)
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("a")
    with pytest.raises(EngineDeadError, match="closed"):
        print(llm.modes)


def test_last_reference_closes_it() -> None:
    llm = LLM(engine="stub")
    inner = llm._async
    del llm
    gc.collect()
    assert inner._service is None


def test_script_without_guard_or_close_ends_well() -> None:
    script = (
        "from coconut_serve import LLM\n"
        "llm = LLM(engine='stub')\n"
        "print(llm.generate('ab', {'max_tokens': 2}, use_tqdm=False)[0].outputs[0].text)\n"
    )
    done = subprocess.run(
        [sys.executable, "-"], input=script, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ab\n", "")


async def test_stream_adds_up_to_the_whole() -> None:
    async with AsyncLLM(engine="stub") as llm:
        settings: dict[str, Any] = {"reasoning_mode": "cot", "reasoning": {"steps": 3}}
        params = {"max_tokens": 3, "n": 2, "logprobs": 1}
        [output] = await llm.generate("abc", params, **settings)
        deltas = [delta async for delta in llm.stream("abc", params, **settings)]
        for whole in output.outputs:
            parts = [delta for delta in deltas if delta.index == whole.index]
            assert "".join(part.text for part in parts) == whole.text
            assert "".join(part.reasoning for part in parts) == whole.reasoning
            assert [i for part in parts for i in part.token_ids] == whole.token_ids
            assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]
        chat = llm.stream([{"role": "user", "content": "hi"}], {"max_tokens": 4})
        assert "".join([delta.text async for delta in chat]) == "user"
        picked = llm.stream("a", reasoning={"branches": 2, "latent_noise_std": 0.1})
        with pytest.raises(InvalidRequestError, match="in a stream"):
            await anext(picked)
        assert llm._loaded().admission.num_in_flight == 0


async def test_async_llm_is_closed_twice_and_not_used_before_its_start() -> None:
    llm = await AsyncLLM.create(engine="stub")
    assert llm.modes == mode_names()
    assert llm.info.engine == "stub"
    await llm.close()
    await llm.close()
    for unusable in (llm, AsyncLLM(engine="stub")):
        with pytest.raises(EngineDeadError):
            await unusable.generate("a")


def test_records_show_themselves_briefly(stub: LLM) -> None:
    assert repr(SamplingParams(temperature=0, n=2)) == "SamplingParams(temperature=0, n=2)"
    own = {"max_tokens": 1}
    traced = stub.generate("a", own, reasoning_mode="latent", reasoning={"trace": "topk"})
    shown = repr(traced[0].outputs[0].trace[0])
    assert shown == "TraceStep(latent, entropy=0.000, max_prob=1.000)"
    assert repr(traced[0]).startswith("RequestOutput(request_id=")


@pytest.mark.torch
async def test_demo_answers_as_over_http_in_each_mode(demo: LLM) -> None:
    modes = ["none", "cot", "latent", "distribution"]
    reasoning = {"trace": "vectors"}
    fields = {"temperature": 0, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 2}
    outputs = demo.chat([CHAT] * 4, fields, reasoning_mode=modes, reasoning=reasoning)
    app = native_app(DEMO_DIRECTORY, config={"max_trace": "vectors"})
    async with listening(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        for mode, output in zip(modes, outputs, strict=True):
            body = {**fields, "messages": CHAT, "reasoning": reasoning, "reasoning_mode": mode,
                    "return_token_ids": True}  # fmt: skip
            answer = (await http.post("/v1/chat/completions", json=body)).json()
            assert output.prompt_token_ids == answer["prompt_token_ids"]
            assert output.reasoning_info.mode == mode
            info = answer["reasoning_info"]
            assert output.reasoning_info.forward_passes == info["forward_passes"]
            for ours, theirs in zip(output.outputs, answer["choices"], strict=True):
                assert ours.text == theirs["message"]["content"] == "turin"
                assert ours.token_ids == theirs["token_ids"]
                assert ours.reasoning == theirs["message"].get("reasoning", "")
                assert (ours.finish_reason, ours.stop_reason) == ("stop", theirs["stop_reason"])
                told = [token["logprob"] for token in theirs["logprobs"]["content"]]
                assert ours.logprobs is not None
                assert [next(iter(each.values())) for each in ours.logprobs] == pytest.approx(
                    told, abs=1e-4
                )
                trace = theirs.get("reasoning_trace", [])
                assert [(s.kind, s.token_id) for s in ours.trace] == [
                    (s["kind"], s["token_id"]) for s in trace
                ]


@pytest.mark.torch
def test_traced_vectors_are_tensors_and_can_be_fed_again(demo: LLM) -> None:
    import torch

    greedy = SamplingParams(temperature=0)
    [first] = demo.chat(
        CHAT, greedy, reasoning_mode="latent", reasoning={"steps": 6, "trace": "vectors"}
    )
    trace = first.outputs[0].trace
    for step in trace:
        assert step.vector is not None
        assert (step.vector.dtype, step.vector.shape) == (torch.float32, (demo.info.hidden_size,))
        assert float(step.vector.norm()) == pytest.approx(step.norm, rel=1e-3)
    assert repr(trace[0]).endswith(f"vector=[{demo.info.hidden_size}])")

    def feed(change: float) -> str:
        steps = [{"vector": step.vector * change} for step in trace if step.vector is not None]
        replay = {"fingerprint": demo.info.system_fingerprint, "steps": steps}
        [output] = demo.chat(CHAT, greedy, reasoning_mode="latent", reasoning={"replay": replay})
        return output.outputs[0].text

    assert feed(1.0) == first.outputs[0].text == "turin"
    assert isinstance(feed(0.0), str)


@pytest.mark.torch
def test_tensors_are_prompts_and_the_tokenizer_is_there(demo: LLM) -> None:
    import torch

    assert demo.tokenizer is not None
    ids = demo.tokenizer.encode("rome or turin", add_special_tokens=False)
    prompts: list[Any] = [ids, torch.tensor(ids)]
    [plain, tensor] = demo.generate(prompts, {"temperature": 0, "max_tokens": 2})
    assert plain.outputs[0].token_ids == tensor.outputs[0].token_ids
    assert demo.tokenizer.decode(ids) == "rome or turin"
    assert demo.modes == ("none", "cot", "latent", "distribution")


@pytest.mark.torch
def test_model_that_is_not_there_is_told_by_the_constructor() -> None:
    with pytest.raises(StartupError, match="no-such-model"):
        LLM("/no-such-model")


@pytest.mark.torch
@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_first_example_of_a_page_prints_what_the_page_shows(page: str) -> None:
    text = (Path(__file__).parents[1] / page).read_text()
    found = re.search(
        r"```python\n(from coconut_serve import LLM.*?)```\n.*?```\n(.*?)```", text, flags=re.DOTALL
    )
    assert found is not None
    code, shown = found.groups()
    done = subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, "")

"""Models of several modes, served: each mode equals a loop over the original's modules."""

from pathlib import Path

import pytest

from coconut_serve.checkpoint.manifest import load_manifest
from coconut_serve.checkpoint.tokenizer import load_tokenizer
from coconut_serve.cli import main
from coconut_serve.engines.base import EngineInfo
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.service.ask import GenerateCall, SamplingFields
from coconut_serve.service.model import ModelReasoning
from coconut_serve.service.prompt import PromptBuilder
from coconut_serve.types import Request
from tests.convert.layouts_halting import BUILDERS
from tests.convert.layouts_multimode import BEGIN, END, QUESTION, turn_of
from tests.convert.reference_loop import original
from tests.fakes import native_engine, run_all

pytestmark = pytest.mark.torch
MODES, NUM_ANSWER, LONGEST = ("none", "cot", "latent"), 6, 30


def requests_for(directory: Path, info: EngineInfo) -> list[Request]:
    """A chat in each mode, as the service makes it out of a converted directory."""
    manifest, tokenizer = load_manifest(directory), load_tokenizer(directory)
    model = ModelReasoning.read(
        manifest, tokenizer, engine_modes=mode_names(), allowed_modes=None, default_mode=None,
        max_model_len=info.max_model_len, adapters=info.adapters,
    )  # fmt: skip
    builder = PromptBuilder(
        tokenizer=tokenizer, model=model, info=info, max_n=1, trace_bounds=("none", "none"),
        check_size=lambda _: None,
    )  # fmt: skip
    text = " ".join(f"w{i}" for i in QUESTION)
    sampling = SamplingFields(max_tokens=NUM_ANSWER, params={"temperature": 0.0})
    prepared = [
        builder.prepare(
            GenerateCall(
                request_id=mode, endpoint="chat", mode=mode, sampling=sampling,
                messages=[{"role": "user", "content": text}],
            )
        )
        for mode in MODES
    ]  # fmt: skip
    return [each.requests[0] for each in prepared]


@pytest.mark.parametrize(
    "name",
    [
        "multimode-coconut-gpt2", "multimode-coconut-llama",
        "multimode-codi-gpt2", "multimode-codi-llama",
    ],
)  # fmt: skip
async def test_each_mode_equals_the_original(name: str, tmp_path: Path) -> None:
    """They were taken for plain COCONUT and CODI: `none` and `cot` had no control tokens.

    direct: question [eot] <|eocot|>; verbalised: question [eot] <|bocot|>, and the model says
    <|eocot|>; latent: question [eot] <|bocot|>, six vectors, <|eocot|>.
    """
    case = BUILDERS[name](tmp_path)
    turn = turn_of(name.rpartition("-")[2])
    banned = tuple(case.manifest["tokens.never_emit"])
    assert main([*case.command, str(tmp_path / "out")]) == 0

    opened, closed = (*QUESTION, *turn, BEGIN), (*QUESTION, *turn, END)
    direct = original(case, closed, 0, banned=banned, max_tokens=NUM_ANSWER).answer
    said = original(case, opened, 0, banned=banned, max_tokens=LONGEST).answer
    length = said.index(END)
    assert length > 1, "there is a thought"
    after = said[length + 1 :][:NUM_ANSWER]
    latent = original(case, opened, 6, end=(END,), banned=banned, max_tokens=NUM_ANSWER).answer
    assert len({tuple(answer) for answer in (direct, after, latent)}) == 3, "the modes differ"

    async with native_engine(tmp_path / "out") as engine:
        requests = requests_for(tmp_path / "out", engine.info)
        assert [r.prompt_token_ids for r in requests] == [closed, opened, opened]
        none, cot, thought = await run_all(engine, requests)
    assert none.token_ids == direct
    assert cot.thinking_ids == said[:length]
    assert cot.token_ids == after
    assert thought.token_ids == latent
    assert thought.counts.num_vector_steps == 6

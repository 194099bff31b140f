"""Sampling defaults that a model brings are read as vLLM reads them."""

import json
from pathlib import Path
from typing import Any

import pytest

from coconut_serve.checkpoint.generation_config import read_sampling_defaults
from coconut_serve.errors import StartupError


def read(folder: Path, **data: Any) -> dict[str, Any]:
    (folder / "generation_config.json").write_text(json.dumps(data))
    return read_sampling_defaults(folder)


def test_sampling_defaults_are_read(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == {}
    found = read(
        tmp_path, do_sample=True, temperature=0.6, top_k=20, top_p=0.95, max_new_tokens=2048,
        repetition_penalty=1.05, eos_token_id=[1, 2], min_p=None,
    )  # fmt: skip
    assert found == {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_tokens": 2048,
        "repetition_penalty": 1.05,
    }  # fmt: skip
    assert read(tmp_path, top_k=-1) == {"top_k": 0}


@pytest.mark.parametrize("wrong", [{"temperature": 7}, {"top_p": 0}, {"temperature": "warm"}])
def test_values_that_no_request_may_have_stop_the_start(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(StartupError, match="--generation-config none"):
        read(tmp_path, **wrong)


def test_built_in_model_brings_none() -> None:
    from coconut_serve.checkpoint.weights import DEMO_DIRECTORY

    assert read_sampling_defaults(DEMO_DIRECTORY) == {}

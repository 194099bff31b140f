"""latent_config.json: what it says is done, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from coconut_serve.checkpoint.manifest import FILE_NAME, load_manifest
from coconut_serve.errors import StartupError


def write(directory: Path, data: Any) -> Path:
    (directory / FILE_NAME).write_text(data if isinstance(data, str) else json.dumps(data))
    return directory


def test_directory_without_manifest_has_none(tmp_path: Path) -> None:
    assert load_manifest(tmp_path) is None


def test_coconut_manifest_is_read(tmp_path: Path) -> None:
    tokens = {"start": {"text": "<|start-latent|>", "id": 7}, "end": {"id": 8}, "never_emit": [7]}
    manifest = load_manifest(
        write(tmp_path, {"schema": 1, "method": "coconut", "modes": ["latent"], "tokens": tokens})
    )
    assert manifest is not None
    assert manifest.start_token_ids == (7,)
    assert manifest.end_token_ids == (8,)
    assert manifest.trained_step_counts == [6]
    assert manifest.tokens.never_emit == [7]


def test_any_setting_of_a_mixture_may_be_declared(tmp_path: Path) -> None:
    own = {"kind": "topk", "noise": "gumbel", "noise_clamp": [-1, 1.5], "temperature": 1}
    manifest = load_manifest(write(tmp_path, {"schema": 1, "distribution": own}))
    assert manifest is not None
    assert manifest.distribution.mixture == own


def test_suffix_ids_replace_the_start_token(tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "schema": 1,
        "tokens": {"start": {"id": 7}, "end": {"id": 8}},
        "prompt": {"suffix_ids": [1, 2]},
    }
    manifest = load_manifest(write(tmp_path, data))
    assert manifest is not None
    assert manifest.start_token_ids == (1, 2)
    manifest = load_manifest(write(tmp_path, {**data, "prompt": {}, "boundary": "none"}))
    assert manifest is not None
    assert manifest.start_token_ids == manifest.end_token_ids == ()


def test_every_token_that_is_named_is_counted(tmp_path: Path) -> None:
    """Whether the vocabulary has them was asked of three of these keys only."""
    data = {
        "schema": 1,
        "tokens": {
            "start": {"id": 1}, "end": {"id": 2}, "latent": {"id": 3}, "pad": {"id": 4},
            "think_start": {"id": 5}, "think_end": {"id": 6}, "never_emit": [7],
        },
        "prompt": {"suffix_ids": [8], "end_ids": [9], "mode_suffix_ids": {"none": [10, 11]}},
        "halting": {"rule": "stop_token", "token_ids": [12]},
    }  # fmt: skip
    manifest = load_manifest(write(tmp_path, data))
    assert manifest is not None
    assert manifest.token_ids == {*range(1, 13)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "must hold one JSON object"),
        ({"schema": 2}, "schema"),
        ({"schema": 1, "stepz": 3}, "stepz"),
        ({"schema": 1, "tokens": {"strat": {"id": 1}}}, "tokens.strat"),
        ({"schema": 1, "tokens": {"start": {"id": -1}}}, "tokens.start.id"),
        ({"schema": 1, "steps": "6"}, "steps"),
        ({"schema": 1, "steps": 9, "max_steps": 3}, "steps"),
        ({"schema": 1, "prompt": {"speed": "fast"}}, "prompt.speed"),
        ({"schema": 1, "prompt": {"template": "{question} {speed}"}}, "prompt.speed is needed"),
        ({"schema": 1, "hidden": {"layer": -2}}, "hidden.layer"),
        ({"schema": 1, "boundary": "telepathic"}, "boundary"),
        ({"schema": 1, "distribution": {"topk": 3}}, "distribution: topk is not known"),
        ({"schema": 1, "distribution": {"top_k": 500}}, r"distribution: top_k must be in 1\.\.64"),
        ({"schema": 1, "distribution": {"top_k": "5"}}, "distribution: top_k: Input should be"),
        ({"schema": 1, "distribution": {"kind": "tokp"}}, "distribution.kind"),
        ({"schema": 1, "source": "constant"}, "source constant needs tokens.latent"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        load_manifest(write(tmp_path, data))

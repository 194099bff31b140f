"""The authors' sampling defaults: generation_config.json, read as vLLM reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coconut_serve.errors import InvalidRequestError, StartupError
from coconut_serve.params import SamplingParams

# Key of the file -> field of SamplingParams; `do_sample` is ignored.
SAMPLING_KEYS: Mapping[str, str] = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "max_new_tokens": "max_tokens",
}  # fmt: skip


def read_sampling_defaults(directory: Path) -> dict[str, Any]:
    """Read a directory's sampling defaults; empty without the file.

    Raises:
        StartupError: A value is invalid in a request too, or the file is not a JSON object.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        given = {
            field: data[key] for key, field in SAMPLING_KEYS.items() if data.get(key) is not None
        }
        if "top_k" in given:
            given["top_k"] = max(0, given["top_k"])  # -1 also means all
        SamplingParams(**given)
    except (ValueError, TypeError, AttributeError, InvalidRequestError) as error:
        raise StartupError(
            f"{path}: {error}; --generation-config none ignores it", param="--generation-config"
        ) from error
    return given

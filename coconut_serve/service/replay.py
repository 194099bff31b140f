"""Replays thinking steps of an earlier answer instead of a request's own."""

import base64
import binascii
from dataclasses import dataclass, replace

import numpy as np

from coconut_serve.engines.base import EngineInfo
from coconut_serve.errors import require
from coconut_serve.params import TraceLevel
from coconut_serve.reasoning.registry import properties_of
from coconut_serve.service.reasoning import Resolved

_PATH = "reasoning.replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayInput:
    """Steps to replay, from a trace with vectors."""

    fingerprint: str  # system_fingerprint of what made them
    vectors: tuple[str, ...]  # by step: float32, little-endian, in base64
    token_ids: tuple[int | None, ...]  # by step: its text


def add_replay(
    resolved: Resolved, asked: ReplayInput | None, info: EngineInfo, most: TraceLevel
) -> Resolved:
    """Make the first steps of a request feed the given vectors.

    Args:
        resolved: Its resolved reasoning.
        asked: What to replay; None: nothing.
        info: The engine's, for the size of vectors and the fingerprint.
        most: The server's most detailed trace: without vectors in traces, none are accepted.

    Raises:
        InvalidRequestError: Replay is off, not for this mode, or the vectors do not fit.
    """
    if asked is None:
        return resolved
    params, size = resolved.params, info.hidden_size
    require(most == "vectors", _PATH, "is not allowed on this server (--max-trace vectors)")
    own = properties_of(params.mode)
    is_counted = own.is_steady and params.enter_token_id is None
    require(is_counted, _PATH, f"is not for mode {params.mode} of this model")
    is_same = asked.fingerprint == info.system_fingerprint
    path = f"{_PATH}.fingerprint"
    require(is_same, path, f"must be {info.system_fingerprint!r}: vectors mean nothing elsewhere")
    num_steps = len(asked.vectors)
    path = f"{_PATH}.steps"
    require(num_steps <= params.steps, path, f"must be at most {params.steps}, the steps to think")
    vectors = b"".join(_decode(vector, size) for vector in asked.vectors)
    token_ids = tuple(token_id for token_id in asked.token_ids if token_id is not None)
    has_text = own.has_text and len(token_ids) == num_steps
    is_inside = not has_text or max(token_ids) < info.vocab_size
    require(is_inside, path, f"has token ids outside 0..{info.vocab_size - 1}")
    texts = token_ids if has_text else ()
    params = replace(params, replay_vectors=vectors, replay_token_ids=texts)
    told = {"replay": {"value": num_steps, "source": "request"}}
    return replace(resolved, params=params, parameters=resolved.parameters | told)


def _decode(text: str, size: int) -> bytes:
    """Decode one vector of `size` numbers, with nothing that could run code."""
    path = f"{_PATH}.steps"
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    require(len(data) == 4 * size, path, f"must each have a vector: {size} float32 in base64")
    is_finite = bool(np.isfinite(np.frombuffer(data, "<f4")).all())
    require(is_finite, path, "must have finite numbers")
    return data

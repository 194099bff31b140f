"""What a step reports to the host: one float32 matrix with one row for each row of the step.

Its columns: token (-1 for none), phase, is_vector, halt reason, is_switch; if scores are wanted,
also the token's log-probability, entropy, norm, cosine and retained mass, then pairs (id,
log-probability) of the likeliest tokens; if vectors are wanted, MAX_LOGPROBS pairs and then the
vector. A row therefore reads the same from a wider matrix, whatever other rows want.
float32 represents token ids below 2**24 exactly.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from coconut_serve.params import MAX_LOGPROBS, Phase
from coconut_serve.reasoning import mixing
from coconut_serve.reasoning.plan import Wanted
from coconut_serve.reasoning.progress import RowResult
from coconut_serve.reasoning.rows import StepRows
from coconut_serve.reasoning.slots import upload
from coconut_serve.types import HaltReason, ReasoningTrace, TokenLogprobs

_NUM_FLAGS = 5
_NUM_SCORES = 5
_PAIRS_AT = _NUM_FLAGS + _NUM_SCORES


def width(wanted: Wanted, hidden_size: int) -> int:
    """Return how many columns a row reads."""
    if not wanted.has_scores:
        return _NUM_FLAGS
    if wanted.wants_vector:
        return _PAIRS_AT + 2 * MAX_LOGPROBS + hidden_size
    return _PAIRS_AT + 2 * wanted.num_top


def pack(step: StepRows, inputs: Tensor) -> Tensor:
    """Pack all that the host needs into one matrix.

    Args:
        step: The decided step.
        inputs: [num_rows, hidden_size], the inputs at these positions (for traces).

    Returns:
        [num_rows, width] float32, on the device.
    """
    phase = torch.where(step.is_forced, int(Phase.BOUNDARY), int(Phase.ANSWER))
    phase = torch.where(step.thinks, int(Phase.THINK), phase)
    facts = (step.token, phase, step.is_vector.long(), step.halt, step.is_switch.long())
    flags = torch.stack(facts, dim=1).float()
    scored = [i for i, r in enumerate(step.rows) if r.wanted.has_scores and r.needs_logits]
    if not scored:
        return flags
    has_vectors = any(row.wanted.wants_vector for row in step.rows)
    num_top = MAX_LOGPROBS if has_vectors else max(step.rows[i].wanted.num_top for i in scored)
    parts = [flags, step.spread(_scores(step, scored, inputs, num_top), scored)]
    if has_vectors:
        parts.append(step.vector.float())
    return torch.cat(parts, dim=1)


def _scores(step: StepRows, scored: list[int], inputs: Tensor, num_top: int) -> Tensor:
    """Compute five scalars and `num_top` pairs for each of `scored`."""
    log_probs = step.logits_of(scored, is_raw=True).log_softmax(-1)
    token = step.select(step.token, scored).clamp_min(0).unsqueeze(1)
    is_vector = step.select(step.is_vector, scored).unsqueeze(1)
    fed = torch.where(is_vector, step.select(step.vector, scored).float(), 0.0)
    scalars = [
        log_probs.gather(1, token).squeeze(1),
        mixing.entropy(log_probs),
        fed.norm(dim=-1),
        torch.cosine_similarity(fed, step.select(inputs, scored).float(), dim=-1),
        step.select(step.retained_mass, scored),
    ]
    top, ids = log_probs.topk(min(num_top, log_probs.shape[1]), dim=-1)
    pairs = torch.stack([ids.float(), top], dim=2).flatten(1)
    missing = 2 * num_top - pairs.shape[1]  # if the vocabulary is smaller
    pairs = torch.nn.functional.pad(pairs, (0, missing), value=-math.inf)
    return torch.cat([torch.stack(scalars, 1), pairs], dim=1)


def read(wanted: Wanted, values: list[float]) -> RowResult:
    """Read one row of the matrix."""
    phase, halt = Phase(int(values[1])), HaltReason(int(values[3]))
    token_id = int(values[0]) if values[0] >= 0 else None
    has_scores = len(values) >= _PAIRS_AT
    logprobs = trace = None
    if has_scores and phase is Phase.THINK and wanted.trace_top_k is not None:
        trace = _read_trace(wanted, values)
    if has_scores and phase is Phase.ANSWER and wanted.num_logprobs is not None:
        top = _read_top(values, wanted.num_logprobs)
        logprobs = TokenLogprobs(logprob=values[_NUM_FLAGS], top=top)
    return RowResult(
        phase=phase,
        token_id=token_id,
        is_vector=bool(values[2]),
        halt_reason=halt,
        is_switch=bool(values[4]),
        logprobs=logprobs if token_id is not None else None,
        trace=trace,
    )


def _read_top(values: list[float], num_top: int) -> tuple[tuple[int, float], ...]:
    """Read pairs (id, log-probability), likeliest first."""
    ids = values[_PAIRS_AT : _PAIRS_AT + 2 * num_top : 2]
    scores = values[_PAIRS_AT + 1 : _PAIRS_AT + 2 * num_top : 2]
    return tuple((int(i), p) for i, p in zip(ids, scores, strict=True) if not math.isinf(i))


def _read_trace(wanted: Wanted, values: list[float]) -> ReasoningTrace:
    _, entropy, norm, cosine, retained_mass = values[_NUM_FLAGS:_PAIRS_AT]
    top = tuple((i, math.exp(p)) for i, p in _read_top(values, wanted.trace_top_k or 0))
    return ReasoningTrace(
        entropy=entropy,
        max_prob=math.exp(values[_PAIRS_AT + 1]),
        norm=norm,
        cosine=cosine,
        retained_mass=retained_mass,
        top=top,
        vector=tuple(values[_PAIRS_AT + 2 * MAX_LOGPROBS :]) if wanted.wants_vector else None,
    )


def score(logits: Tensor, ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Score given tokens, such as a prompt's.

    Args:
        logits: [len(ids), vocab_size] float32.
        ids: The token of each row.
        num_top: Likeliest tokens to report.
    """
    log_probs = logits.log_softmax(-1)
    own = log_probs.gather(1, upload(ids, logits.device).unsqueeze(1))
    top, top_ids = log_probs.topk(min(num_top, logits.shape[1]), dim=-1)
    rows = torch.cat([own, top_ids.float(), top], dim=1).tolist()
    k = top.shape[1]
    return [
        TokenLogprobs(
            logprob=row[0],
            top=tuple((int(i), p) for i, p in zip(row[1 : k + 1], row[k + 1 :], strict=True)),
        )
        for row in rows
    ]

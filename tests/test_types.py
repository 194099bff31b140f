"""Ranges of the records, where no schema stands in front of them."""

from typing import Any

import pytest

from coconut_serve.errors import InvalidRequestError
from coconut_serve.params import HaltParams, MixtureParams, ReasoningParams, SamplingParams
from coconut_serve.reasoning.registry import check_params


@pytest.mark.parametrize(
    ("record", "field", "value", "param"),
    [
        (SamplingParams, "num_logprobs", -1, "top_logprobs"),
        (SamplingParams, "num_logprobs", 21, "top_logprobs"),
        (SamplingParams, "top_p", 0.0, "top_p"),
        (SamplingParams, "temperature", float("nan"), "temperature"),
        (SamplingParams, "max_tokens", 0, "max_tokens"),
        (MixtureParams, "top_k", 0, "reasoning.mixture.top_k"),
        (HaltParams, "entropy_patience", 0, "reasoning.halt.entropy_patience"),
        (ReasoningParams, "end_token_ids", (1,) * 9, "reasoning.end"),
    ],
)
def test_value_out_of_range_is_refused_by_name(
    record: Any, field: str, value: object, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        record(**{field: value})
    assert caught.value.param == param


def test_vectors_are_not_compared_where_there_are_none() -> None:
    """Such a row once stopped the whole engine."""
    halt = HaltParams(converge_metric="cosine", converge_below=0.1)
    params = ReasoningParams(mode="cot", halt=halt)
    with pytest.raises(InvalidRequestError, match="converge_metric must be kl or argmax_stable"):
        check_params(params)

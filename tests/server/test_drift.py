"""Each field of openai's request types is sorted: supported, ignored or rejected."""

import typing

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel

from coconut_serve.server import schemas


@pytest.mark.parametrize(
    ("params", "model"),
    [
        (chat_params.CompletionCreateParamsStreaming, schemas.ChatRequest),
        (text_params.CompletionCreateParamsStreaming, schemas.CompletionRequest),
    ],
)
def test_every_openai_field_is_sorted(params: type, model: type[BaseModel]) -> None:
    fields = set(typing.get_type_hints(params))
    supported = set(model.model_fields)
    unsorted = fields - supported - schemas.IGNORED_FIELDS - schemas.REJECTED_FIELDS
    assert not unsorted, "decide what the server does with these"


def test_sorting_is_disjoint() -> None:
    supported = set(schemas.ChatRequest.model_fields) | set(schemas.CompletionRequest.model_fields)
    assert not supported & schemas.IGNORED_FIELDS
    assert not supported & schemas.REJECTED_FIELDS
    assert not schemas.IGNORED_FIELDS & schemas.REJECTED_FIELDS

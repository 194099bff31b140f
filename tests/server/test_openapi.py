"""The reference at /openapi.json is valid, whole, and true to what the server answers."""

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from jsonschema import Draft202012Validator

from coconut_serve.params import ASKED
from tests.fakes import stub_app

DOCUMENT: dict[str, Any] = stub_app().openapi()
SCHEMAS = DOCUMENT["components"]["schemas"]
OURS = (
    "ChatRequest", "CompletionRequest", "TokenizeRequest", "DetokenizeRequest", "ReasoningBody",
    "MixtureBody", "HaltBody", "SwitchBody", "AfterBody", "ReplayBody", "ReplayStep",
    "StreamOptions", "ResponseFormat", "ErrorResponse", "ErrorObject", "ReasoningInfo", "Version",
    "ModelList", "Tokens", "Text",
)  # fmt: skip


def refs(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        yield from ([part["$ref"]] if isinstance(part.get("$ref"), str) else [])
        for value in part.values():
            yield from refs(value)
    elif isinstance(part, list):
        for value in part:
            yield from refs(value)


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, route in DOCUMENT["paths"].items():
        yield from ((path, operation) for operation in route.values())


def validator(name: str) -> Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    return Draft202012Validator(schema)


def test_every_reference_resolves() -> None:
    """Bodies pointed to #/$defs/..., which the document did not have."""
    found = {*refs(DOCUMENT)}
    assert len(found) > 20
    for ref in found:
        head, _, name = ref.rpartition("/")
        assert head == "#/components/schemas"
        assert name in SCHEMAS, ref


def test_schemas_are_valid_and_the_document_has_openapis_form() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)
    ids = [operation["operationId"] for _, operation in operations()]
    assert len({*ids}) == len(ids)
    for path, operation in operations():
        assert operation["summary"], path
        assert all(each["description"] for each in operation.get("parameters", ())), path
        for status, response in operation["responses"].items():
            assert response["description"], (path, status)


def test_document_is_valid_by_the_specifications_own_schema() -> None:
    validation = pytest.importorskip("openapi_spec_validator")  # of the dev extra
    validation.validate(DOCUMENT)


def test_every_route_says_what_it_answers_and_refuses() -> None:
    """All answered an empty schema with 200, and FastAPI's 422 that no route gives."""
    for path, operation in operations():
        responses = operation["responses"]
        assert "422" not in responses, path
        if path in ("/health", "/ready"):
            assert {*responses} == {"200", "503"}
            continue
        assert {"200", "401", "503"} <= {*responses}, path
        for status, response in responses.items():
            for media_type, content in response["content"].items():
                is_text = path == "/metrics" and status == "200"
                assert is_text or content["schema"]["$ref"], (path, status, media_type)
    for path in ("/v1/chat/completions", "/v1/completions"):
        [operation] = DOCUMENT["paths"][path].values()
        assert {"400", "404", "413", "415", "429", "500"} <= {*operation["responses"]}
        assert {*operation["responses"]["200"]["content"]} == {
            "application/json", "text/event-stream",
        }  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_every_field_is_described(name: str) -> None:
    assert SCHEMAS[name]["description"]
    for field, schema in SCHEMAS[name]["properties"].items():
        assert schema.get("description"), field


def test_ranges_are_those_that_are_checked() -> None:
    for part in ("mixture", "halt", "switch"):
        properties = SCHEMAS[f"{part.title()}Body"]["properties"]
        for field, told in properties.items():
            own = ASKED[f"{part}.{field}"]
            if own.high is not None and own.high < 2**31 - 1:
                assert (told["minimum"], told["maximum"]) == (own.low, own.high)
    mixture = validator("MixtureBody")
    assert mixture.is_valid({"top_k": 64})
    assert not mixture.is_valid({"top_k": 65})
    chat = validator("ChatRequest")
    messages = [{"role": "user", "content": "a"}]
    assert chat.is_valid({"messages": messages, "temperature": 2, "top_k": -1, "seed": None})
    outside: list[dict[str, Any]] = [
        {"temperature": 2.1}, {"top_p": 0}, {"min_p": 2}, {"top_k": -2}, {"frequency_penalty": 3},
        {"repetition_penalty": 0}, {"top_logprobs": 21}, {"n": 0}, {"messages": []},
        {"allowed_token_ids": []}, {"truncate_prompt_tokens": -2}, {"stop_token_ids": [1] * 1025},
        {"request_id": "a b"}, {"reasoning": {"steps": -1}}, {"reasoning": {"select": "best"}},
    ]  # fmt: skip
    for wrong in outside:
        assert not chat.is_valid({"messages": messages, **wrong})


@pytest.mark.parametrize(
    ("path", "name", "body"),
    [
        ("/v1/chat/completions", "ChatCompletion",
         {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True,
          "return_token_ids": True,
          "reasoning": {"mode": "latent", "trace": "topk", "explain": True}}),
        ("/v1/completions", "Completion",
         {"prompt": "a", "max_tokens": 2, "logprobs": 1, "reasoning": {"mode": "distribution"}}),
        ("/v1/completions", "ErrorResponse", {"prompt": "a", "temperature": 9}),
        ("/tokenize", "Tokens", {"prompt": "a", "return_token_strs": True}),
        ("/detokenize", "Text", {"tokens": [97]}),
        ("/v1/models", "ModelList", None),
        ("/v1/models/m", "Model", None),
        ("/version", "Version", None),
    ],
)  # fmt: skip
async def test_answers_are_what_the_reference_says(
    http: httpx.AsyncClient, path: str, name: str, body: dict[str, Any] | None
) -> None:
    response = await (http.get(path) if body is None else http.post(path, json=body))
    validator(name).validate(response.json())


async def test_served_document_is_this_one(http: httpx.AsyncClient) -> None:
    assert (await http.get("/openapi.json")).json() == DOCUMENT


def test_chunks_are_what_the_reference_says() -> None:
    chunk = {
        "id": "x", "created": 1, "model": "m", "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}],
    }  # fmt: skip
    validator("ChatCompletionChunk").validate(chunk)
    with pytest.raises(jsonschema.ValidationError):
        validator("ChatCompletionChunk").validate({**chunk, "choices": None})

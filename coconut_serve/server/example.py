"""A shell command with a request that the served model can answer."""

import json
import shlex
from typing import Any

from coconut_serve.service.service import Service

_QUESTION = "What is the capital of France?"  # where the manifest names none


def example_request(service: Service, url: str) -> str:
    """Write a curl command: a chat if the model takes one, else text or token ids.

    Args:
        service: Of the loaded model.
        url: Of the API, with /v1; anything after a space is left out.
    """
    tokenizer, config = service.tokenizer, service.config
    question = (service.manifest.prompt.example if service.manifest else None) or _QUESTION
    body: dict[str, Any] = {"model": config.served_model_name}
    if tokenizer is None:
        endpoint = "completions"
        body |= {"prompt": [1, 2, 3], "return_token_ids": True}
    elif service.model.question_template is None and not tokenizer.has_chat_template:
        endpoint = "completions"
        body |= {"prompt": question, "max_tokens": 64}
    else:
        endpoint = "chat/completions"
        body |= {"max_tokens": 64} if service.engine.info.engine == "stub" else {}
        body |= {"messages": [{"role": "user", "content": question}]}
    socket = ["--unix-socket", config.uds] if config.uds else []
    words = [
        "curl",
        *socket,
        f"{url.split()[0]}/{endpoint}",
        "-H",
        "Content-Type: application/json",
    ]
    words += ["-d", json.dumps(body, ensure_ascii=False)]
    key = ' -H "Authorization: Bearer $COCONUT_API_KEY"' if config.api_keys else ""
    return shlex.join(words) + key

"""POST /v1/completions: text or token-id prompts, one or many."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from openai.types import Completion
from openai.types.completion_choice import CompletionChoice, Logprobs
from starlette.requests import Request
from starlette.responses import Response

from coconut_serve.errors import InvalidRequestError
from coconut_serve.server.answer import read_ask, respond
from coconut_serve.server.openapi import GENERATION_ERRORS, answers, takes_generation
from coconut_serve.server.parse import read_body
from coconut_serve.server.render import ChunkRenderer
from coconut_serve.server.schemas import MAX_PROMPTS, CompletionRequest, check_text_format
from coconut_serve.server.state import get_service
from coconut_serve.server.usage import named_logprobs, token_text
from coconut_serve.service.detokenize import Detokenizer
from coconut_serve.service.generation import Delta, Generation
from coconut_serve.service.service import Service
from coconut_serve.service.tokenizer import require_tokenizer

router = APIRouter()


@router.post(
    "/v1/completions",
    openapi_extra=takes_generation(CompletionRequest),
    responses=answers(Completion, *GENERATION_ERRORS, events=Completion),
)
async def create_completion(request: Request) -> Response:
    """Continue prompts, whole or streamed."""
    service = get_service(request)
    body, ignored = await read_body(request, CompletionRequest, service.config)
    if body.echo and body.logprobs is not None and body.stream:
        raise InvalidRequestError("echo with logprobs needs stream: false", param="echo")
    if body.echo:
        require_tokenizer(service.tokenizer, "echo", "it cannot echo text")
    own = completion_fields(body)
    request_id = f"cmpl-{body.request_id or request.state.request_id}"
    ask = read_ask(request, body, service, request_id=request_id, **own)
    generation = await service.generate(ask)
    return await respond(request, _TextRenderer(service, generation, body), ignored)


def completion_fields(body: CompletionRequest) -> dict[str, Any]:
    """What `generate_call` takes of this endpoint alone.

    Raises:
        InvalidRequestError: The prompt or the format is wrong.
    """
    check_text_format(body.response_format, "response_format")
    return {
        "endpoint": "completions",
        "prompts": _prompts(body.prompt),
        "n": body.n or 1,
        "max_tokens": ("max_tokens", body.max_tokens),
        "num_logprobs": body.logprobs,
        "num_prompt_logprobs": body.logprobs if body.echo else None,
        "has_default_max_tokens": True,
    }


def _prompts(prompt: Any) -> list[str | tuple[int, ...]]:
    """Normalise the four forms of `prompt`: text, texts, ids, lists of ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequestError("prompt must not be empty", param="prompt")
    if isinstance(prompt[0], int):
        return [tuple(prompt)]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequestError(f"prompt takes at most {MAX_PROMPTS}", param="prompt")
    return [p if isinstance(p, str) else tuple(p) for p in prompt]


class _TextRenderer(ChunkRenderer[CompletionChoice]):
    """text_completion objects."""

    def __init__(self, service: Service, generation: Generation, body: CompletionRequest) -> None:
        super().__init__(service, generation, body)
        self._is_echoing = body.echo
        # Text and characters of each choice so far, for the offsets of log-probabilities.
        prepared = generation.prepared
        firsts = prepared.requests[:: prepared.num_sequences] if body.logprobs is not None else ()
        self._texts = [
            Detokenizer(
                service.tokenizer,
                skip_special_tokens=body.skip_special_tokens,
                context=prepared.ask.text_context(request),
            )
            for request in firsts
            for _ in range(prepared.num_choices)
        ]
        self._lengths = [len(self._echoed(index)) for index in range(len(self._texts))]

    def opening_parts(self) -> list[CompletionChoice]:
        """The prompts, if the client wants them back as text or ids."""
        if not self._is_echoing and not self.body.return_token_ids:
            return []
        choices = []
        for index in range(len(self.generation.choices)):
            has_ids = self.body.return_token_ids
            extra = {"prompt_token_ids": self.prompt_ids(index)} if has_ids else {}
            choices.append(self._make(Delta(index=index), self._echoed(index), extra))
        return choices

    def _echoed(self, index: int) -> str:
        ask, tokenizer = self.generation.prepared.ask, self.service.tokenizer
        if not self._is_echoing or tokenizer is None:
            return ""
        if ask.truncate_prompt_tokens is not None:
            return tokenizer.decode(self.prompt_ids(index))
        prompt = ask.prompts[index // self.generation.prepared.num_choices]
        return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)

    def _make(self, delta: Delta, text: str, extra: dict[str, Any]) -> CompletionChoice:
        reason = delta.finish_reason.value if delta.finish_reason else None
        # finish_reason is null until the end, which openai's class does not allow.
        extra = {"logprobs": None, **extra}
        return CompletionChoice.model_construct(
            index=delta.index, text=text, finish_reason=reason, **extra
        )

    def part(self, delta: Delta, extra: dict[str, Any]) -> CompletionChoice:
        return self._make(delta, delta.content, {**self.thinking(delta.reasoning), **extra})

    def chunk(self, parts: list[CompletionChoice], extra: dict[str, Any]) -> Completion:
        reply = Completion(object="text_completion", choices=[], **self.common(), **extra)
        reply.choices = parts
        return reply

    def whole(self, choices: Sequence[Delta]) -> str:
        parts = []
        for each in choices:
            extra = {**self.thinking(each.reasoning), **self.whole_extra(each)}
            if self._is_echoing and self.body.logprobs is not None:
                extra["logprobs"] = self._with_prompt(each.index, extra["logprobs"])
            if self.body.return_token_ids:
                extra["prompt_token_ids"] = self.prompt_ids(each.index)
            parts.append(self._make(each, self._echoed(each.index) + each.content, extra))
        return self.chunk(parts, self.cost()).model_dump_json(exclude_unset=True)

    def logprobs(self, delta: Delta) -> Logprobs:
        """The legacy object; offsets count characters of the answer."""
        tokenizer = self.service.tokenizer
        texts = [token_text(token.token_id, tokenizer) for token in delta.tokens]
        offsets = []
        for token in delta.tokens:  # part of a character has a name longer than its text
            offsets.append(self._lengths[delta.index])
            self._lengths[delta.index] += len(self._texts[delta.index].push(token.token_id))
        known = [token.logprobs for token in delta.tokens if token.logprobs is not None]
        return Logprobs(
            tokens=texts,
            token_logprobs=[p.logprob for p in known],
            top_logprobs=[named_logprobs(p.top, tokenizer) for p in known],
            text_offset=offsets,
        )

    def _with_prompt(self, index: int, answer: Logprobs | None) -> Logprobs:
        """Put the prompt's own tokens in front; the first has no score, which is null."""
        prepared, tokenizer = self.generation.prepared, self.service.tokenizer
        number = index // prepared.num_choices
        scores = self.generation.prompt_logprobs.get(number * prepared.num_sequences, ())
        num_own = len(self.prompt_ids(index)) - len(prepared.resolved.suffix_ids)
        ids, scores = self.prompt_ids(index)[:num_own], scores[: num_own - 1]
        text = Detokenizer(tokenizer, skip_special_tokens=False)
        offsets, length = [], 0
        for token_id in ids:
            offsets.append(length)
            length += len(text.push(token_id))
        told = answer or Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        tops = [named_logprobs(score.top, tokenizer) for score in scores]
        return Logprobs.model_construct(
            tokens=[token_text(i, tokenizer) for i in ids] + (told.tokens or []),
            token_logprobs=[None, *(s.logprob for s in scores), *(told.token_logprobs or [])],
            top_logprobs=[None, *tops, *(told.top_logprobs or [])],
            text_offset=offsets + (told.text_offset or []),
        )

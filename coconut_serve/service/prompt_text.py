"""Helpers of the prompt builder: bad words, warnings, truncation, seeds."""

import hashlib
from collections.abc import Sequence

from coconut_serve.errors import require
from coconut_serve.service.ask import GenerateCall
from coconut_serve.service.model import ModelReasoning
from coconut_serve.service.tokenizer import Tokenizer, require_tokenizer


def bad_word_ids(
    words: Sequence[str], tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """Token sequences of each word, at the start of a text and after a space.

    As in vLLM, the second counts only if it is as long and starts with another token.

    Raises:
        InvalidRequestError: A word is empty, or the model has no tokenizer.
    """
    if not words:
        return ()
    tokenizer = require_tokenizer(tokenizer, "bad_words", "use logit_bias")
    found: list[tuple[int, ...]] = []
    for word in dict.fromkeys(words):
        text = word.lstrip()
        plain = tuple(tokenizer.encode(text, add_special_tokens=False))
        require(bool(plain), "bad_words", f"has {word!r}, which has no tokens")
        spaced = tuple(tokenizer.encode(f" {text}", add_special_tokens=False))
        is_other = len(spaced) == len(plain) and spaced[0] != plain[0]
        found += [plain, spaced] if is_other else [plain]
    is_inside = all(i < vocab_size for ids in found for i in ids)
    require(is_inside, "bad_words", "has tokens that the model does not have")
    return tuple(found)


def notes_on(
    ask: GenerateCall,
    prompts: Sequence[tuple[int, ...]],
    model: ModelReasoning,
    tokenizer: Tokenizer | None,
) -> list[str]:
    """Warnings about how a client's prompts were read."""
    notes = []
    if model.question_template and len(ask.messages or ()) > 1:
        notes.append("this model takes one question: only the last user message was used")
    if model.question_template and ask.chat_template_options:
        notes.append("without effect, this model has no chat template: chat_template_kwargs")
    unknown = tokenizer.unknown_token_id if tokenizer else None
    num_unknown = 0 if unknown is None else sum(p.count(unknown) for p in prompts)
    if num_unknown:
        total = sum(map(len, prompts))
        note = f"{num_unknown} of {total} prompt tokens are unknown to this model"
        example = model.manifest.prompt.example if model.manifest else None
        notes.append(note + (f"; it answers questions such as: {example}" if example else ""))
    return notes


def keep_last(ids: tuple[int, ...], count: int, head: tuple[int, ...]) -> tuple[int, ...]:
    """Keep the last `count` ids; a leading `head`, such as BOS, stays and is counted."""
    if len(ids) <= count:
        return ids
    head = head[:count] if ids[: len(head)] == head else ()
    return head + ids[len(ids) - count + len(head) :]


def derive_seed(seed: int, number: int) -> int:
    """A seed for each choice: the request's own for the first, unrelated ones for the others."""
    if number == 0:
        return seed
    data = f"{seed}:{number}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)

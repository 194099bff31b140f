"""From texts of a request to token ids: bad words, and prompts that are cut."""

from collections.abc import Sequence

from coconut_serve.errors import require
from coconut_serve.service.tokenizer import Tokenizer, require_tokenizer


def bad_word_ids(
    words: Sequence[str], tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """The sequences of tokens that words come to, at the start of a text and behind a space.

    As vLLM finds them: the second counts where it is as long and starts with another token.

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


def keep_last(ids: tuple[int, ...], count: int, head: tuple[int, ...]) -> tuple[int, ...]:
    """The last `count` ids; where they begin with `head`, such as BOS, that and the last others."""
    if len(ids) <= count:
        return ids
    head = head[:count] if ids[: len(head)] == head else ()
    return head + ids[len(ids) - count + len(head) :]

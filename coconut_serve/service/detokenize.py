"""Incremental detokenization: no partial characters, no partial stop strings."""

from collections.abc import Sequence

from coconut_serve.service.tokenizer import Tokenizer


class Detokenizer:
    """Text of one sequence. Holds back text that may begin a stop string.

    Args:
        tokenizer: None for a model without one: there is no text then.
        stop: Stop strings.
        include_stop: Whether the answer keeps the stop string that ended it.
        skip_special_tokens: Whether to leave special tokens out of the text.
        min_tokens: Stop strings are ignored in so many first ids.
        context: Ids of the text to continue; (): a new text, which begins without a space.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        context: Sequence[int] = (),
    ) -> None:
        self._stream = (
            tokenizer.stream(skip_special_tokens=skip_special_tokens, context=context)
            if tokenizer
            else None
        )
        self._stop = stop
        self._include_stop = include_stop
        self._num_early = min_tokens
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        """Add an id and return the text to send now; "" once stopped."""
        if self._stream is None or self.stopped_by is not None:
            return ""
        return self._release(self._stream.push(token_id))

    def flush(self) -> str:
        """End the text and return what was held back."""
        if self._stream is None or self.stopped_by is not None:
            return ""
        text = self._release(self._stream.flush()) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        self._num_early -= 1
        if self._num_early >= 0:
            return text
        text = self._held + text
        found = [(at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            at, stop = min(found)
            self.stopped_by, self._held = stop, ""
            return text[: at + len(stop)] if self._include_stop else text[:at]
        num_held = _num_held(text, self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _num_held(text: str, stop: Sequence[str]) -> int:
    """Length of the longest suffix of the text that begins a stop string."""
    longest = max((len(s) for s in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0

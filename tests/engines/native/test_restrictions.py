"""allowed_token_ids and bad_words of the native engine."""

from pathlib import Path

import pytest

from tests.engines import restrictions
from tests.fakes import native_engine

pytestmark = pytest.mark.torch


async def test_bad_words_are_never_completed(tiny_llama: Path) -> None:
    """The field was ignored, and named in a header."""
    async with native_engine(tiny_llama) as engine:
        await restrictions.check_bad_words(engine)
        await restrictions.check_bad_words_of_thoughts(engine)


async def test_only_allowed_tokens_are_drawn(tiny_llama: Path) -> None:
    """The field was ignored, and named in a header."""
    async with native_engine(tiny_llama) as engine:
        await restrictions.check_allowed_tokens(engine)

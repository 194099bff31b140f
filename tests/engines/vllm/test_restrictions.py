"""allowed_token_ids and bad_words inside vLLM."""

from pathlib import Path

import pytest

from coconut_serve import params
from tests.engines import restrictions
from tests.engines.vllm.support import Engines, widen_heads

pytestmark = pytest.mark.vllm


async def test_restrictions_hold(
    tmp_path_factory: pytest.TempPathFactory, engines: Engines
) -> None:
    from tests.models import save_tiny

    folder = tmp_path_factory.mktemp("restricted")
    directory: Path = widen_heads(save_tiny("llama", folder), folder / "wide")
    async with engines.open(directory) as engine:
        await restrictions.check_bad_words(engine)
        await restrictions.check_bad_words_of_thoughts(engine)
        await restrictions.check_allowed_tokens(engine)


async def test_limits_are_within_vllms_own() -> None:
    """Beyond them vLLM's worker dies."""
    from vllm import envs
    from vllm.v1.worker.gpu.sample.logit_bias import MAX_NUM_ALLOWED_TOKEN_IDS

    assert params.MAX_ALLOWED_TOKENS <= MAX_NUM_ALLOWED_TOKEN_IDS
    assert params.MAX_BAD_WORDS <= envs.VLLM_MAX_NUM_BAD_WORDS
    assert params.MAX_BAD_WORD_TOKENS <= envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS

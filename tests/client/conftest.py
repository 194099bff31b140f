"""A stub server; with COCONUT_TEST_URL another that runs already: see versions.sh."""

import os
from collections.abc import AsyncIterator

import pytest

from coconut_serve.client import AsyncOpenAI


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """The address of a stub server."""
    if given := os.environ.get("COCONUT_TEST_URL"):
        yield given
        return
    from coconut_serve.loading import stub_manifest
    from tests.fakes import listening, stub_app

    async with listening(stub_app(manifest=stub_manifest())) as address:
        yield f"{address}/v1"


@pytest.fixture
async def client(url: str) -> AsyncIterator[AsyncOpenAI]:
    """Our client of that server."""
    async with AsyncOpenAI(base_url=url, api_key="-", max_retries=0) as own:
        yield own

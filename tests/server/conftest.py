"""Servers over the stub engine."""

from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from tests.fakes import listening, stub_app


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """The address of a stub server with default settings."""
    async with listening(stub_app()) as address:
        yield address


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    """A stock client of that server."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as stock:
        yield stock


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Plain HTTP to that server."""
    async with httpx.AsyncClient(base_url=url) as plain:
        yield plain

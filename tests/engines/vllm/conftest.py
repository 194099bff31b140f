"""Shared engines and models; every test here is marked `vllm` and runs in one event loop."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.engines.vllm.support import Engines, widen_heads
from tests.fakes import write_golden


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
            item.add_marker(pytest.mark.filterwarnings("default"))  # vLLM and its imports warn
            item.add_marker(pytest.mark.timeout(600))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engines() -> AsyncIterator[Engines]:
    shared = Engines()
    yield shared
    await shared.close()


def _wide(name: str, factory: pytest.TempPathFactory) -> Path:
    narrow = factory.mktemp(f"golden-{name}")
    return widen_heads(write_golden(name, narrow), factory.mktemp("wide") / name)


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _wide("llama", tmp_path_factory)


@pytest.fixture(scope="session")
def wide_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _wide("qwen3", tmp_path_factory)

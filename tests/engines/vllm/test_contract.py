"""The vLLM engine keeps the contract."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coconut_serve.types import StepStats
from tests.engines.contract import EngineContract
from tests.engines.vllm.support import Engines

pytestmark = pytest.mark.vllm


class TestVllmContract(EngineContract):
    @pytest.fixture(autouse=True)
    def _use(self, wide_llama: Path, engines: Engines) -> None:
        self.model, self.engines = wide_llama, engines

    def open(self, on_step: Callable[[StepStats], None] = lambda _: None, **settings: Any) -> Any:
        return self.engines.open(self.model, on_step, **settings)

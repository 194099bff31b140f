"""Nothing but the vllm engine needs vLLM."""

import importlib.metadata
import subprocess
import sys

import pytest

from coconut_serve.engines.vllm import plugin
from coconut_serve.errors import StartupError


@pytest.mark.torch
def test_nothing_else_imports_vllm() -> None:
    code = (
        "import sys, coconut_serve, coconut_serve.cli, coconut_serve.engines.native.engine;"
        "import coconut_serve.engines.vllm.plugin;"
        "print([m for m in sys.modules if m == 'vllm' or m.startswith('vllm.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_missing_vllm_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(StartupError, match=r"pip install 'vllm>=0\.31,<0\.34'"):
        plugin.check_version()


def test_plugin_does_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "install", lambda: 1 / 0)
    plugin.register()
    monkeypatch.setenv(plugin.ENABLED, "1")
    with pytest.raises(ZeroDivisionError):
        plugin.register()

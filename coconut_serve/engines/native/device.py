"""Device, dtype, threads and free memory of the native engine."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from coconut_serve.config import format_memory
from coconut_serve.errors import StartupError


def resolve_device(name: str) -> torch.device:
    """Turn the flag into a device.

    Raises:
        StartupError: CUDA is requested and not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: torch sees no CUDA device", param="--device")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn the flag into a dtype; auto is bfloat16 where the hardware computes in it."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def default_num_threads() -> int:
    """Threads of the CPU engine: OMP_NUM_THREADS, else all usable cores but one.

    The event loop needs a core too: where it shares one with a compute thread, the others spin at
    the barrier and a step can take many times longer.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) - 1)


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    with open("/proc/meminfo", encoding="ascii") as lines:
        available = next(line for line in lines if line.startswith("MemAvailable"))
    return min(int(available.split()[1]) * 1024, _free_in_cgroup())


def _free_in_cgroup() -> int:
    """Bytes left under the container's limit (cgroup v2); sys.maxsize without a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == "max" else max(0, int(limit) - used)


def describe() -> tuple[dict[str, str], dict[str, Any]]:
    """Describe torch, and the defaults here: device, dtype, threads and the GPUs' names."""
    device = resolve_device("auto")
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]  # torch has no types there
    build = {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda or "none",
        "cudnn": str(cudnn or "none"),
        "cpu kernels": torch.backends.cpu.get_cpu_capability(),
    }
    return build, {
        "device": str(device),
        "dtype": str(resolve_dtype("auto", device)).removeprefix("torch."),
        "threads": default_num_threads(),
        "gpus": [f"{gpu.name}, {format_memory(gpu.total_memory)}" for gpu in gpus],
    }

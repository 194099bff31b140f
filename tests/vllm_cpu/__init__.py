"""Runs vLLM's GPU code path (Model Runner V2) on a CPU; this directory goes on PYTHONPATH.

`triton_cpu` lets Triton believe in a CPU backend, so that vLLM uses its Triton kernels; with
TRITON_INTERPRET=1 they run in Triton's interpreter. Processes that vLLM starts find it by its
entry points.
"""

import os
import sys
from pathlib import Path

_HERE = Path(__file__).parent


def prepare() -> None:
    """Set this process and those it starts up; Triton must not have been imported yet."""
    settings = {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",  # two threads on shared cores: 34 times slower
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": os.pathsep.join((str(_HERE), str(_HERE.parents[1]))),
    }
    os.environ.update(settings)
    if str(_HERE) not in sys.path:
        sys.path.insert(0, str(_HERE))

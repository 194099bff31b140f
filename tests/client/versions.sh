#!/usr/bin/env bash
# The client's tests with other versions of openai, each in an environment that holds nothing of the server:
#   tests/client/versions.sh ['SPECIFIER'...]     default: '==1.109.1' '<3' '<4'
# PYTHON is one that has the server: the default is that of `make test`. Needs an index of packages.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'kill "$server" 2>/dev/null; rm -rf "$work"' EXIT
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$python" -m coconut_serve serve --engine stub --served-model-name m --port "$port" >"$work/log" 2>&1 &
server=$!
until "$python" -m coconut_serve healthcheck --ready "http://127.0.0.1:$port" >/dev/null 2>&1; do
  kill -0 "$server" || { cat "$work/log"; exit 1; }
done
[[ $# -gt 0 ]] || set -- '==1.109.1' '<3' '<4'
for specifier; do
  "$python" -m venv --clear "$work/venv"
  "$work/venv/bin/python" -m pip install -q "openai$specifier" pytest pytest-asyncio pytest-timeout
  "$work/venv/bin/python" -c 'import openai; print("openai", openai.__version__)'
  COCONUT_TEST_URL=http://127.0.0.1:$port/v1 "$work/venv/bin/python" -m pytest -q -p no:cacheprovider \
    --confcutdir=tests/client tests/client/test_http.py tests/client/test_import.py
done

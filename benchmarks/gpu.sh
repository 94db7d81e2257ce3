#!/usr/bin/env bash
# Everything a machine with a CUDA device can say about this tree, in parts, the most telling first.
# A part that finished leaves RESULTS/<part>.done and is skipped until a source changes.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-build/gpu}
mkdir -p "$RESULTS"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "${CUDAARCHS:-}" ]; then
  CUDAARCHS=$("$PYTHON" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())' \
    2>/dev/null) || { echo "gpu.sh needs a CUDA device that PYTHON=$PYTHON sees through Torch."; exit 1; }
fi
export CUDAARCHS
sources=$({
  echo "$CUDAARCHS"
  find CMakeLists.txt setup.py csrc mollm mollm_ops tests benchmarks -type f \
    -not -path '*/__pycache__/*' -not -path 'benchmarks/results/*' -not -name '*.so' -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum
} | sha256sum)
status=0

part() {
  local name=$1
  shift
  [ "$(cat "$RESULTS/$name.done" 2>/dev/null)" = "$sources" ] &&
    { echo "== $name: done before"; return; }
  echo "== $name"
  local start=$SECONDS
  if "$@" >"$RESULTS/$name.log" 2>&1; then
    echo "$sources" >"$RESULTS/$name.done"
    echo "   ok, $((SECONDS - start)) s"
  else
    echo "   FAILED after $((SECONDS - start)) s"
    tail -n 15 "$RESULTS/$name.log"
    status=1
    return 1
  fi
}

benchmark() {
  part "$1" "$PYTHON" "benchmarks/$1.py" --json "$RESULTS/$1.json"
}

sanitizer() {
  compute-sanitizer --tool "$1" --error-exitcode 1 "$PYTHON" -m pytest -m gpu -x \
    tests/ops/test_gram.py tests/ops/test_dual_space.py tests/ops/test_update.py
}

part build env MOLLM_CUDA=1 "$PYTHON" setup.py build_ext --inplace || exit 1
"$PYTHON" -c 'from mollm_ops._extension import extension as e; assert e and e.HAS_CUDA' || exit 1
# One process for each file: after an illegal access a process can only fail.
for tests in $(grep -l 'mark\.gpu' tests/*/test_*.py); do
  name=${tests#tests/}
  name=${name%.py}
  part "${name/\//-}" "$PYTHON" -m pytest -m gpu "$tests"
done
benchmark gram_throughput
benchmark step_time
part step_time_train "$PYTHON" benchmarks/step_time.py --train --json "$RESULTS/step_time_train.json"
benchmark loss_throughput
part memcheck sanitizer memcheck
part racecheck sanitizer racecheck
exit $status

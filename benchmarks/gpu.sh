#!/usr/bin/env bash
# What a machine with a CUDA device can say about this tree: `gpu.sh first` in nine minutes, in
# parts, the most telling first, and `gpu.sh rest` what is left. A part that finished leaves
# RESULTS/<part>.done and is skipped until a source changes; after every part RESULTS/gpu.tar.gz
# holds all that is known. MOLLM_GPU_DRY=1 runs the same parts on a CPU at tiny sizes. In a copy
# without .git, MOLLM_COMMIT names the commit.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-build/gpu}
DRY=${MOLLM_GPU_DRY:+1}
mkdir -p "$RESULTS"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "$DRY" ] && [ -z "${CUDAARCHS:-}" ]; then
  CUDAARCHS=$("$PYTHON" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())' \
    2>/dev/null) || { echo "gpu.sh needs a CUDA device that PYTHON=$PYTHON sees through Torch."; exit 1; }
fi
export CUDAARCHS=${CUDAARCHS:-}
MOLLM_COMMIT=${MOLLM_COMMIT:-$(git describe --always --dirty --abbrev=12 2>/dev/null)}
export MOLLM_COMMIT
sources=$({
  echo "$CUDAARCHS $DRY"
  find CMakeLists.txt setup.py csrc mollm mollm_ops tests benchmarks -type f \
    -not -path '*/__pycache__/*' -not -path 'benchmarks/results/*' -not -name '*.so' -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum
} | sha256sum)
status=0

# part NAME SECONDS COMMAND...: shows the end of what the command says, which is its last table.
part() {
  local name=$1 limit=$2
  shift 2
  [ "$(cat "$RESULTS/$name.done" 2>/dev/null)" = "$sources" ] &&
    { echo "== $name: done before"; return; }
  [ -n "$DRY" ] && limit=600  # a CPU may have much else to do
  echo "== $name (at most $limit s)"
  local start=$SECONDS failed=0
  timeout --kill-after=5 "$limit" "$@" >"$RESULTS/$name.log" 2>&1 || failed=$?
  tail -n 40 "$RESULTS/$name.log"
  if [ $failed = 0 ]; then
    echo "$sources" >"$RESULTS/$name.done"
    echo "   ok, $((SECONDS - start)) s"
  else
    echo "   FAILED ($failed) after $((SECONDS - start)) s"
    status=1
  fi
  local archive
  archive=$(mktemp)
  tar -C "$RESULTS" --exclude=gpu.tar.gz -czf "$archive" . && cp "$archive" "$RESULTS/gpu.tar.gz"
  rm "$archive"
  return $failed
}

# benchmark PART SECONDS SCRIPT OPTIONS...
benchmark() {
  local name=$1 limit=$2 script=$3
  shift 3
  [ -n "$DRY" ] && set -- "$@" --quick --rounds 1
  part "$name" "$limit" "$PYTHON" "benchmarks/$script.py" --json "$RESULTS/$name.json" "$@"
}

build() {
  [ -n "$DRY" ] || MOLLM_CUDA=1 "$PYTHON" setup.py build_ext --inplace || return 1
  "$PYTHON" -c 'import sys; from mollm_ops._extension import extension as e
sys.exit(e is None or not (sys.argv[1] or e.HAS_CUDA))' "$DRY"
}

# One process for each file, because after an illegal access a process can only fail.
gpu_tests() {
  local files
  files=$(grep -l 'mark\.gpu' tests/*/test_*.py)
  [ -n "$DRY" ] && files=$(echo "$files" | head -n 1)
  echo "$files" | xargs -P 4 -I{} sh -c \
    '"$0" -m pytest -m gpu -p no:cacheprovider "$1" || [ $? = 5 ]' "$PYTHON" {}
}

# sanitizer TOOL COUNT: so many GPU tests of the kernels, spread over all.
sanitizer() {
  local tool=$1 count=$2 chosen
  chosen=$("$PYTHON" -m pytest -m gpu --collect-only tests/ops/test_gram.py \
    tests/ops/test_dual_space.py tests/ops/test_update.py | grep :: |
    awk -v n="$count" '{ a[NR] = $0 } END { for (i = 1; i <= n; i++) print a[int(i * NR / n)] }')
  [ -n "$chosen" ] || return 1
  [ -n "$DRY" ] && { echo "$chosen" | head -n 40; return; }
  echo "$chosen" | tr '\n' '\0' | xargs -0 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$PYTHON" -m pytest -x -p no:cacheprovider
}

export -f build gpu_tests sanitizer
export PYTHON DRY
rows=(--rows 4096 8192) losses=() layers=(--layers 4)
[ -n "$DRY" ] && rows=(--losses uce) losses=(--losses uce) layers=(--elements 100000)
case ${1:-first} in
  first)
    part build 90 bash -c build || exit 1
    part gpu_tests 110 bash -c gpu_tests
    benchmark step_time 60 step_time
    benchmark gram_throughput 60 gram_throughput --lists 3 8 --no-peers
    benchmark loss_throughput 80 loss_throughput --no-compile "${rows[@]}"
    part memcheck 60 bash -c 'sanitizer memcheck 20'
    benchmark step_time_train_default 60 step_time --train --cases 1
    benchmark step_time_8b_layers 60 step_time "${layers[@]}"
    ;;
  rest)
    benchmark step_time_8b_streamed 230 step_time --train --preset llama-3-8b
    part racecheck 150 bash -c 'sanitizer racecheck 20'
    benchmark gram_throughput_all 120 gram_throughput
    benchmark loss_throughput_all 240 loss_throughput "${losses[@]}"
    benchmark step_time_train 240 step_time --train
    part memcheck_all 240 bash -c 'sanitizer memcheck 200'
    ;;
  *)
    echo "usage: gpu.sh first|rest"
    exit 2
    ;;
esac
exit $status

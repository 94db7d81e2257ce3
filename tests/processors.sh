#!/usr/bin/env bash
# The tests as processors of other kinds would run them, as far as this one goes, and with one, two
# and eight threads. Each has a cache of TorchInductor's own: Torch 2.13 shares it between
# capabilities, and then computes NaN. A part that passed is skipped when this runs again.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
DONE=${DONE:-build/processors}
mkdir -p "$DONE"
status=0

part() {
  local name=$1
  shift
  [ -e "$DONE/$name.passed" ] && return
  echo "== $name"
  if env "$@" TORCHINDUCTOR_CACHE_DIR="$(mktemp -d)" \
    "$PYTHON" -m pytest -n "${WORKERS:-auto}" --dist loadfile --no-loadscope-reorder; then
    touch "$DONE/$name.passed"
  else
    status=1
  fi
}

has() { grep -qw "$1" /proc/cpuinfo; }

part default ATEN_CPU_CAPABILITY=default
has avx2 && part avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
has avx512f && part avx512 ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE
has avx512_bf16 && part avx512-bf16 ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16
for threads in 1 2 8; do
  WORKERS=1 part "threads-$threads" OMP_NUM_THREADS=$threads MOLLM_TEST_THREADS=$threads
done
exit $status

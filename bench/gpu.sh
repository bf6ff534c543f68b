#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go: the kernel tests, the whole suite, the latency table. Results go to $OUT.
#   OUT=/tmp/results bench/gpu.sh [tests|suite|latency|sweep ...]
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?a folder for the results}"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
[ $# -gt 0 ] || set -- tests suite latency
for step in "$@"; do
  echo "== $step"
  case $step in
    tests) "$python" -m pytest tests/kernels -q "${parallel[@]}" 2>&1 | tee "$OUT/kernels.log" | grep -vE '^SKIPPED|^\.|^$' | tail -40 ;;
    suite) "$python" -m pytest tests --ignore tests/kernels -q "${parallel[@]}" 2>&1 | tee "$OUT/suite.log" | tail -30 ;;
    latency) (cd bench && "$python" latency.py --output "$OUT/latency.json" ${LATENCY_OPTIONS:-}) 2>&1 | tee "$OUT/latency.log" ;;
    sweep) (cd bench && "$python" sweep.py ${SWEEP_OPTIONS:-squeeze A 2:4:64:1 4:8:64:2}) 2>&1 | tee "$OUT/sweep.log" ;;
  esac
done

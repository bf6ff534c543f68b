#!/usr/bin/env bash
# The compiled backend on the CPU under ThreadSanitizer: tests/sanitize_threads.sh [python]
# The kernels' worker threads (tests/worker_threads.h instead of torch's pool), and several Python threads over one module
# (tests/races.py). Then one race is planted in the copy of the sources, and the run has to find it.
# Needs GCC and its sanitizer's runtime. Builds in a copy of the sources and leaves the tree alone.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$(command -v "${1:-python3}")")
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r csrc s2sent_kernels setup.py pyproject.toml README.md LICENSE tests "$copy"
cd "$copy"

build() {
  rm -rf s2sent_kernels/*.so build
  local flags="-fsanitize=thread -include $copy/tests/worker_threads.h"
  CFLAGS=$flags CXXFLAGS=$flags LDFLAGS="-fsanitize=thread" S2SENT_BUILD=cpu "$python" setup.py build_ext --inplace >build.log 2>&1 ||
    { tail -20 build.log; exit 1; }
  nm -D s2sent_kernels/_C*.so | grep __tsan_write >/dev/null || { echo "sanitize: the build is not instrumented" >&2; exit 1; }
}

# Neither the interpreter nor torch is instrumented: the runtime is preloaded, and what it sees is our own code, and the locks and
# threads of all. With one thread of OpenMP torch's operators wait for no other, so nothing has to be suppressed. The runtime wants
# no random addresses. Reports go to files, since pytest would keep them.
under() {
  rm -f report.*
  LD_PRELOAD=$(g++ -print-file-name=libtsan.so) TSAN_OPTIONS="exitcode=66 log_path=$copy/report" \
    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONPATH=$copy S2SENT_TEST_BACKEND=native setarch -R "$python" "$@"
}
found() { cat report.* 2>/dev/null; }

build
# Not tests/ops/test_native.py: it sets the number of torch's threads.
under tests/races.py "${ROUNDS:-2}" || { found | head -80; exit 1; }
under -m pytest -q -p no:cacheprovider tests/engines/test_squeeze.py tests/engines/test_fuse.py tests/engines/test_gate_training.py \
  tests/engines/test_native_plan.py || { found | head -80; exit 1; }

# A sum that threads share: every item of sum_blocks writes the first sentence's f.
sed -i 's/float\* f = a\.squeezed + b \* a\.size;/float* f = a.squeezed + b * 0;/' csrc/cpu/squeeze.cpp
grep -q 'a.squeezed + b \* 0' csrc/cpu/squeeze.cpp || { echo "sanitize: the race is not planted" >&2; exit 1; }
build
under tests/races.py 1 || true
grep -qs "#0 .*sum_blocks" report.* || { found | head -20; echo "sanitize: the planted race was not found" >&2; exit 1; }
echo "the planted race was found"

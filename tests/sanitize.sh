#!/usr/bin/env bash
# The compiled backend's tests on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer: tests/sanitize.sh [python]
# Needs GCC and its sanitizers' runtimes. Builds in a copy of the sources and leaves the tree alone.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$(command -v "${1:-python3}")")
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r csrc docs s2sent_kernels setup.py pyproject.toml README.md LICENSE tests "$copy"
cd "$copy"
rm -f s2sent_kernels/*.so

flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
CFLAGS=$flags CXXFLAGS=$flags LDFLAGS="-fsanitize=address,undefined" S2SENT_BUILD=cpu "$python" setup.py build_ext --inplace >build.log 2>&1 ||
  { tail -20 build.log; exit 1; }
nm -D s2sent_kernels/_C*.so | grep __asan_report >/dev/null || { echo "sanitize: the build is not instrumented" >&2; exit 1; }

# The interpreter is not instrumented, so the runtimes are preloaded, with the libstdc++ that torch needs. It leaks by design.
export LD_PRELOAD=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so.6)
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$copy S2SENT_TEST_BACKEND=native
"$python" -m pytest -k "not nvcc" -q -p no:cacheprovider tests/engines tests/ops/test_native.py tests/ops/test_choice.py tests/ops/test_private_ops.py tests/project/test_build.py
"$python" tests/ops/malformed.py "${CALLS:-10000}" | tail -c 100

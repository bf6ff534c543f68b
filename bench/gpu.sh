#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, step by step. Results and logs go to $OUT; each step ends with a few lines.
#
#   OUT=/tmp/results bench/gpu.sh [build|tests|native|sanitize|suite|devices|compare|caller|encode|selector|bench|sweep ...]
#
# After a change, in one call: build the extension, test the kernels, compare with a revision, measure the affected rows again:
#
#   OUT=/tmp/results BASE=main BENCH_OPTIONS="--sections latency --cases A,B,C --competitors none" \
#     bench/gpu.sh build tests native compare bench
#
# On a machine without the git history BASE is a folder that travels with the files, made by
#   mkdir -p build/base && git archive main | tar -x -C build/base
#
# What a caller waits for (eager calls; two to three minutes; CALLER_OPTIONS="--competitors none" without compiled competitors):
#
#   OUT=/tmp/results bench/gpu.sh build caller
#
# Texts to embeddings (ENCODE_OPTIONS: --texts FILE, and --encoder FOLDER without the registry package):
#
#   OUT=/tmp/results ENCODE_OPTIONS="--texts texts.txt --limit 30000" bench/gpu.sh build encode
#
# The selector of an encoder that is not bundled, trained and measured beside other fusions:
#
#   OUT=/tmp/results SELECTOR_OPTIONS="--data FOLDER --name all-mpnet-base-v2 --encoder FOLDER" bench/gpu.sh selector
#
# BENCH_OPTIONS are those of bench/suite.py, COMPARE_OPTIONS of bench/compare.py, SWEEP_OPTIONS of bench/probes/sweep.py; ARCH is
# the GPU to compile for, PYTHON the interpreter. A run that has to be split writes parts, and bench/record.py merges them:
#   BENCH_OPTIONS="--sections latency --cases A" ...; python bench/record.py bench/results/<device>.json part1.json part2.json
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?a folder for the results}"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 12 --dist worksteal)
# The tests' tensors are tiny, and with several processes the threads would compete for the cores.
pytest() { OMP_NUM_THREADS=1 "$python" -m pytest -q "${parallel[@]}" "$@" 2>&1; }
[ $# -gt 0 ] || set -- tests suite bench
mkdir -p "$OUT"
failed=0
for step in "$@"; do
  echo "== $step"
  begin=$SECONDS
  case $step in
    build)
      S2SENT_BUILD=cuda TORCH_CUDA_ARCH_LIST=${ARCH:-9.0a} MAX_JOBS=${MAX_JOBS:-$(nproc)} \
        "$python" setup.py build_ext --inplace >"$OUT/build.log" 2>&1
      code=$?
      tail -n 3 "$OUT/build.log"
      (exit $code) ;;
    tests) pytest tests/engines | tee "$OUT/engines.log" | grep -vE '^SKIPPED|^\.|^$' | tail -25 ;;
    native) S2SENT_TEST_BACKEND=native pytest tests/engines tests/ops/test_native.py tests/ops/test_choice.py -k "not nvcc" | tee "$OUT/native.log" | grep -vE '^SKIPPED|^\.|^$' | tail -25 ;;
    sanitize)
      for run in memcheck "racecheck --one-pass" racecheck; do
        read -r tool options <<<"$run"
        # shellcheck disable=SC2086
        timeout "${SANITIZE_SECONDS:-300}" compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-name kernel_substring=s2sent \
          "$python" tests/sanitize_cuda.py $options 2>&1 | tee -a "$OUT/sanitize.log" | tail -3 || failed=1
      done ;;
    # Without what needs no GPU and takes minutes of compiling. Failures are printed as they happen: a run may be cut short.
    suite)
      pytest -vv tests --ignore tests/engines --ignore tests/project/test_compile_kernels.py --ignore tests/commands/test_devices.py \
        --durations=8 -o faulthandler_timeout=120 | tee "$OUT/suite.log" | grep -E ' (FAILED|ERROR) |^(FAILED|ERROR|E  )|^[0-9]+\.[0-9]+s |(passed|failed).* in ' | tail -60 ;;
    devices) pytest tests/commands/test_devices.py --durations=8 -o faulthandler_timeout=120 | tee "$OUT/devices.log" | grep -vE '^SKIPPED|^\.|^$' | tail -15 ;;
    compare)
      base=${BASE:-main}
      [ ! -d build/base ] || base=${BASE:-build/base}
      # The base's extension is compiled for the same GPU.
      # shellcheck disable=SC2086
      TORCH_CUDA_ARCH_LIST=${ARCH:-9.0a} MAX_JOBS=${MAX_JOBS:-$(nproc)} \
        "$python" bench/compare.py --base "$base" --output "$OUT/compare.json" ${COMPARE_OPTIONS:-} 2>"$OUT/compare.err" | tee "$OUT/compare.log"
      code=${PIPESTATUS[0]}
      grep -v '^  ' "$OUT/compare.err" | tail -4
      (exit "$code") ;;
    caller | bench)
      options=${BENCH_OPTIONS:-}
      [ "$step" = bench ] || options="--sections caller ${CALLER_OPTIONS:-}"
      # shellcheck disable=SC2086
      "$python" bench/suite.py --output "$OUT" $options >"$OUT/$step.log" 2>"$OUT/$step.err"
      code=$?
      cat "$OUT/$step.log"
      grep -vE 'Warning|^ |^$' "$OUT/$step.err" | tail -4
      (exit $code) ;;
    # shellcheck disable=SC2086
    encode) "$python" bench/encode.py --output "$OUT/encode.json" ${ENCODE_OPTIONS:?--texts FILE} 2>"$OUT/encode.err" | tee "$OUT/encode.log" ;;
    selector)
      # shellcheck disable=SC2086
      HF_HUB_OFFLINE=1 S2SENT_BACKEND=reference "$python" bench/quality/train_selector.py --cache "${CACHE:-/tmp/s2sent_cache}" \
        --results "$OUT/selector.json" --output "$OUT/selector" ${SELECTOR_OPTIONS:?--data FOLDER --name NAME --encoder FOLDER} \
        2>"$OUT/selector.err" | tee "$OUT/selector.log" | grep '^|' ;;
    # shellcheck disable=SC2086
    sweep) "$python" bench/probes/sweep.py ${SWEEP_OPTIONS:-squeeze A} 2>&1 | tee "$OUT/sweep.log" | tail -40 ;;
    *) echo "gpu.sh: error: no step '$step': build, tests, native, sanitize, suite, devices, compare, caller, encode, selector, bench or sweep" >&2; exit 2 ;;
  esac || failed=1
  echo "== $step took $((SECONDS - begin)) s"
done
exit $failed

#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, step by step. Results and logs go to $OUT; each step ends with a few lines.
#
#   OUT=/tmp/results bench/gpu.sh [build|tests|native|accuracy|fuzz|sanitize|suite|devices|compare|caller|encode|selector|bench|sweep ...]
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
# Errors against float64, which bench/report_accuracy.py makes a page of; 20,000 drawn calls; compute-sanitizer. A lease that is short is
# split by SANITIZE_RUNS ("backend tool", separated by commas) and FUZZ_BACKENDS; a step ends after ACCURACY_SECONDS, after
# FUZZ_SECONDS and a minute for each backend, or after SANITIZE_SECONDS for each run:
#
#   OUT=/tmp/results bench/gpu.sh build accuracy fuzz
#   OUT=/tmp/results SANITIZE_RUNS="triton memcheck,triton racecheck" bench/gpu.sh sanitize
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
    accuracy)
      timeout "${ACCURACY_SECONDS:-300}" "$python" bench/accuracy.py --output "$OUT/accuracy.json" 2>"$OUT/accuracy.err" | tee "$OUT/accuracy.log"
      code=${PIPESTATUS[0]}
      grep -E 'Error|error' "$OUT/accuracy.err" | tail -3
      (exit "$code") ;;
    fuzz)
      for backend in ${FUZZ_BACKENDS:-triton native}; do
        S2SENT_TEST_BACKEND=$backend timeout $((${FUZZ_SECONDS:-150} + 60)) "$python" tests/fuzz/run.py --fixed --seconds "${FUZZ_SECONDS:-150}" 2>&1 \
          | tee "$OUT/fuzz-$backend.log" | tail -40 || failed=1
      done ;;
    sanitize)
      IFS=, read -r -a runs <<<"${SANITIZE_RUNS:-native memcheck,native racecheck --one-pass,native racecheck,native initcheck --narrow,native synccheck,triton memcheck,triton racecheck,triton initcheck,triton synccheck}"
      rm -f "$OUT"/sanitize-*.log
      if [[ "${runs[*]}" == *triton* ]]; then  # fills Triton's cache, the batches side by side
        for number in 0 1 2 3 4; do "$python" tests/sanitize_cuda.py --triton "$number" >"$OUT/warm-$number.log" 2>&1 & done
        wait
        tail -qn 1 "$OUT"/warm-*.log
      fi
      table=()
      for run in "${runs[@]}"; do
        read -r backend tool options <<<"$run"
        only=(--kernel-name kernel_substring=s2sent)
        [ "$backend" = native ] || only=() options="--triton $options"
        [ "$tool" != initcheck ] || only=()  # it has to see who writes what these kernels read
        log="$OUT/sanitize-$backend-$tool${options// /}.log" since=$SECONDS
        # The many cases of the native backend in shares side by side: most of the time is the tool's, on the host. Under racecheck
        # CTAs that wait for each other do not end beside other processes.
        shares=1 chosen=$options
        [ "$backend" != native ] || [ "$tool" = racecheck ] || shares=${SANITIZE_SHARES:-12}
        pids=()
        for share in $(seq "$shares"); do
          [ "$shares" = 1 ] || options="$chosen --share $share/$shares"
          # shellcheck disable=SC2086
          PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${SANITIZE_SECONDS:-300}" compute-sanitizer --tool "$tool" --error-exitcode 1 "${only[@]}" \
            "$python" tests/sanitize_cuda.py $options >"$log.$share" 2>&1 &
          pids+=($!)
        done
        codes=()
        for pid in "${pids[@]}"; do
          wait "$pid"
          code=$?
          codes+=($code)
          [ $code = 0 ] || failed=1
        done
        for share in $(seq "$shares"); do cat "$log.$share"; rm "$log.$share"; done >"$log"
        cases=$(sed -n 's/^\([0-9]*\) cases$/\1/p' "$log" | awk '{ sum += $1 } END { print sum + 0 }')
        table+=("$(printf '%-30s codes %-4s %4d s  %4d cases  %s' "$run" "$(printf '%s\n' "${codes[@]}" | sort -u | paste -sd,)" $((SECONDS - since)) "$cases" "$(grep -oE '(ERROR|RACECHECK) SUMMARY.*' "$log" | sort | uniq -c | paste -sd';')")")
        printf '%s\n' "${table[-1]}"
      done
      printf '%s\n' "-- all runs:" "${table[@]}" ;;
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
    *) echo "gpu.sh: error: no step '$step': build, tests, native, accuracy, fuzz, sanitize, suite, devices, compare, caller, encode, selector, bench or sweep" >&2; exit 2 ;;
  esac || failed=1
  echo "== $step took $((SECONDS - begin)) s"
done
exit $failed

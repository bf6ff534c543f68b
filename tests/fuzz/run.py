"""Draws calls until the time is over: ``make fuzz SECONDS=3600``, or

    S2SENT_TEST_BACKEND=native python tests/fuzz/run.py --seconds 3600
    python tests/fuzz/run.py --case '{"N": 3, ...}'        # one that failed, as it was printed
    S2SENT_TEST_BACKEND=triton python tests/fuzz/run.py --fixed --seconds 120    # on a GPU

--fixed draws from the ten configurations of fuzz_cases.py, a process each: of any other call compiled Triton compiles new
kernels, which takes longer than the call by far.

Every batch of cases has a random seed, which is printed. The first failing case is made smaller, printed, and ends the run with
exit code 1; ``--all`` goes on to the next seed instead.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # builders

import fuzz_calls
import fuzz_engine
import hypothesis
import torch
from fuzz_cases import CONFIGURATIONS, Case, cases, cases_of

BATCH = 500


def batch(seed: int, examples: int, configuration: int | None = None) -> tuple[int, float]:
    """The number of cases, and the largest error in units of its bound. Raises fuzz_calls.Wrong."""
    if configuration is None:
        drawn = cases(fuzz_engine.DTYPES, small=fuzz_engine.INTERPRETED)
    else:
        drawn = cases_of(CONFIGURATIONS[configuration], 6 if fuzz_engine.INTERPRETED else 40)
    done, worst = 0, 0.0

    @hypothesis.seed(seed)
    @fuzz_engine.settings(examples, phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink])
    @hypothesis.given(drawn)
    def run(case: Case) -> None:
        nonlocal done, worst
        done += 1
        worst = max(worst, *fuzz_calls.check(case, fuzz_engine.BACKEND, fuzz_engine.DEVICE).values())

    run()
    return done, worst


def every_configuration(seconds: float) -> int:
    """A process for each of CONFIGURATIONS, at once. Prints what each found; the exit code is 1 if one failed."""
    command = [sys.executable, __file__, "--seconds", str(seconds), "--configuration"]
    running = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for number in range(len(CONFIGURATIONS))
    ]
    failed, total, lines = 0, 0, []
    for number, process in enumerate(running):
        text, _ = process.communicate()
        last = text.strip().splitlines()[-1] if text.strip() else "no output"
        failed += process.returncode != 0
        if process.returncode:
            print(text[-3000:], flush=True)
        counted = re.search(r"(\d+) cases", last)
        total += int(counted[1]) if counted else 0
        lines.append(f"configuration {number}: {'ok    ' if process.returncode == 0 else 'FAILED'} {last}")
    print(*lines, f"{total} cases, {failed} of {len(running)} configurations failed", sep="\n", flush=True)
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="of the first batch; the next ones have the next numbers")
    parser.add_argument("--case", type=Case.from_json, help="check this one alone")
    parser.add_argument("--all", action="store_true", help="go on after a failure")
    parser.add_argument("--fixed", action="store_true", help="every fixed configuration, a process each")
    parser.add_argument("--configuration", type=int, choices=range(len(CONFIGURATIONS)), help="one of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not fuzz_engine.USABLE:
        print(f"{fuzz_engine.BACKEND}: {fuzz_engine.REASON}", file=sys.stderr)
        return 2
    if options.case is not None:
        for name, ratio in fuzz_calls.check(options.case, fuzz_engine.BACKEND, fuzz_engine.DEVICE).items():
            print(f"{ratio:8.3f} of the bound  {name}")
        return 0
    if options.fixed:
        return every_configuration(options.seconds)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    end, total, failures, largest = time.monotonic() + options.seconds, 0, 0, 0.0
    while time.monotonic() < end:
        try:
            # The first batch of a configuration compiles, and the time may be over before a long one ends.
            few = 10 if fuzz_engine.INTERPRETED else 50 if options.configuration is not None else BATCH
            done, worst = batch(seed, few, options.configuration)
            total, largest = total + done, max(largest, worst)
            print(f"seed {seed}: {done} cases, largest error {worst:.3f} of its bound", flush=True)
        except Exception as error:  # whatever a call raised is a failure of it
            failures += 1
            print(
                f"seed {seed}: {type(error).__name__}: {error}", *getattr(error, "__notes__", ()), sep="\n", flush=True
            )
            if not options.all:
                break
        seed += 1
    where = f"{fuzz_engine.BACKEND} on {fuzz_engine.DEVICE}"
    print(f"{where}: {total} cases, {failures} failures, largest error {largest:.3f} of its bound")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

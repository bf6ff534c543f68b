"""Draws calls until the time is over: ``make fuzz SECONDS=3600``, or

    S2SENT_TEST_BACKEND=native python tests/fuzz/run.py --seconds 3600
    python tests/fuzz/run.py --case '{"N": 3, ...}'        # one that failed, as it was printed

Every batch of cases has a random seed, which is printed. The first failing case is made smaller, printed, and ends the run with
exit code 1; ``--all`` goes on to the next seed instead.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # builders

import fuzz_calls
import fuzz_engine
import hypothesis
import torch
from fuzz_cases import Case, cases

BATCH = 500


def batch(seed: int, examples: int) -> tuple[int, float]:
    """The number of cases, and the largest error in units of its bound. Raises fuzz_calls.Wrong."""
    done, worst = 0, 0.0

    @hypothesis.seed(seed)
    @fuzz_engine.settings(examples, phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink])
    @hypothesis.given(cases(fuzz_engine.DTYPES, small=fuzz_engine.INTERPRETED))
    def run(case: Case) -> None:
        nonlocal done, worst
        done += 1
        worst = max(worst, *fuzz_calls.check(case, fuzz_engine.BACKEND, fuzz_engine.DEVICE).values())

    run()
    return done, worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="of the first batch; the next ones have the next numbers")
    parser.add_argument("--case", type=Case.from_json, help="check this one alone")
    parser.add_argument("--all", action="store_true", help="go on after a failure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not fuzz_engine.USABLE:
        print(f"{fuzz_engine.BACKEND}: {fuzz_engine.REASON}", file=sys.stderr)
        return 2
    if options.case is not None:
        for name, ratio in fuzz_calls.check(options.case, fuzz_engine.BACKEND, fuzz_engine.DEVICE).items():
            print(f"{ratio:8.3f} of the bound  {name}")
        return 0
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    end, total, failures = time.monotonic() + options.seconds, 0, 0
    while time.monotonic() < end:
        try:
            done, worst = batch(seed, 10 if fuzz_engine.INTERPRETED else BATCH)
            total += done
            print(f"seed {seed}: {done} cases, largest error {worst:.3f} of its bound", flush=True)
        except Exception as error:  # whatever a call raised is a failure of it
            failures += 1
            print(
                f"seed {seed}: {type(error).__name__}: {error}", *getattr(error, "__notes__", ()), sep="\n", flush=True
            )
            if not options.all:
                break
        seed += 1
    print(f"{fuzz_engine.BACKEND} on {fuzz_engine.DEVICE}: {total} cases, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

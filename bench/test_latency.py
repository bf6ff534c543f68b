"""The smaller cases under pytest-benchmark, for a quick look while working, on a CPU too:

    python -m pytest bench/test_latency.py

`make test` does not collect it. Each call is compared with the reference before it is timed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from calls import call_of, grad_mode
from cases import PATHS, Case, Inputs, cases_of
from contestants import MEAN_OF_LAST, Contestant, contestants, ours
from parity import check
from timing import on_gpu, synchronise

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if on_gpu() else "cpu"
SMALL = Case("small", 4, 16, 6, 384, torch.float32)
CASES = (*(case for case in cases_of(DEVICE) if case.name in ("B", "C")), SMALL)


def timed(benchmark, contestant: Contestant, case: Case, what: str, mode: str) -> None:
    call = call_of(contestant, Inputs(case, 0, mode != "forward", DEVICE), what, mode)

    def to_the_end() -> None:
        call()
        synchronise()

    with grad_mode(mode):
        benchmark.pedantic(to_the_end, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("what", PATHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_path(benchmark, case, what, mode):
    contestant = ours(case, what, DEVICE)
    outcome = check(contestant, case, what, DEVICE, "paper", mode == "both")
    assert outcome.ok, outcome
    benchmark.group = f"{case.name} {what} {mode}"
    timed(benchmark, contestant, case, what, mode)


@pytest.mark.parametrize("case", [case for case in CASES if case.batch > 1], ids=lambda case: case.name)
def test_pooled_path_with_batch_statistics(benchmark, case):
    contestant = ours(case, "pooled", DEVICE, training=True)
    outcome = check(contestant, case, "pooled", DEVICE, "paper", True)
    assert outcome.ok, outcome
    benchmark.group = f"{case.name} pooled both"
    timed(benchmark, contestant, case, "pooled", "training")


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mean_of_last_block(benchmark, case, mode):
    mean = next(each for each in contestants(case, "pooled", DEVICE, "none") if each.name == MEAN_OF_LAST)
    benchmark.group = f"{case.name} pooled {mode}"
    timed(benchmark, mean, case, "pooled", mode)

"""The first call of a process: ``selector.pool`` of case C on hidden states that are already on the device.

    python bench/first_call.py BACKEND DEVICE       # milliseconds of the first and of the second call, as JSON

A compiled backend loads its library, Triton compiles its kernels or finds them in the cache of an earlier process, on disk.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from latency import Settings
    from record import Row

WHAT = "first call"
NATIVE, COMPILING, CACHED = "native", "triton, compiling", "triton, compiled before"
REPEATS = 2  # processes, each of which takes seconds to start; compiling is measured in one


def one_process(backend: str, device: str) -> dict[str, float]:
    """In this process, which must not have called the package yet."""
    from cases import Inputs, host_cases_of
    from contestants import make_selector
    from timing import synchronise, wall_time

    case = host_cases_of(device)[0]
    inputs = Inputs(case, 0, False, device)
    selector = make_selector(case, device, backend=backend)
    with torch.no_grad():
        # The GPU's context and its libraries are the encoder's before they are the selector's.
        torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
        synchronise()
        first, second = (wall_time(lambda: selector.pool(inputs.blocks, inputs.mask)) / 1e3 for _ in range(2))
    return {"first": first, "second": second}


def contestants(names: list[str], device: str) -> list[tuple[str, str]]:
    """Names of rows, and their backends. The process that compiles precedes those that find its cache."""
    found = [(NATIVE, "native")] if "native" in names else []
    if "triton" in names and device == "cuda":
        found += [(COMPILING, "triton"), (CACHED, "triton")]
    return found


def steps(device: str) -> int:
    return 1


def measure(names: list[str], settings: Settings, say: Callable[[str], None]) -> Iterator[list[Row]]:
    from cases import host_cases_of

    say(f"caller {WHAT}")
    case = host_cases_of(settings.device)[0]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as cache:
        for name, backend in contestants(names, settings.device):
            row: Row = {
                "section": "caller", "case": case.name, "what": WHAT, "mode": "forward", "contestant": name,
                "shape": case.shape, "dtype": case.dtype_name,
            }  # fmt: skip
            repeats = 1 if name == COMPILING or settings.device == "cpu" else REPEATS
            try:
                found = [_run(backend, settings.device, cache)["first"] for _ in range(repeats)]
                rows.append(row | {"status": "ok", "first_call_ms": statistics.median(found)})
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                rows.append(row | {"status": "error", "note": _last_line(error)})
    yield rows


def _run(backend: str, device: str, cache: str) -> dict[str, Any]:
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    command = [sys.executable, str(Path(__file__).resolve()), backend, device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _last_line(error: Exception) -> str:
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return lines[-1][:200] if lines else type(error).__name__


if __name__ == "__main__":
    print(json.dumps(one_process(*sys.argv[1:3])))

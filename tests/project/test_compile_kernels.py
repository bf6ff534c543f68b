"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU: no spills, 128-bit loads, and no arithmetic whose
rounding the assembler may choose."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"
CAPABILITIES, SIZES = (80, 90, 100), (384, 768, 1024)
FLOAT32 = ("768,4,6", "1024,4,24", "768,4,12")  # whose sums over tokens keep more in registers


def cases():
    """Every N with every M; D and the capability rotate so that every pair of values occurs, and one in
    float32: {capability: ["D,M,N", ...]}."""
    found = {capability: [] for capability in CAPABILITIES}
    for (i, num_blocks), (j, frequencies) in itertools.product(enumerate((3, 6, 12, 24)), enumerate((1, 2, 4, 8))):
        capability, size = CAPABILITIES[(i + 2 * j) % 3], SIZES[(i + j) % 3]
        found[capability].append(f"{size},{frequencies},{num_blocks}")
    for capability, case in zip(CAPABILITIES, FLOAT32, strict=True):
        found[capability].append(f"{case},float32")
    return found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # the same code in a tenth less time
    command = [sys.executable, str(SCRIPT), str(capability), *cases()[capability]]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    bad = [line for line in result.stdout.splitlines() if not line.startswith("ok ")]
    assert result.returncode == 0 and not bad, "\n".join(bad) + result.stderr[-2000:]
    assert len(result.stdout.splitlines()) >= 10 * len(cases()[capability])

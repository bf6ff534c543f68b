"""Malformed calls of every public function, method and op, in processes of their own, since a wrong one may crash."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_malformed.py")


@pytest.mark.parametrize("seed", range(2))
def test_wrong_calls_are_refused_by_name_and_change_nothing(seed):
    done = subprocess.run([sys.executable, SCRIPT, "2000", str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout.rpartition("\r")[2][-5000:] + done.stderr[-3000:]

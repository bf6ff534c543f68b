"""The engine that the fuzzers call, as in tests/engines/harness.py, but "native" where S2SENT_TEST_BACKEND is unset, and
"reference" where that is not built: float32 against float64 then."""

from __future__ import annotations

import os

import hypothesis
import torch

import s2sent_kernels as s2
from s2sent_kernels.engines.choice import LIMITS
from s2sent_kernels.engines.triton.limits import triton_interprets
from s2sent_kernels.formula.call import KERNEL_DTYPES, Call

BACKEND = os.environ.get("S2SENT_TEST_BACKEND") or ("native" if s2.backends()["native"].usable else "reference")
USABLE, REASON = s2.backends()[BACKEND]
INTERPRETED = BACKEND == "triton" and triton_interprets()


def _device() -> str:
    asked = os.environ.get("S2SENT_TEST_DEVICE")
    if INTERPRETED or asked or not torch.cuda.is_available():
        return "cpu" if INTERPRETED else asked or "cpu"
    refused = BACKEND != "reference" and LIMITS[BACKEND].refuses(Call(torch.device("cuda"), torch.float32))
    return "cpu" if refused else "cuda"


DEVICE = _device()
if BACKEND == "reference":
    # In 16 bits autograd adds the rounded gradients of squeeze and fuse, where engines round their sum.
    DTYPES: tuple[str, ...] = ("float32", "float64")
else:
    names = [str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES]
    DTYPES = tuple(name for name in names if not (INTERPRETED and name == "bfloat16"))  # the interpreter truncates it


def settings(examples: int, **options: object) -> hypothesis.settings:
    """No file of examples and no clock: outcomes depend on the seed alone."""
    return hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,  # the case's own text replays it, on any version of hypothesis
        **options,  # type: ignore[arg-type]
    )

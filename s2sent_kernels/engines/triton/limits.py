"""What the Triton engine needs, and what it refuses. Imports no Triton, which may not be installed."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from ...files import installs
from ...formula.call import KERNEL_DTYPES, Call
from ..interface import KERNEL_DTYPE_TEXT, BackendStatus

MINIMUM_CAPABILITY = (8, 0)  # sm_80: the oldest GPU whose kernels are compiled in the tests
LIMITS = (
    f"{KERNEL_DTYPE_TEXT} on CUDA from sm_80 on; gates up to H = 256, their gradients also up to N = 32 blocks "
    "(16 above H = 128): a larger gate is computed in plain PyTorch, with a warning"
)


def triton_interprets() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter. Triton itself decides when a kernel is decorated."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def status() -> BackendStatus:
    return _status(None, triton_interprets())


@functools.cache
def _status(device_index: int | None, interprets: bool) -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, f"Triton is not installed: {installs('triton')}")
    if interprets:
        return BackendStatus(True, "in Triton's interpreter, on the CPU (TRITON_INTERPRET=1): for tests, very slow")
    if not torch.cuda.is_available():
        return BackendStatus(False, "torch sees no CUDA device")
    capability = torch.cuda.get_device_capability(device_index)
    name = torch.cuda.get_device_name(device_index)
    if capability < MINIMUM_CAPABILITY:
        wanted = "sm_{}{}".format(*MINIMUM_CAPABILITY)
        return BackendStatus(False, f"{name} is sm_{capability[0]}{capability[1]}, the kernels need {wanted} or newer")
    return BackendStatus(True, f"on {name}")


def refuses(call: Call) -> str | None:
    """Why the engine cannot compute ``call`` here, or None if it can."""
    interprets = triton_interprets()
    found = _status(call.device.index if call.device.type == "cuda" else None, interprets)
    if not found.usable:
        return found.reason
    if call.dtype not in KERNEL_DTYPES:
        return f"it computes {KERNEL_DTYPE_TEXT}, got {call.dtype}"
    if call.device.type != ("cpu" if interprets else "cuda"):
        where = "cpu under TRITON_INTERPRET=1" if interprets else "cuda"
        return f"it runs on {where} tensors, got {call.device.type} tensors"
    return None

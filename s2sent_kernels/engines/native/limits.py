"""What the compiled engine needs, and what it refuses. ``status`` loads the extension."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from ...formula.call import ACTIVATIONS, KERNEL_DTYPES, POOLINGS, Call
from ..interface import KERNEL_DTYPE_TEXT, BackendStatus
from .engine import INTERFACE

MAXIMUM_BLOCKS = 128  # N on CUDA: kMaxBlocks of csrc
LIMITS = f"{KERNEL_DTYPE_TEXT}; on CUDA sm_80 or newer and up to {MAXIMUM_BLOCKS} blocks"

_ops = torch.ops.s2sent_native
_T = TypeVar("_T")


def _untraced(question: Callable[[], _T]) -> _T:
    """The answer of a function that calls the extension's ops, which no tracer can record: torch.jit.trace, torch.onnx.export,
    torch.export and make_fx each have a state of the thread, and a new thread has none."""
    with ThreadPoolExecutor(1, "s2sent-native") as thread:
        return thread.submit(question).result()


@functools.cache
def status() -> BackendStatus:
    """Loads the extension, which registers torch.ops.s2sent_native.*. Any error while loading becomes the reason. It is kept,
    so it must not depend on what happens to trace the first call."""
    return _untraced(_load)


def _load() -> BackendStatus:
    name = "..._C"  # of this copy of the package
    try:
        if importlib.util.find_spec(name, __package__) is None:
            return BackendStatus(False, "the compiled extension is not built (see S2SENT_BUILD in setup.py)")
        importlib.import_module(name, __package__)
        found = _ops.interface_version()
        if found != INTERFACE:
            return BackendStatus(
                False, f"the compiled extension has interface {found}, this package needs {INTERFACE}: build it again"
            )
        _check_numbering()
        cuda = ", ".join(f"sm_{architecture}" for architecture in _ops.cuda_architectures())
    except Exception as error:  # a library that is cut off, or for another torch or processor
        return BackendStatus(False, f"the compiled extension does not load: {type(error).__name__}: {error}")
    return BackendStatus(True, "compiled C++ on the CPU" + (f" and CUDA C++ for {cuda}" if cuda else ""))


def _check_numbering() -> None:
    """The extension receives words as numbers: both sides must count alike."""
    for name, ours, theirs in (
        ("poolings", POOLINGS, tuple(_ops.poolings())),
        ("activations", ACTIVATIONS, tuple(_ops.activations())),
        ("maximum blocks", MAXIMUM_BLOCKS, _ops.cuda_maximum_blocks()),
    ):
        if ours != theirs:
            raise RuntimeError(f"{name}: expected {ours}, got {theirs}")


@functools.cache
def cuda_refusal(device_index: int | None) -> str | None:
    """Why the usable extension cannot run on this GPU, or None where it can. The answer is kept.

    Raises:
        torch.OutOfMemoryError: the GPU is too full to load a kernel, which says nothing of the next call.
    """
    if not _untraced(_ops.cuda_architectures):
        return "it was built without its CUDA part (see S2SENT_BUILD in setup.py)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    index = torch.cuda.current_device() if device_index is None else device_index
    error = _untraced(lambda: _cuda_error(index))
    if error == "out of memory":  # of cudaErrorMemoryAllocation
        raise torch.OutOfMemoryError(f"CUDA out of memory: no kernel could be loaded on cuda:{index}")
    return f"its kernels do not run on {torch.cuda.get_device_name(index)}: {error}" if error else None


def _cuda_error(index: int) -> str:
    """torch's guard, because a new thread's current device is the first, and CUDA gives a device that it returns to a context:
    hundreds of MB of a GPU that may be another process's. The guard returns to none that has no context."""
    with torch.cuda.device(index):
        return _ops.cuda_error(index)


def refuses(call: Call) -> str | None:
    usable, reason = status()
    if not usable:
        return reason
    if call.dtype not in KERNEL_DTYPES:
        return f"it computes {KERNEL_DTYPE_TEXT}, got {call.dtype}"
    if call.device.type == "cpu":
        return None
    if call.device.type != "cuda":
        return f"it runs on cpu and cuda tensors, got {call.device.type} tensors"
    cause = cuda_refusal(call.device.index)
    if cause is not None:
        return f"it got cuda tensors, and {cause}"
    if call.num_blocks is not None and call.num_blocks > MAXIMUM_BLOCKS:
        return f"it takes up to {MAXIMUM_BLOCKS} blocks on CUDA, got N = {call.num_blocks}"
    return None

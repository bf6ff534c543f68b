"""Which backends are usable here, and which one a call gets. The only place that decides either."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from typing import NamedTuple

import torch

BACKENDS = ("reference", "triton", "native")
BACKEND_VARIABLE = "S2SENT_BACKEND"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of every backend but the reference
NATIVE_INTERFACE = 5  # as in engines/native.py: an extension with another number was built from other sources
MINIMUM_CAPABILITY = (8, 0)  # sm_80: the oldest GPU whose kernels are compiled in the tests
# (N, D) for which "auto" takes native's tokens where no gradient is wanted: over large and small batches of long and short
# sentences they were ready at least 5 % before Triton's on an H200 (bench/results/parts/nvidia-h200-tokens.txt, tested), since
# native can read hidden states of 16 bits once.
ONE_PASS_FASTER = frozenset({(8, 512), (9, 512), (11, 384), (11, 768), (12, 384), (12, 768)})


class BackendStatus(NamedTuple):
    """Whether a backend can be used here; ``reason`` says why not, or on what it runs."""

    usable: bool
    reason: str


def triton_interprets() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter. Triton itself decides when a kernel is decorated."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _triton_status(device_index: int | None, interprets: bool) -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, "Triton is not installed: pip install 's2sent_kernels[triton]'")
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


@functools.cache
def _native_status() -> BackendStatus:
    """Loads the extension, which registers torch.ops.s2sent_native.*. Whatever is wrong with it becomes a reason."""
    name = f"{__package__}._C"
    try:
        if importlib.util.find_spec(name) is None:
            return BackendStatus(False, "the compiled extension is not built (see S2SENT_BUILD in setup.py)")
        importlib.import_module(name)
        found = torch.ops.s2sent_native.interface_version()
    except Exception as error:  # a library that is cut off, or for another torch or processor
        return BackendStatus(False, f"the compiled extension does not load: {type(error).__name__}: {error}")
    if found != NATIVE_INTERFACE:
        return BackendStatus(
            False,
            f"the compiled extension has interface {found}, this package needs {NATIVE_INTERFACE}: build it again",
        )
    cuda = ", ".join(f"sm_{architecture}" for architecture in torch.ops.s2sent_native.cuda_architectures())
    return BackendStatus(True, "compiled C++ on the CPU" + (f" and CUDA C++ for {cuda}" if cuda else ""))


@functools.cache
def native_cuda_refusal(device_index: int | None) -> str | None:
    """Why the usable extension cannot run on this GPU, or None where it can."""
    if not torch.ops.s2sent_native.cuda_architectures():
        return "it was built without its CUDA part (see S2SENT_BUILD in setup.py)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    index = torch.cuda.current_device() if device_index is None else device_index
    error = torch.ops.s2sent_native.cuda_error(index)
    return f"its kernels do not run on {torch.cuda.get_device_name(index)}: {error}" if error else None


def backends() -> dict[str, BackendStatus]:
    """The backends by name: whether each is usable on this machine, and why not or on what.

    May ask the GPU's driver what is there; importing the package never does.
    """
    return {
        "reference": BackendStatus(True, "plain PyTorch, on any device"),
        "triton": _triton_status(None, triton_interprets()),
        "native": _native_status(),
    }


def _refusal(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot take tensors of this device and dtype here, or None where it can."""
    if backend == "reference":
        return None
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():  # the first is cheap and true in every export
        return "a graph in ONNX takes no custom ops, the plain PyTorch of 'reference' alone"
    if backend == "native":
        status = _native_status()
        if not status.usable:
            return status.reason
        if dtype not in KERNEL_DTYPES:
            return f"it computes float32, float16 and bfloat16, got {dtype}"
        if device.type not in ("cpu", "cuda"):
            return f"it runs on cpu and cuda tensors, got {device.type} tensors"
        cause = native_cuda_refusal(device.index) if device.type == "cuda" else None
        return None if cause is None else f"it got cuda tensors, and {cause}"
    interprets = triton_interprets()
    status = _triton_status(device.index if device.type == "cuda" else None, interprets)
    if not status.usable:
        return status.reason
    if dtype not in KERNEL_DTYPES:
        return f"it computes float32, float16 and bfloat16, got {dtype}"
    if device.type != ("cpu" if interprets else "cuda"):
        return (
            f"it runs on {'cpu under TRITON_INTERPRET=1' if interprets else 'cuda'} tensors, got {device.type} tensors"
        )
    return None


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


@functools.cache
def _one_pass_is_faster(index: int | None, dtype: torch.dtype, tokens: tuple[int, int] | None) -> bool:
    if tokens not in ONE_PASS_FASTER or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(index) == (9, 0)


def choose(backend: str, device: torch.device, dtype: torch.dtype, tokens: tuple[int, int] | None = None) -> str:
    """The backend that a call gets.

    "auto" (or what S2SENT_BACKEND names in its place) takes the fastest one that is usable, judged by device, dtype and path,
    of the tokens also by N and D, never by B or L: the same sentence must not change backends, and so bits, with the batch it
    stands in. A backend asked for by name works or raises. Within ``torch.onnx.export`` the reference is the only usable one,
    so that the graph holds PyTorch's own operators.

    Args:
        tokens: (N, D) of a call that makes fused tokens and wants no gradient.

    Raises:
        ValueError: ``backend`` is unknown or cannot take such tensors here; says why.
    """
    asked = (os.environ.get(BACKEND_VARIABLE) or "auto") if backend == "auto" else backend
    if asked not in ("auto", *BACKENDS):
        source = f"{BACKEND_VARIABLE} (in place of 'auto')" if backend == "auto" else "backend"
        raise ValueError(f"{source}: expected 'auto' or one of {BACKENDS}, got {asked!r}")
    if asked != "auto":
        refusal = _refusal(asked, device, dtype)
        if refusal is not None:
            raise ValueError(f"backend: {asked!r} cannot be used here: {refusal}")
        return asked
    if device.type == "cpu" and _refusal("native", device, dtype) is None:
        return "native"
    if device.type != "cuda":
        return "reference"
    # On an H200 Triton's kernels are the faster ones on every other path that bench/results/parts has of both (bfloat16).
    if _one_pass_is_faster(device.index, dtype, tokens) and _refusal("native", device, dtype) is None:
        return "native"
    refusal = _refusal("triton", device, dtype)
    if refusal is None:
        return "triton"
    if _refusal("native", device, dtype) is None:
        return "native"
    if dtype in KERNEL_DTYPES:  # float64 is the reference's own business and no loss to report
        _say_once(f"s2sent_kernels falls back to plain PyTorch: backend 'triton': {refusal}")
    return "reference"


# What @torch.compiler.assume_constant_result sets: traced code takes the result as a constant. The decorator itself would
# import torch's compiler, and with it Triton, along with this package.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]

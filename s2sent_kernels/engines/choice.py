"""Which engine a call gets. The only place that decides it; each engine itself tells what it refuses.

An engine's ``limits`` can be asked without Triton or the extension.
"""

from __future__ import annotations

import os

import torch

from ..formula.call import KERNEL_DTYPES, Call
from . import plain
from .interface import BackendStatus, Engine, Limits, say_once
from .native import engine as native_engine
from .native import limits as native_limits
from .triton import limits as triton_limits

LIMITS: dict[str, Limits] = {"reference": plain, "triton": triton_limits, "native": native_limits}
BACKENDS = tuple(LIMITS)
BACKEND_VARIABLE = "S2SENT_BACKEND"


def backends() -> dict[str, BackendStatus]:
    """The backends by name: whether each is usable on this machine, and why not or on what, with its limits.

    May query the GPU's driver; importing the package never does.
    """
    return {name: _with_limits(engine) for name, engine in LIMITS.items()}


def _with_limits(engine: Limits) -> BackendStatus:
    usable, reason = engine.status()
    return BackendStatus(usable, f"{reason}; {engine.LIMITS}" if usable else reason)


def _refusal(backend: str, call: Call) -> str | None:
    """Why ``backend`` cannot compute this call here, or None where it can."""
    # The first question is cheap, and its answer is yes in every export.
    if (
        backend != "reference"
        and (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and torch.onnx.is_in_onnx_export()
    ):
        return "a graph in ONNX takes no custom ops, the plain PyTorch of 'reference' alone"
    return LIMITS[backend].refuses(call)


def _fastest(call: Call) -> tuple[str, ...]:
    """The engines that "auto" tries, the fastest first. The last one refuses nothing."""
    if call.device.type == "cpu":
        return "native", "reference"
    if call.device.type == "cuda":
        # Its calls cost the host about half of what Triton's launches do (section "caller" of bench/REPORT.md).
        return "native", "triton", "reference"
    return ("reference",)


def choose(backend: str, call: Call) -> str:
    """The backend that a call gets.

    "auto" (or what S2SENT_BACKEND names in its place) picks the fastest engine that supports the call. It knows device, dtype
    and N, and neither B nor L: a sentence must not change backends, and so bits, with the batch around it. A backend
    named explicitly is used or raises. Within ``torch.onnx.export`` the reference is the only usable one, so that the graph
    holds PyTorch's own operators.

    Raises:
        ValueError: ``backend`` is unknown or cannot compute such a call here; tells why.
    """
    # torch.compile can pass plain values to a function whose result it treats as a constant, but no record.
    return _choose(backend, *call)


def check_environment() -> None:
    """ValueError where S2SENT_BACKEND names no backend, or one that is not usable on this machine."""
    named = _named("auto")
    if named != "auto":
        usable, reason = LIMITS[named].status()
        if not usable:
            raise ValueError(f"{BACKEND_VARIABLE}: {named!r} cannot be used here: {reason}")


def _named(backend: str) -> str:
    """``backend``, or what S2SENT_BACKEND names in place of "auto". ValueError where there is none of this name."""
    named = (os.environ.get(BACKEND_VARIABLE) or "auto") if backend == "auto" else backend
    if named not in ("auto", *BACKENDS):
        source = f"{BACKEND_VARIABLE} (in place of 'auto')" if backend == "auto" else "backend"
        raise ValueError(f"{source}: expected 'auto' or one of {BACKENDS}, got {named!r}")
    return named


def _choose(backend: str, *fields: object) -> str:
    call = Call(*fields)  # type: ignore[arg-type]
    named = _named(backend)
    if named != "auto":
        refusal = _refusal(named, call)
        if refusal is not None:
            raise ValueError(f"backend: {named!r} cannot be used here: {refusal}")
        return named
    refusals: dict[str, str] = {}
    for candidate in _fastest(call):
        refusal = _refusal(candidate, call)
        if refusal is None:
            break
        refusals[candidate] = refusal
    # float64 is the reference's own business, and a CPU without the extension is slower at worst by a small factor.
    if candidate == "reference" and "triton" in refusals and call.dtype in KERNEL_DTYPES:
        say_once(f"s2sent_kernels falls back to plain PyTorch: backend 'triton': {refusals['triton']}")
    return candidate


# The attribute that @torch.compiler.assume_constant_result sets, so that traced code treats the result as a constant. The
# decorator itself would import torch's compiler, and with it Triton, along with this package.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def engine_of(backend: str) -> Engine:
    """The engine of a backend that ``choose`` returned. The Triton engine is imported when it is first used."""
    if backend == "native":
        return native_engine
    if backend == "triton":
        from .triton import engine

        return engine
    if backend == "reference":
        return plain
    raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")


def engine_for(backend: str, call: Call) -> Engine:
    """The engine that ``choose`` gives a call."""
    return engine_of(choose(backend, call))

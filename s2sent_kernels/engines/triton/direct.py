"""Launches compiled kernels without Triton's binding of arguments, which takes most of a launch's time on the host.

``kernel[grid](...)`` looks a compiled kernel up by everything that Triton specialises on, and then calls its launcher. A direct
launch has a key of its own, which is cheaper to build and never coarser than Triton's, and makes the same call to the launcher.
Beside the kernel, the key is

    the driver and the device
    for each pointer: None or its dtype; for a tuple of pointers the dtypes of all
    for each integer that Triton specialises: whether it is 1, whether 16 divides it
    every constexpr and every option

A launch goes through Triton if the key does not describe it: if 16 does not divide an address for which that matters, or an
integer is not an int32. So do all launches in the interpreter, while torch.compile traces, and while someone observes
launches or changes how kernels are compiled (hooks, debugging, instrumentation).

The first launch of a key compiles. In the second one Triton's own call to the launcher is compared with the direct one,
argument by argument, and the direct one is tried in its place. A version of Triton in which they differ keeps the key.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

OPTIONS = ("num_warps", "enable_fp_fusion", "launch_pdl")  # a launch's; None leaves the default to Triton
Key = tuple[Any, ...]

_INT32 = 0x7FFFFFFF
_learning = threading.RLock()


def direct(kernel: Any, tuples: tuple[str, ...] = ()) -> Callable[..., None]:
    """``launch(programs, name=value, ...)`` for ``kernel[(programs,)](name=value, ...)``, on the device of the kernel's tensors.

    Args:
        kernel: its pointers begin with ``p_``; all else that is not a constexpr is an integer. Its first argument is a pointer
            or a tuple of them, and never None: the launch is on this tensor's device. The others must lie there too, which a
            direct launch does not check.
        tuples: the names of the arguments that are tuples of pointers.
    """
    return _Launcher(kernel, tuples).launch


class _Ready(NamedTuple):
    """What a direct launch calls, and with what beside the kernel's arguments."""

    run: Callable[..., None]
    function: Any
    metadata: Any


class _Call(NamedTuple):
    """A launch that is not direct yet."""

    programs: int
    arguments: tuple[Any, ...]  # the kernel's, in order
    options: dict[str, Any]


class _Launcher:
    def __init__(self, kernel: Any, tuples: tuple[str, ...]) -> None:
        self.kernel = kernel
        self.ready: dict[Key, _Ready] = {}
        self.compiled: dict[Key, CompiledKernel | None] = {}  # launched once; None stays with Triton
        self.launch = self._by_name
        if isinstance(kernel, JITFunction):  # else the interpreter's
            try:
                _undisturbed()
                self.launch = self._bound(tuples)
            except AttributeError:  # another Triton
                self.launch = self._by_name

    def _by_name(self, programs: int, **arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
        self.kernel[(programs,)](**arguments, **_given(options))

    def _bound(self, tuples: tuple[str, ...]) -> Callable[..., None]:
        """Like Triton, from source code that is written for the kernel's arguments: a loop over them would take longer than
        all else."""
        names: dict[str, Any] = {
            "_driver": driver,
            "_undisturbed": _undisturbed,
            "_hooks": self.kernel.pre_run_hooks,
            "_data_ptr": torch.Tensor.data_ptr,
            "_dtype": operator.attrgetter("dtype"),
            "_ready": self.ready,
            "_Call": _Call,
            "_learn": self._learn,
            "_through_triton": self._through_triton,
        }
        exec(_source(self.kernel.params, tuples), names)
        return names["launch"]

    def _through_triton(self, call: _Call) -> Any:
        first = call.arguments[0]
        tensor = first[0] if isinstance(first, tuple) else first
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
            named = zip((p.name for p in self.kernel.params), call.arguments, strict=True)
            with torch.cuda.device(tensor.get_device()):
                return self.launch(call.programs, **dict(named), **call.options)
        return self.kernel[(call.programs,)](*call.arguments, **_given(call.options))

    def _learn(self, key: Key, call: _Call, direct_arguments: tuple[Any, ...]) -> None:
        """A launch through Triton after which those of this ``key`` may be direct."""
        with _learning:
            if key not in self.compiled:
                found = self._through_triton(call)
                if type(found) is CompiledKernel:  # None, if a hook kept Triton from compiling
                    self.compiled[key] = found
                return
            compiled = self.compiled[key]
            if compiled is not None and key not in self.ready:
                self.compiled[key] = None  # until proven
                ready = self._try(compiled, call, direct_arguments)
                if ready is not None:
                    self.compiled[key] = compiled
                    self.ready[key] = ready
                return
        self._through_triton(call)

    def _try(self, compiled: CompiledKernel, call: _Call, direct_arguments: tuple[Any, ...]) -> _Ready | None:
        """Launches through Triton up to Triton's own call to the launcher, and there makes the direct call, if it is the
        same. None if it is not."""
        ready = _Ready(compiled.run, compiled.function, compiled.packed_metadata)
        proven = False

        def run(*given: Any) -> None:  # also for other threads, with other arguments
            nonlocal proven
            programs, stream, arguments = given[:3], given[3:4], given[9:]
            same = (
                programs == (call.programs, 1, 1) and given[4:6] == ready[1:] and len(arguments) == len(call.arguments)
            )
            if same and all(map(operator.is_, arguments, call.arguments)):
                try:
                    ready.run(*programs, *stream, *ready[1:], None, None, None, *direct_arguments)
                except TypeError:  # raised before anything is launched
                    pass
                else:
                    proven = True
                    return
            ready.run(*given)

        compiled._run = run
        try:
            self._through_triton(call)
        finally:
            compiled._run = ready.run
        return ready if proven else None


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _undisturbed() -> bool:
    """Whether nothing traces or observes launches, or changes how kernels are compiled."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not (
        torch.compiler.is_compiling()
        or getattr(enter, "calls", enter)  # a chain of hooks, or a function that took its place
        or getattr(leave, "calls", leave)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


def _source(params: list[Any], tuples: tuple[str, ...]) -> str:
    """The source of ``launch``. Its arguments are the kernel's; all other names in it begin with an underscore."""
    tensor = f"{params[0].name}[0]" if params[0].name in tuples else params[0].name
    bind, key, passed, integers = ["_bits = 0"], ["_active", "_device"], [], []
    for param in params:
        name, address = param.name, f"_{param.name}"
        aligned = not (param.do_not_specialize or param.do_not_specialize_on_alignment)
        if param.is_constexpr:
            key.append(name)
            passed.append(name)
        elif param.annotation:
            raise ValueError(f"{name}: expected no annotation but constexpr, got {param.annotation!r}")
        elif name in tuples:
            bind.append(f"{address} = tuple(map(_data_ptr, {name}))")
            bind += [f"for _address in {address}: _bits |= _address"] if aligned else []
            key.append(f"tuple(map(_dtype, {name}))")
            passed.append(address)
        elif name.startswith("p_"):
            bind.append(f"{address} = None if {name} is None else {name}.data_ptr()")
            bind += [f"if {address}: _bits |= {address}"] if aligned else []
            key.append(f"None if {name} is None else {name}.dtype")
            passed.append(address)
        else:
            integers.append(name)
            if not param.do_not_specialize:
                key.append(f"2 if {name} == 1 else {name} & 15 == 0" if aligned else f"{name} == 1")
            passed.append(name)
    if integers:  # their union is not negative and an int32, so all of them are
        bind.append(f"if not {' is '.join(f'{name}.__class__' for name in integers)} is int: _bits = 1")
        bind.append(f"elif not 0 <= {' | '.join(integers)} <= {_INT32}: _bits = 1")
    arguments = "".join(f"{param.name}, " for param in params)
    defaults = ", ".join(f"{name}=None" for name in OPTIONS)
    options = ", ".join(f"{name!r}: {name}" for name in OPTIONS)
    body = "\n            ".join(bind)
    call = f"_Call(programs, ({arguments}), {{{options}}})"
    return f"""
def launch(programs, *, {arguments}{defaults}):
    if _undisturbed() and not _hooks:
        _active = _driver.active
        _device = {tensor}.get_device()
        if _device == _active.get_current_device():
            {body}
            if not _bits & 15:
                _key = ({", ".join((*key, *OPTIONS))})
                _found = _ready.get(_key)
                if _found is None:
                    return _learn(_key, {call}, ({", ".join(passed)},))
                _run, _function, _metadata = _found
                _stream = _active.get_current_stream(_device)
                _run(programs, 1, 1, _stream, _function, _metadata, None, None, None, {", ".join(passed)})
                return
    _through_triton({call})
"""

"""Peak extra memory of each path, forward and forward + backward, beside that of what it is compared with.

    python bench/memory.py [--cases A,D] [--competitors none|eager]     # a part of bench/suite.py

"Extra" is what a call allocates at its peak beyond what was there before it, its results included. On a GPU the allocator
says; on a CPU the tensors that PyTorch's operators return are counted while they live, which misses what an operator allocates
and frees within itself.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import torch
from cases import MODES, PATHS, Case, Inputs
from contestants import MEAN_OF_LAST, Contestant, Missing, contestants, make_selector
from timing import describe, on_gpu, synchronise
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 1 << 20
FED = "s2sent_kernels, block by block"


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operators hand out, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def known(self, tensors: list[torch.Tensor]) -> None:
        """Tensors that were there before."""
        self._before = [tensor.untyped_storage() for tensor in tensors]
        self._pointers = {storage.data_ptr() for storage in self._before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        if not size or pointer in self._known or pointer in self._pointers:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self._known[pointer] = weakref.finalize(storage, self._freed, pointer, size)

    def _freed(self, pointer: int, size: int) -> None:
        self.now -= size
        self._known.pop(pointer, None)


def peak_bytes(call: Callable[[], object], there: list[torch.Tensor]) -> int:
    """Bytes that ``call`` has allocated at its peak; ``there`` are the tensors it works on."""
    gc.collect()
    if on_gpu():
        synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        synchronise()
        del result
        return torch.cuda.max_memory_allocated() - before
    with _Live() as live:
        live.known(there)
        result = call()
    del result
    return live.peak


def call_of(contestant: Contestant, inputs: Inputs, what: str, mode: str) -> Callable[[], object]:
    """One whole call, to be made under ``grad_mode(mode)``: the forward, or forward and backward ("both")."""
    if mode == "forward":
        return partial(contestant.call, inputs)

    def both() -> object:
        outputs = contestant.run(inputs)
        return torch.autograd.grad(outputs, *_wanted(contestant, inputs, what), allow_unused=True)

    return both


def grad_mode(mode: str) -> torch.set_grad_enabled:
    return torch.set_grad_enabled(mode != "forward")


def _wanted(contestant: Contestant, inputs: Inputs, what: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What gradients are asked for, and of the outputs. The mean of the last block has no others than that block's."""
    leaves = list(inputs.leaves(what).values())
    if contestant.name == MEAN_OF_LAST:
        leaves = leaves[-1:]
    return [*leaves, *contestant.parameters.values()], inputs.output_gradients(what)


def backward_of(contestant: Contestant, inputs: Inputs, what: str) -> Callable[[], object]:
    """The backward alone, again and again, of one forward that runs now."""
    outputs = contestant.run(inputs)
    wanted, given = _wanted(contestant, inputs, what)
    return lambda: torch.autograd.grad(outputs, wanted, given, retain_graph=True, allow_unused=True)


def row_of(case: Case, what: str, mode: str, name: str) -> dict[str, object]:
    """What a row of any section begins with."""
    return {
        "case": case.name, "shape": case.shape, "dtype": case.dtype_name, "layout": case.layout, "what": what,
        "mode": mode, "contestant": name,
    }  # fmt: skip


def peak_row(contestant: Contestant, case: Case, inputs: Inputs, what: str, mode: str) -> dict[str, object]:
    row = row_of(case, what, mode, contestant.name) | {"section": "memory", "states_mib": case.state_bytes / MIB}
    there = [*inputs.blocks, *contestant.parameters.values()]
    try:
        call = call_of(contestant, inputs, what, mode)
        with grad_mode(mode):
            if on_gpu():
                call()  # workspaces that libraries keep are not the call's
            return row | {"status": "ok", "peak_mib": peak_bytes(call, there) / MIB}
    except Exception as error:
        return row | {"status": "error", "note": describe(error)}


def _fed(case: Case, device: str) -> Contestant:
    """The pooled path one block at a time. Who calls it lets each hidden state go; here they are kept, and not counted."""
    selector = make_selector(case, device)

    def call(inputs: Inputs) -> torch.Tensor:
        stream = selector.blockwise(inputs.mask, cu_seqlens=inputs.cu_seqlens)
        for n, hidden_state in enumerate(inputs.blocks):
            stream.add(n, hidden_state)
        return stream.result()

    return Contestant(FED, call, dict(selector.named_parameters()), modes=("forward",))


def measure(case: Case, device: str, choice: str) -> Iterator[dict[str, object]]:
    """The section's rows of one case. Nothing is compiled for it: those peaks are taken where their times are."""
    for what in PATHS:
        found = list(contestants(case, what, device, "eager" if choice != "none" else "none"))
        if what == "pooled":
            found.append(_fed(case, device))
        for mode in (MODES[0], MODES[2]):
            inputs = Inputs(case, 0, mode == "both", device)
            for contestant in found:
                if isinstance(contestant, Missing):
                    row = row_of(case, what, mode, contestant.name)
                    yield row | {"section": "memory", "status": contestant.why}
                elif mode in contestant.modes:
                    yield peak_row(contestant, case, inputs, what, mode)
            del inputs
        del found
        free()


def free() -> None:
    """Hand back what the last contestants held, so that the next ones do not find the memory full."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    from suite import main

    sys.exit(main(["--sections", "memory", *sys.argv[1:]]))

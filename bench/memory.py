"""Section "memory" of bench/suite.py: peak extra memory of each path and its competitors, forward and forward + backward.

"Extra" is what a call allocates at its peak beyond what was allocated before it, its results included. On a GPU PyTorch's
allocator reports it. On a CPU the tensors that PyTorch's operators return are counted while they live, which misses what an
operator allocates and frees internally.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import torch
from calls import call_of, free, grad_mode, row_of
from cases import MODES, PATHS, Case, Inputs
from contestants import Contestant, Missing, contestants, make_selector
from record import Row
from timing import describe, on_gpu, synchronise
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 1 << 20
FED = "s2sent_kernels, block by block"


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def known(self, tensors: list[torch.Tensor]) -> None:
        """Tensors that existed before; they are not counted."""
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
    """Bytes that ``call`` allocates at its peak; ``there`` are the tensors it reads."""
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


def peak_row(contestant: Contestant, case: Case, inputs: Inputs, what: str, mode: str) -> Row:
    row = row_of(case, what, mode, contestant.name) | {"section": "memory", "states_mib": case.state_bytes / MIB}
    there = [*inputs.blocks, *contestant.parameters.values()]
    try:
        call = call_of(contestant, inputs, what, mode)
        with grad_mode(mode):
            if on_gpu():
                call()  # libraries allocate workspaces once, which are not the call's
            return row | {"status": "ok", "peak_mib": peak_bytes(call, there) / MIB}
    except Exception as error:
        return row | {"status": "error", "note": describe(error)}


def _fed(case: Case, device: str) -> Contestant:
    """The pooled path one block at a time. A real caller frees each hidden state; here they are kept, and not counted."""
    selector = make_selector(case, device)

    def call(inputs: Inputs) -> torch.Tensor:
        stream = selector.blockwise(inputs.mask, cu_seqlens=inputs.cu_seqlens)
        for n, hidden_state in enumerate(inputs.blocks):
            stream.add(n, hidden_state)
        return stream.result()

    return Contestant(FED, call, dict(selector.named_parameters()), modes=("forward",))


def measure(case: Case, device: str, choice: str) -> Iterator[Row]:
    """The rows of one case. Compiled contestants are left out: latency.py takes their peaks beside their times."""
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

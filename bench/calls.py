"""The calls that latency, memory and pytest-benchmark time: a contestant's forward, its backward, or both; and their rows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import torch
from cases import Case, Inputs
from contestants import MEAN_OF_LAST, Contestant
from record import Row
from timing import on_gpu


def row_of(case: Case, what: str, mode: str, name: str) -> Row:
    """The fields that a row of every section begins with."""
    return {
        "case": case.name,
        "shape": case.shape,
        "dtype": case.dtype_name,
        "layout": case.layout,
        "what": what,
        "mode": mode,
        "contestant": name,
    }


def grad_mode(mode: str) -> torch.set_grad_enabled:
    return torch.set_grad_enabled(mode != "forward")


def call_of(contestant: Contestant, inputs: Inputs, what: str, mode: str) -> Callable[[], object]:
    """One whole call, to be made under ``grad_mode(mode)``: the forward, or forward and backward ("both")."""
    if mode == "forward":
        return partial(contestant.call, inputs)

    def both() -> object:
        outputs = contestant.run(inputs)
        return torch.autograd.grad(outputs, *_wanted(contestant, inputs, what), allow_unused=True)

    return both


def backward_of(contestant: Contestant, inputs: Inputs, what: str) -> Callable[[], object]:
    """The backward alone, repeatable, of a forward that runs now."""
    outputs = contestant.run(inputs)
    wanted, given = _wanted(contestant, inputs, what)
    return lambda: torch.autograd.grad(outputs, wanted, given, retain_graph=True, allow_unused=True)


def _wanted(contestant: Contestant, inputs: Inputs, what: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors to differentiate by, and the outputs' gradients. The mean of the last block depends on that block alone."""
    leaves = list(inputs.leaves(what).values())
    if contestant.name == MEAN_OF_LAST:
        leaves = leaves[-1:]
    return [*leaves, *contestant.parameters.values()], inputs.output_gradients(what)


def free() -> None:
    """Release the last contestants' memory, so that the next ones do not run out of it."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()

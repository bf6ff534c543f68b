"""A forward that runs a second time within a backward pass: in a checkpoint, or under a loss that caches gradients.

Such a forward repeats, with gradients, one that ran before without. The first one has counted for the running statistics of batch
norms, as any forward in training does in torch, with and without gradients. The second does not count again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def in_backward() -> bool:
    """Whether autograd runs a backward pass on this thread. A compiled graph cannot ask: there every forward counts."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """The batch norms in ``module`` use the statistics of a batch without updating their running ones. They still pass them on
    to the operator: a checkpoint compares what both forwards save."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches

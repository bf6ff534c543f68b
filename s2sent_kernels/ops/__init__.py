"""torch.ops.s2sent.*, one op a file. Importing this package registers all of them.

    squeeze, gate, fuse          the three stages, differentiable on their own
    select_pool, select          the paper's formula with running statistics in one op: what inference runs
    squeeze_block                one block at a time into partial sums, for inference
    *_backward                   what the backward passes call; differentiating them raises

``write_once`` is no op: it joins squeeze and fuse around a gate of modules, so that each gradient is written once.
"""

from . import (
    fuse,
    fuse_backward,
    gate,
    gate_backward,
    gate_pool_backward,
    select,
    select_pool,
    squeeze,
    squeeze_backward,
    squeeze_block,
    write_once,
)

__all__ = [
    "fuse",
    "fuse_backward",
    "gate",
    "gate_backward",
    "gate_pool_backward",
    "select",
    "select_pool",
    "squeeze",
    "squeeze_backward",
    "squeeze_block",
    "write_once",
]

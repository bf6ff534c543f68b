"""The functions of ``engines.interface.Engine``, gathered from the stages' files."""

from .bottleneck import sum_groups
from .fuse import fuse, fuse_backward
from .gate import gate, gate_pool, prepare, select, select_pool
from .gate_backward import gate_backward, gate_pool_backward
from .squeeze import num_groups, squeeze, squeeze_block
from .squeeze_backward import squeeze_backward

__all__ = [
    "fuse",
    "fuse_backward",
    "gate",
    "gate_backward",
    "gate_pool",
    "gate_pool_backward",
    "num_groups",
    "prepare",
    "select",
    "select_pool",
    "squeeze",
    "squeeze_backward",
    "squeeze_block",
    "sum_groups",
]

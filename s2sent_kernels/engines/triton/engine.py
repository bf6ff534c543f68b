"""The functions of ``engines.interface.Engine``, gathered from the stages' files."""

from .bottleneck import sum_groups
from .fuse import fuse, fuse_backward
from .gate import gate, gate_pool, prepare, select, select_pool
from .gate_backward import gate_backward, gate_pool_backward
from .gate_training import gate_in_training, select_pool_in_training
from .gate_training_backward import gate_in_training_backward
from .squeeze import num_groups, squeeze, squeeze_block
from .squeeze_backward import squeeze_backward

__all__ = [
    "fuse",
    "fuse_backward",
    "gate",
    "gate_backward",
    "gate_in_training",
    "gate_in_training_backward",
    "gate_pool",
    "gate_pool_backward",
    "num_groups",
    "prepare",
    "select",
    "select_pool",
    "select_pool_in_training",
    "squeeze",
    "squeeze_backward",
    "squeeze_block",
    "sum_groups",
]

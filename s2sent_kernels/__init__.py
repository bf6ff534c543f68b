"""Fused kernels for S2Sent: sentence embeddings from the hidden states of several Transformer blocks (arXiv 2508.18164).

Importing needs torch alone, touches no GPU and compiles nothing.
"""

from .engines.choice import backends
from .engines.interface import BackendStatus
from .formula.call import GateParameters
from .functional import fuse, gate, select, select_pool, squeeze
from .selector import S2SentSelector

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "GateParameters",
    "S2SentSelector",
    "backends",
    "fuse",
    "gate",
    "select",
    "select_pool",
    "squeeze",
]

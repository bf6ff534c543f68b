"""The package's public names, but for Embedder: what a kernel of the hub has. hub/layout.py puts this file beside the modules."""

from .engines.choice import backends
from .engines.interface import BackendStatus
from .formula.call import GateParameters
from .functional import fuse, gate, select, select_pool, squeeze
from .selector import S2SentSelector
from .synchronised import sync_statistics

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
    "sync_statistics",
]

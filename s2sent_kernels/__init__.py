"""Fused kernels for S2Sent: sentence embeddings from the hidden states of several Transformer blocks (arXiv 2508.18164).

Importing needs torch alone, touches no GPU and compiles nothing.
"""

from typing import TYPE_CHECKING, Any

from .engines.choice import backends
from .engines.interface import BackendStatus
from .formula.call import GateParameters
from .functional import fuse, gate, select, select_pool, squeeze
from .selector import S2SentSelector
from .synchronised import sync_statistics

if TYPE_CHECKING:
    from .embedder import Embedder

__version__ = "0.2.0"

__all__ = [
    "BackendStatus",
    "Embedder",
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


def __getattr__(name: str) -> Any:
    """Embedder, imported at its first use: it needs more than torch."""
    if name != "Embedder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .embedder import Embedder

    return Embedder

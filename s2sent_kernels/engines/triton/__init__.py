"""The Triton backend: one stage a file, kernels and their launchers. Imported when the backend is first used."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..reference import GateParameters
from .bottleneck import sum_groups
from .fuse import fuse, fuse_backward
from .gate import gate, gate_pool, squeeze_and_gate
from .gate import squeeze_and_pool as select_pool
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
    "select",
    "select_pool",
    "squeeze",
    "squeeze_backward",
    "squeeze_block",
    "sum_groups",
]


def select(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    parameters: GateParameters,
    frequencies: int,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(v, f, g) in three launches."""
    gates, squeezed = squeeze_and_gate(
        hidden_states, attention_mask, cu_seqlens, parameters, frequencies, activation, eps
    )
    return fuse(hidden_states, gates, attention_mask, cu_seqlens), squeezed, gates

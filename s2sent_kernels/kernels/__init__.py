"""The Triton backend: one stage a file, kernels and their launchers. Imported when the backend is first used."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..reference import GateParameters
from .config import BLOCK_GROUP
from .fuse import fuse, fuse_backward
from .gate import gate, gate_groups, gate_pool
from .squeeze import squeeze, squeeze_backward, squeeze_block, squeeze_groups, sum_groups

__all__ = [
    "BLOCK_GROUP",
    "fuse",
    "fuse_backward",
    "gate",
    "gate_pool",
    "select",
    "select_pool",
    "squeeze",
    "squeeze_backward",
    "squeeze_block",
    "sum_groups",
]


def select_pool(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    parameters: GateParameters,
    frequencies: int,
    pooling: str,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, f, p) in two launches."""
    groups, pooled = squeeze_groups(hidden_states, attention_mask, cu_seqlens, frequencies, "paper", pooling)
    assert pooled is not None
    output, squeezed = gate_pool(groups, pooled, parameters, activation, eps, hidden_states[0].dtype)
    return output, squeezed, pooled


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
    groups, _ = squeeze_groups(hidden_states, attention_mask, cu_seqlens, frequencies, "paper", None)
    gates, squeezed = gate_groups(groups, parameters, len(hidden_states), activation, eps)
    return fuse(hidden_states, gates, attention_mask, cu_seqlens), squeezed, gates

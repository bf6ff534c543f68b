"""The reference behind the interface of an engine (backend "reference"): any device, any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formula import reference
from ..formula.call import Batch, BatchStatistics, Call, GateParameters, Gating, PartialSums, Place, Reading
from ..formula.reference import (
    fuse,
    fuse_backward,
    gate,
    gate_backward,
    gate_in_training,
    gate_in_training_backward,
    gate_pool_backward,
    squeeze,
    squeeze_backward,
)
from ..formula.tokens import Tokens
from .interface import KERNEL_DTYPE_TEXT, BackendStatus

__all__ = [
    "LIMITS",
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
    "refuses",
    "select",
    "select_pool",
    "select_pool_in_training",
    "squeeze",
    "squeeze_backward",
    "squeeze_block",
    "status",
    "sum_groups",
]

LIMITS = f"float64, {KERNEL_DTYPE_TEXT}"


def status() -> BackendStatus:
    return BackendStatus(True, "plain PyTorch, on any device")


def refuses(call: Call) -> str | None:
    return None


def prepare(parameters: GateParameters, num_blocks: int, reading: Reading, gating: Gating) -> None:
    return None


def num_groups(num_blocks: int) -> int:
    """G for N blocks: here a group each."""
    return num_blocks


def squeeze_block(batch: Batch, place: Place, sums: PartialSums, reading: Reading) -> None:
    share, pooled = reference.squeeze_block(batch.hidden_states[0], place, Tokens.of(batch), reading)
    sums.squeezed_groups[:, place.block].copy_(share)
    if sums.pooled is not None and pooled is not None:
        sums.pooled[:, place.block].copy_(pooled)


def sum_groups(squeezed_groups: Tensor) -> Tensor:
    """f [B, D] from its partial sums [B, G, D], in ascending order."""
    squeezed = squeezed_groups[:, 0]
    for group in range(1, squeezed_groups.shape[1]):
        squeezed = squeezed + squeezed_groups[:, group]
    return squeezed


def gate_pool(
    sums: PartialSums, parameters: GateParameters, frequencies: int, gating: Gating, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """o [B, D] and f [B, D] from the partial sums of f and from p [B, N, D]."""
    assert sums.pooled is not None
    squeezed = sum_groups(sums.squeezed_groups)
    gates = reference.gate(squeezed, parameters, sums.pooled.shape[1], gating)
    return reference.pool(gates, sums.pooled, dtype), squeezed.clone()


def select_pool_in_training(
    batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating
) -> tuple[Tensor, Tensor, Tensor, BatchStatistics]:
    squeezed, pooled = squeeze(batch, reading)
    assert pooled is not None
    output, statistics = gate_in_training(squeezed, pooled, parameters, gating, batch.dtype)
    return output, squeezed, pooled, statistics


def select_pool(
    batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    squeezed, pooled = squeeze(batch, reading)
    assert pooled is not None
    gates = gate(squeezed, parameters, batch.num_blocks, gating)
    return reference.pool(gates, pooled, batch.dtype), squeezed, pooled


def select(batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating) -> tuple[Tensor, Tensor, Tensor]:
    squeezed, _ = squeeze(batch, reading)
    gates = gate(squeezed, parameters, batch.num_blocks, gating)
    return fuse(batch, gates), squeezed, gates

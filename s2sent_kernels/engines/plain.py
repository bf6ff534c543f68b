"""The reference behind the interface that every backend offers to the ops (see ``ops.engine``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .reference import GateParameters
from .tokens import Tokens


def num_groups(num_blocks: int) -> int:
    """Rows of ``squeezed_groups`` that ``squeeze_block`` sums N blocks into: here one a block."""
    return num_blocks


def _tokens(hidden_state: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tokens:
    return Tokens.of(hidden_state.shape, hidden_state.device, attention_mask, cu_seqlens)


def squeeze(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
) -> tuple[Tensor, Tensor | None]:
    tokens = _tokens(hidden_states[0], attention_mask, cu_seqlens)
    return reference.squeeze(hidden_states, tokens, frequencies, profile, pooling)


def squeeze_backward(
    grad_squeezed: Tensor | None,
    grad_pooled: Tensor | None,
    grad_fused: Tensor | None,
    gates: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    needed: Sequence[bool],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
) -> list[Tensor | None]:
    tokens = Tokens.of(shape, device, attention_mask, cu_seqlens)
    return reference.squeeze_backward(
        grad_squeezed, grad_pooled, grad_fused, gates, shape, dtype, needed, tokens, frequencies, profile, pooling
    )


def squeeze_block(
    hidden_state: Tensor,
    block: int,
    num_blocks: int,
    squeezed_groups: Tensor,
    pooled: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
) -> None:
    tokens = _tokens(hidden_state, attention_mask, cu_seqlens)
    share, block_pooled = reference.squeeze_one_block(
        hidden_state, block, num_blocks, tokens, frequencies, profile, pooling
    )
    squeezed_groups[:, block].copy_(share)
    if pooled is not None and block_pooled is not None:
        pooled[:, block].copy_(block_pooled)


def sum_groups(squeezed_groups: Tensor) -> Tensor:
    """f [B, D] from its partial sums [B, G, D], in ascending order."""
    squeezed = squeezed_groups[:, 0]
    for group in range(1, squeezed_groups.shape[1]):
        squeezed = squeezed + squeezed_groups[:, group]
    return squeezed


def gate(squeezed: Tensor, parameters: GateParameters, num_blocks: int, activation: str, eps: float) -> Tensor:
    return reference.gate(squeezed, parameters, num_blocks, activation, eps)


def gate_pool(
    squeezed_groups: Tensor,
    pooled: Tensor,
    parameters: GateParameters,
    frequencies: int,
    activation: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """o [B, D] and f [B, D] from the partial sums of f and from p [B, N, D]."""
    squeezed = sum_groups(squeezed_groups)
    gates = reference.gate(squeezed, parameters, pooled.shape[1], activation, eps)
    return reference.pool(gates, pooled, dtype), squeezed.clone()


def gate_backward(
    grad_gates: Tensor, squeezed: Tensor, parameters: GateParameters, activation: str, eps: float
) -> tuple[Tensor, GateParameters]:
    return reference.gate_backward(grad_gates, squeezed, parameters, activation, eps)


def gate_pool_backward(
    grad_output: Tensor, squeezed: Tensor, pooled: Tensor, parameters: GateParameters, activation: str, eps: float
) -> tuple[Tensor, Tensor, GateParameters]:
    return reference.gate_pool_backward(grad_output, squeezed, pooled, parameters, activation, eps)


def fuse(
    hidden_states: Sequence[Tensor], gates: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    return reference.fuse(hidden_states, gates, _tokens(hidden_states[0], attention_mask, cu_seqlens))


def fuse_backward(
    grad_fused: Tensor, hidden_states: Sequence[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    return reference.fuse_backward(grad_fused, hidden_states, _tokens(grad_fused, attention_mask, cu_seqlens))


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
    squeezed, pooled = squeeze(hidden_states, attention_mask, cu_seqlens, frequencies, "paper", pooling)
    assert pooled is not None
    gates = reference.gate(squeezed, parameters, len(hidden_states), activation, eps)
    return reference.pool(gates, pooled, hidden_states[0].dtype), squeezed, pooled


def select(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    parameters: GateParameters,
    frequencies: int,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    squeezed, _ = squeeze(hidden_states, attention_mask, cu_seqlens, frequencies, "paper", None)
    gates = reference.gate(squeezed, parameters, len(hidden_states), activation, eps)
    return fuse(hidden_states, gates, attention_mask, cu_seqlens), squeezed, gates

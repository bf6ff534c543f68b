"""The compiled backend behind the interface that every backend offers to the ops: C++ kernels for CPU tensors, CUDA C++ for
CUDA tensors (see csrc/).

Imported once ``backend`` has found the extension usable. This module brings tensors into the form that
those take (float32 gates and parameters, dense features, boolean masks) and allocates what they write; it never copies a
hidden state whose features are dense.

Nothing here waits for a GPU, but for the tables of factors, which are brought to a device once and stay: a captured CUDA
graph goes on reading them.

Bits do not depend on the number of threads (but for the parameters' gradients, whose sums over the sentences are PyTorch's
own products), and a sentence has the same ones in any batch, at any place, with any padding,
packed and block by block: every sum has one order, written down in csrc/cpu/*.cpp and csrc/cuda/*.cu.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from . import dct, reference
from .reference import GateParameters

_POOLINGS = {None: 0, "mean": 1, "cls": 2, "last": 3}  # as csrc/stages.h numbers them
_ACTIVATIONS = {"tanh": 0, "relu": 1}
MAXIMUM_BLOCKS = 128  # on CUDA: kMaxBlocks of csrc/stages.h
# Whether ``select`` on CUDA takes the kernel that reads each hidden state once: None where it is the faster one. It has the
# bits of the others; tests and the benchmark say which.
ONE_PASS: bool | None = None
importlib.import_module(f"{__package__}._C")  # registers the ops
_ops = torch.ops.s2sent_native


def num_groups(num_blocks: int) -> int:
    """Rows of ``squeezed_groups`` that ``squeeze_block`` sums N blocks into: one, because f takes the blocks one after another
    in any case."""
    return 1


def _dense(tensor: Tensor) -> Tensor:
    """``tensor`` with its features side by side; other strides are as they may be."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _tokens(attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    mask = attention_mask
    if mask is not None:
        mask = (mask if mask.dtype is torch.bool else mask != 0).contiguous()
    return mask, None if cu_seqlens is None else cu_seqlens.contiguous()


@functools.cache
def _block_factors(
    num_blocks: int, frequencies: int, profile: str, device: torch.device
) -> tuple[Tensor, tuple[int, ...]]:
    """alpha [M, N], and every part's frequency along the tokens."""
    pairs = dct.frequency_pairs(num_blocks, frequencies, profile)
    alpha = dct.block_basis(num_blocks, frequencies, profile).to(torch.float32).contiguous()
    return alpha.to(device), tuple(y for _, y in pairs)


@functools.cache
def _grid_factors(size: int, frequencies: int, device: torch.device) -> Tensor:
    """beta [M, L] of profile ``official``."""
    return dct.grid_token_basis(size, frequencies, torch.device("cpu")).to(torch.float32).contiguous().to(device)


def _factors(
    num_blocks: int, frequencies: int, profile: str, shape: Sequence[int], device: torch.device
) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
    if device.type == "cuda":
        _check_blocks(num_blocks)
    alpha, y = _block_factors(num_blocks, frequencies, profile, device)
    return alpha, y, _grid_factors(shape[1], frequencies, device) if profile == "official" else None


def _check_blocks(num_blocks: int) -> None:
    if num_blocks > MAXIMUM_BLOCKS:
        raise ValueError(
            f"hidden_states: backend 'native' takes up to {MAXIMUM_BLOCKS} blocks on CUDA, got N = {num_blocks}"
        )


def _rows(hidden_states: Sequence[Tensor], cu_seqlens: Tensor | None) -> int:
    return hidden_states[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def squeeze(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
) -> tuple[Tensor, Tensor | None]:
    first, num_blocks, rows = hidden_states[0], len(hidden_states), _rows(hidden_states, cu_seqlens)
    size = first.shape[-1]
    squeezed = first.new_empty(rows, size, dtype=torch.float32)
    pooled = None if pooling is None else first.new_empty(rows, num_blocks, size, dtype=torch.float32)
    _ops.squeeze(
        [_dense(u) for u in hidden_states], 0, num_blocks, *_tokens(attention_mask, cu_seqlens),
        *_factors(num_blocks, frequencies, profile, first.shape, first.device), _POOLINGS[pooling], squeezed, pooled,
    )  # fmt: skip
    return squeezed, pooled


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
    """One block into f's sum so far [B, 1, D] and its row of p [B, N, D]; blocks come in ascending order."""
    _ops.squeeze(
        [_dense(hidden_state)], block, num_blocks, *_tokens(attention_mask, cu_seqlens),
        *_factors(num_blocks, frequencies, profile, hidden_state.shape, hidden_state.device), _POOLINGS[pooling],
        squeezed_groups[:, 0], None if pooling is None else pooled,
    )  # fmt: skip


def sum_groups(squeezed_groups: Tensor) -> Tensor:
    """f [B, D] from its sum [B, 1, D]."""
    return squeezed_groups[:, 0]


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
    grads = [torch.empty(shape if need else [0], dtype=dtype, device=device) for need in needed]
    fused = grad_fused is not None and gates is not None
    _ops.squeeze_backward(
        _float(grad_squeezed), None if pooling is None else _float(grad_pooled),
        _dense(grad_fused.to(dtype)) if fused and grad_fused is not None else None, _float(gates) if fused else None,
        list(shape), *_tokens(attention_mask, cu_seqlens), *_factors(len(needed), frequencies, profile, shape, device),
        _POOLINGS[pooling], grads,
    )  # fmt: skip
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


def _float_parameters(parameters: GateParameters) -> list[Tensor | None]:
    return [_float(tensor) for tensor in parameters]


def _bottleneck(squeezed: Tensor, parameters: GateParameters) -> Tensor:
    """Memory for s [B, H]."""
    return squeezed.new_empty(squeezed.shape[0], parameters.down_weight.shape[0])


def gate(squeezed: Tensor, parameters: GateParameters, num_blocks: int, activation: str, eps: float) -> Tensor:
    if squeezed.is_cuda:
        _check_blocks(num_blocks)
    gates = squeezed.new_empty(squeezed.shape[0], num_blocks, squeezed.shape[1])
    _ops.gate(
        squeezed.contiguous(), *_float_parameters(parameters), num_blocks, _ACTIVATIONS[activation], eps,
        _bottleneck(squeezed, parameters), gates,
    )  # fmt: skip
    return gates


def _pool(
    squeezed: Tensor, pooled: Tensor, parameters: GateParameters, activation: str, eps: float, dtype: torch.dtype
) -> Tensor:
    if squeezed.is_cuda:
        _check_blocks(pooled.shape[1])
    output = squeezed.new_empty(squeezed.shape, dtype=dtype)
    _ops.gate_pool(
        squeezed.contiguous(), pooled, *_float_parameters(parameters), _ACTIVATIONS[activation], eps,
        _bottleneck(squeezed, parameters), output,
    )  # fmt: skip
    return output


def gate_pool(
    squeezed_groups: Tensor,
    pooled: Tensor,
    parameters: GateParameters,
    frequencies: int,
    activation: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """o [B, D] and f [B, D] from the sum of f and from p [B, N, D]."""
    squeezed = sum_groups(squeezed_groups).clone()
    return _pool(squeezed, pooled, parameters, activation, eps, dtype), squeezed


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight, whose rows do not depend on how many there are."""
    result = x.new_empty(x.shape[0], weight.shape[1])
    _ops.multiply(x, weight, result)
    return result


def _backward(
    grad_gates: Tensor | None,
    grad_output: Tensor | None,
    squeezed: Tensor,
    pooled: Tensor | None,
    parameters: GateParameters,
    num_blocks: int,
    activation: str,
    eps: float,
) -> tuple[Tensor | None, Tensor, GateParameters]:
    """dp where there is p, df, and the parameters' gradients: sums over the sentences, which are PyTorch's."""
    shape = (squeezed.shape[0], num_blocks, squeezed.shape[1])
    w = parameters.each(lambda t: t.to(torch.float32).contiguous())
    grad_logits, grad_normed = squeezed.new_empty(shape), squeezed.new_empty(shape)
    normed = None if w.norm_weight is None else squeezed.new_empty(shape)
    grad_pooled = None if pooled is None else squeezed.new_empty(shape)
    if squeezed.is_cuda:
        _check_blocks(num_blocks)
    bottleneck = _bottleneck(squeezed, parameters)
    _ops.gate_backward(
        _float(grad_gates), _float(grad_output), squeezed.contiguous(), pooled, *_float_parameters(w), _ACTIVATIONS[activation],
        eps, bottleneck, grad_pooled, grad_logits, grad_normed, normed,
    )  # fmt: skip
    with reference.autocast_off(squeezed.device):
        dy = grad_normed.flatten(1)
        dz, norm_weight, norm_bias = dy, None, None
        if normed is not None and w.norm_weight is not None and w.running_var is not None:
            norm_weight, norm_bias = (dy * normed.flatten(1)).sum(dim=0), dy.sum(dim=0)
            dz = dy * (w.norm_weight * torch.rsqrt(w.running_var + eps))
        slope = 1 - bottleneck * bottleneck if activation == "tanh" else (bottleneck > 0).to(torch.float32)
        ddown = _multiply(dz, w.up_weight) * slope
        grads = GateParameters(
            ddown.T @ squeezed, ddown.sum(dim=0), dz.T @ bottleneck, dz.sum(dim=0), norm_weight, norm_bias, None, None,
            None if w.block_prior is None else grad_logits.sum(dim=(0, 2)),
        )  # fmt: skip
        return grad_pooled, _multiply(ddown, w.down_weight), grads


def gate_backward(
    grad_gates: Tensor, squeezed: Tensor, parameters: GateParameters, activation: str, eps: float
) -> tuple[Tensor, GateParameters]:
    _, grad, grads = _backward(grad_gates, None, squeezed, None, parameters, grad_gates.shape[1], activation, eps)
    return grad, grads


def gate_pool_backward(
    grad_output: Tensor, squeezed: Tensor, pooled: Tensor, parameters: GateParameters, activation: str, eps: float
) -> tuple[Tensor, Tensor, GateParameters]:
    grad_pooled, grad, grads = _backward(
        None, grad_output, squeezed, pooled.contiguous(), parameters, pooled.shape[1], activation, eps
    )
    assert grad_pooled is not None
    return grad_pooled, grad, grads


def fuse(
    hidden_states: Sequence[Tensor], gates: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    if hidden_states[0].is_cuda:
        _check_blocks(len(hidden_states))
    fused = hidden_states[0].new_empty(hidden_states[0].shape)
    rows = _float(gates)
    _ops.fuse([_dense(u) for u in hidden_states], rows, *_tokens(attention_mask, cu_seqlens), fused)
    return fused


def fuse_backward(
    grad_fused: Tensor, hidden_states: Sequence[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    first, rows = hidden_states[0], _rows(hidden_states, cu_seqlens)
    grad = first.new_empty(rows, len(hidden_states), first.shape[-1], dtype=torch.float32)
    _ops.fuse_backward(
        _dense(grad_fused.to(first.dtype)),
        [_dense(u) for u in hidden_states],
        *_tokens(attention_mask, cu_seqlens),
        grad,
    )
    return grad


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
    return _pool(squeezed, pooled, parameters, activation, eps, hidden_states[0].dtype), squeezed, pooled


def select(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    parameters: GateParameters,
    frequencies: int,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    attention_mask, cu_seqlens = _tokens(attention_mask, cu_seqlens)  # once, for whoever takes them
    if ONE_PASS is not False and hidden_states[0].is_cuda:
        done = _select_once(hidden_states, attention_mask, cu_seqlens, parameters, frequencies, activation, eps)
        if done is not None:
            return done
    squeezed, _ = squeeze(hidden_states, attention_mask, cu_seqlens, frequencies, "paper", None)
    gates = gate(squeezed, parameters, len(hidden_states), activation, eps)
    return fuse(hidden_states, gates, attention_mask, cu_seqlens), squeezed, gates


def _select_once(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    parameters: GateParameters,
    frequencies: int,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(v, f, g) from one read of the hidden states, where csrc/cuda/select.cu takes such a batch; the bits are the same."""
    first, rows, num_blocks = hidden_states[0], _rows(hidden_states, cu_seqlens), len(hidden_states)
    squeezed = first.new_empty(rows, first.shape[-1], dtype=torch.float32)
    gates = first.new_empty(rows, num_blocks, first.shape[-1], dtype=torch.float32)
    fused = first.new_empty(first.shape)
    alpha, y, _ = _factors(num_blocks, frequencies, "paper", first.shape, first.device)
    taken = _ops.select(
        [_dense(u) for u in hidden_states], *_tokens(attention_mask, cu_seqlens), alpha, y,
        *_float_parameters(parameters), _ACTIVATIONS[activation], eps, ONE_PASS is True, squeezed, gates, fused,
    )  # fmt: skip
    return (fused, squeezed, gates) if taken else None

"""The compiled engine: C++ kernels for CPU tensors, CUDA C++ kernels for CUDA tensors (see csrc/).

This module brings tensors into the form that those take (float32 gates and parameters, dense features, masks of some dtypes) and
allocates what they write. It never copies a hidden state whose features are dense. ``limits.status`` has loaded
the extension before any function here runs.

Nothing here waits for a GPU except the tables of factors, which are copied to a device once and stay: a captured CUDA graph
goes on reading them.

Bits do not depend on the number of threads: every sum has one order, written down in csrc/cpu/*.cpp and csrc/cuda/*.cu. With
running statistics a sentence has the same bits in any batch, at any place, with any padding, packed and block by block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...formula.call import (
    Batch,
    BatchStatistics,
    GateParameters,
    Gating,
    HiddenGradients,
    Layout,
    PartialSums,
    Place,
    Reading,
)
from .layout import (
    activation_number,
    as_float,
    dense,
    factors,
    float_parameters,
    gradients_of,
    pooling_number,
    readable,
    tokens_of,
)
from .prepared import Prepared

# Counts changes of the ops that this module calls: increase it with every change of a schema. setup.py compiles this number into
# the extension; ``limits`` refuses one built from other sources.
INTERFACE = 9

_ops = torch.ops.s2sent_native


# ---------------------------------------------------------------- squeeze


def squeeze(batch: Batch, reading: Reading) -> tuple[Tensor, Tensor | None]:
    first = batch.hidden_states[0]
    squeezed = first.new_empty(batch.num_sentences, batch.hidden_size, dtype=torch.float32)
    pooled = None
    if reading.pooling is not None:
        pooled = first.new_empty(batch.num_sentences, batch.num_blocks, batch.hidden_size, dtype=torch.float32)
    _squeeze_into(batch, Place(0, batch.num_blocks), reading, squeezed, pooled)
    return squeezed, pooled


def _squeeze_into(batch: Batch, first: Place, reading: Reading, squeezed: Tensor, pooled: Tensor | None) -> None:
    """Squeezes the batch's blocks, the lowest of which is ``first``."""
    _ops.squeeze(
        [dense(u) for u in batch.hidden_states],
        first.block,
        first.num_blocks,
        *tokens_of(batch),
        *factors(first.num_blocks, reading, batch.layout),
        pooling_number(reading.pooling),
        squeezed,
        pooled,
    )


def num_groups(num_blocks: int) -> int:
    """G for N blocks: one, because f adds the blocks one after another in any case."""
    return 1


def squeeze_block(batch: Batch, place: Place, sums: PartialSums, reading: Reading) -> None:
    """One block into f's sum so far [B, 1, D] and its row of p [B, N, D]; blocks are added in ascending order."""
    pooled = None if reading.pooling is None else sums.pooled
    _squeeze_into(batch, place, reading, sums.squeezed_groups[:, 0], pooled)


def sum_groups(squeezed_groups: Tensor) -> Tensor:
    """f [B, D] from its sum [B, 1, D]."""
    return squeezed_groups[:, 0]


def squeeze_backward(
    grads: HiddenGradients, layout: Layout, needed: Sequence[bool], reading: Reading
) -> list[Tensor | None]:
    results = [torch.empty(layout.shape if need else [0], dtype=layout.dtype, device=layout.device) for need in needed]
    fused = None if grads.fused is None or grads.gates is None else dense(grads.fused.to(layout.dtype))
    _ops.squeeze_backward(
        as_float(grads.squeezed),
        None if reading.pooling is None else as_float(grads.pooled),
        fused,
        None if fused is None else as_float(grads.gates),
        list(layout.shape),
        *tokens_of(layout),
        *factors(len(needed), reading, layout),
        pooling_number(reading.pooling),
        results,
    )
    return [grad if need else None for grad, need in zip(results, needed, strict=True)]


# ---------------------------------------------------------------- gate


def _bottleneck(squeezed: Tensor, parameters: GateParameters) -> Tensor:
    """Where the gate's ops leave s [B, H]."""
    return squeezed.new_empty(squeezed.shape[0], parameters.bottleneck)


def gate(squeezed: Tensor, parameters: GateParameters, num_blocks: int, gating: Gating) -> Tensor:
    gates = squeezed.new_empty(squeezed.shape[0], num_blocks, squeezed.shape[1])
    _ops.gate(
        squeezed.contiguous(),
        *float_parameters(parameters),
        num_blocks,
        activation_number(gating.activation),
        gating.eps,
        _bottleneck(squeezed, parameters),
        gates,
    )
    return gates


def _pool(squeezed: Tensor, pooled: Tensor, parameters: GateParameters, gating: Gating, dtype: torch.dtype) -> Tensor:
    """o [B, D] in ``dtype`` from f and p; the gates are never written."""
    output = squeezed.new_empty(squeezed.shape, dtype=dtype)
    _ops.gate_pool(
        squeezed.contiguous(),
        pooled,
        *float_parameters(parameters),
        activation_number(gating.activation),
        gating.eps,
        _bottleneck(squeezed, parameters),
        output,
    )
    return output


def gate_pool(
    sums: PartialSums, parameters: GateParameters, frequencies: int, gating: Gating, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """o [B, D] and f [B, D] from the sum of f and from p [B, N, D]."""
    assert sums.pooled is not None
    squeezed = sum_groups(sums.squeezed_groups).clone()
    return _pool(squeezed, sums.pooled, parameters, gating, dtype), squeezed


def _backward(
    grad: Tensor,
    squeezed: Tensor,
    pooled: Tensor | None,
    statistics: BatchStatistics | None,
    parameters: GateParameters,
    gating: Gating,
) -> tuple[Tensor | None, Tensor, GateParameters]:
    """dp where there is p, df, and the parameters' gradients from dg, or with p from do."""
    grad_pooled, grad_squeezed, *grads = _ops.gate_backward(
        as_float(grad) if pooled is None else None,
        None if pooled is None else readable(grad),
        squeezed.contiguous(),
        None if pooled is None else pooled.contiguous(),
        *float_parameters(parameters),
        *(statistics or (None, None)),
        activation_number(gating.activation),
        gating.eps,
    )
    return None if pooled is None else grad_pooled, grad_squeezed, gradients_of(grads, parameters)


def gate_backward(
    grad_gates: Tensor, squeezed: Tensor, parameters: GateParameters, gating: Gating
) -> tuple[Tensor, GateParameters]:
    _, grad, grads = _backward(grad_gates, squeezed, None, None, parameters, gating)
    return grad, grads


def gate_pool_backward(
    grad_output: Tensor, squeezed: Tensor, pooled: Tensor, parameters: GateParameters, gating: Gating
) -> tuple[Tensor, Tensor, GateParameters]:
    grad_pooled, grad, grads = _backward(grad_output, squeezed, pooled, None, parameters, gating)
    assert grad_pooled is not None
    return grad_pooled, grad, grads


def gate_in_training(
    squeezed: Tensor, pooled: Tensor | None, parameters: GateParameters, gating: Gating, dtype: torch.dtype
) -> tuple[Tensor, BatchStatistics]:
    """g, or with p o in ``dtype``, and the statistics of the batch (of two sentences at least). Moves the running ones."""
    w, num_blocks = float_parameters(parameters), parameters.up_weight.shape[0] // squeezed.shape[1]
    if pooled is None:
        result = squeezed.new_empty(squeezed.shape[0], num_blocks, squeezed.shape[1])
    else:
        result = squeezed.new_empty(squeezed.shape, dtype=dtype)
    if squeezed.shape[0] == 0 and w.running_mean is not None and w.running_var is not None:
        return result, BatchStatistics(w.running_mean.clone(), torch.rsqrt(w.running_var + gating.eps))
    statistics = BatchStatistics(*(squeezed.new_empty(parameters.up_weight.shape[0]) for _ in range(2)))
    _ops.gate_in_training(
        squeezed.contiguous(),
        None if pooled is None else pooled.contiguous(),
        *w,
        num_blocks,
        activation_number(gating.activation),
        gating.eps,
        gating.momentum,
        _bottleneck(squeezed, parameters),
        *statistics,
        result,
    )
    for running, moved in ((parameters.running_mean, w.running_mean), (parameters.running_var, w.running_var)):
        if running is not None and moved is not None and running is not moved:  # kept in another dtype
            running.copy_(moved)
    return result, statistics


def gate_in_training_backward(
    grad: Tensor,
    squeezed: Tensor,
    pooled: Tensor | None,
    statistics: BatchStatistics,
    parameters: GateParameters,
    gating: Gating,
) -> tuple[Tensor | None, Tensor, GateParameters]:
    return _backward(grad, squeezed, pooled, statistics, parameters, gating)


# ---------------------------------------------------------------- fuse


def fuse(batch: Batch, gates: Tensor) -> Tensor:
    fused = batch.hidden_states[0].new_empty(batch.shape)
    _ops.fuse([dense(u) for u in batch.hidden_states], as_float(gates), *tokens_of(batch), fused)
    return fused


def fuse_backward(grad_fused: Tensor, batch: Batch) -> Tensor:
    grad = batch.hidden_states[0].new_empty(
        batch.num_sentences, batch.num_blocks, batch.hidden_size, dtype=torch.float32
    )
    _ops.fuse_backward(
        dense(grad_fused.to(batch.dtype)), [dense(u) for u in batch.hidden_states], *tokens_of(batch), grad
    )
    return grad


# ---------------------------------------------------------------- the whole selector


def prepare(parameters: GateParameters, num_blocks: int, reading: Reading, gating: Gating) -> Prepared:
    return Prepared(parameters, num_blocks, reading, gating)


def select_pool(
    batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    squeezed, pooled = squeeze(batch, reading)
    assert pooled is not None
    return _pool(squeezed, pooled, parameters, gating, batch.dtype), squeezed, pooled


def select_pool_in_training(
    batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating
) -> tuple[Tensor, Tensor, Tensor, BatchStatistics]:
    squeezed, pooled = squeeze(batch, reading)
    assert pooled is not None
    output, statistics = gate_in_training(squeezed, pooled, parameters, gating, batch.dtype)
    return output, squeezed, pooled, statistics


def select(
    batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating, one_pass: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(v, f, g). ``one_pass``: whether a kernel reads each hidden state once, where there is one for the batch; None leaves it
    to what was measured faster. The bits are the same."""
    batch = Batch(batch.hidden_states, *tokens_of(batch))  # converted once for all kernels
    if one_pass is not False and batch.hidden_states[0].is_cuda:
        done = select_once(batch, reading, parameters, gating, always=one_pass is True)
        if done is not None:
            return done
    squeezed, _ = squeeze(batch, reading)
    gates = gate(squeezed, parameters, batch.num_blocks, gating)
    return fuse(batch, gates), squeezed, gates


def select_once(
    batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating, always: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(v, f, g) from one read of the hidden states, or None where the one-pass kernel does not support such a batch or, unless
    ``always``, is slower there."""
    first, rows, num_blocks = batch.hidden_states[0], batch.num_sentences, batch.num_blocks
    squeezed = first.new_empty(rows, batch.hidden_size, dtype=torch.float32)
    gates = first.new_empty(rows, num_blocks, batch.hidden_size, dtype=torch.float32)
    fused = first.new_empty(first.shape)
    alpha, y, _ = factors(num_blocks, reading, batch.layout)
    done = _ops.select(
        [dense(u) for u in batch.hidden_states],
        *tokens_of(batch),
        alpha,
        y,
        *float_parameters(parameters),
        activation_number(gating.activation),
        gating.eps,
        always,
        squeezed,
        gates,
        fused,
    )
    return (fused, squeezed, gates) if done else None

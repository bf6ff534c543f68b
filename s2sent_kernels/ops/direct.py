"""The whole selector with gradients, around an engine instead of the dispatcher.

In eager mode the dispatcher takes most of a call's time on the host, if an op has a ``Tensor[]`` argument and a registered
gradient (bench/NOTES.md). These functions run the same kernels. A call that something traces, transforms or records takes the
ops; so does a backward pass that is itself differentiated, traced or mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engines.interface import Engine, Prepared
from ..formula import reference
from ..formula.call import Batch, BatchStatistics, GateParameters, Gating, HiddenGradients, Layout, Reading
from . import fuse_backward, gate_backward, gate_pool_backward, squeeze_backward
from .library import dispatcher_is_idle, refuse, split_parameters, with_gradient

_FIRST_STATE = 3 + len(GateParameters._fields)  # the first hidden state among the arguments of ``apply``


class How(NamedTuple):
    """All of a call but its tensors."""

    reading: Reading
    gating: Gating
    backend: str  # the name of ``engine``
    engine: Engine
    prepared: Prepared | None = None


class SelectPool(torch.autograd.Function):
    """o [B, D]: ``apply(how, attention_mask, cu_seqlens, *parameters, *hidden_states)``.

    It saves f and p, as the op ``select_pool`` does, and no hidden state; in training the statistics of the batch too.
    """

    @staticmethod
    def forward(ctx: Any, how: How, attention_mask: Tensor | None, cu_seqlens: Tensor | None, *tensors: Any) -> Tensor:
        parameters, hidden_states = split_parameters(tensors)
        batch = Batch(hidden_states, attention_mask, cu_seqlens)
        output, squeezed, pooled, *statistics = select_pool(how, batch, parameters)
        ctx.how = how
        squeeze_backward.save_layout(ctx, batch, squeezed, pooled, *parameters, *statistics)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        layout, (squeezed, pooled, *rest) = squeeze_backward.saved_layout(ctx)
        parameters, saved = split_parameters(rest)
        statistics = BatchStatistics(*saved) if saved else None
        how, needed = ctx.how, ctx.needs_input_grad[_FIRST_STATE:]
        run = _backward_of(how)
        if run is how.engine and how.prepared is not None:
            pooling = how.reading.pooling
            found = how.prepared.select_pool_backward(
                grad_output, squeezed, pooled, statistics, layout, pooling, needed
            )
            if found:
                return _split(found, parameters, needed)
        grad_pooled: Tensor | None
        if statistics is None:
            grad_pooled, grad_squeezed, grads = run.gate_pool_backward(
                grad_output, squeezed, pooled, parameters, how.gating
            )
        else:
            grad_pooled, grad_squeezed, grads = run.gate_in_training_backward(
                grad_output, squeezed, pooled, statistics, parameters, how.gating
            )
        hidden = _hidden_gradients(run, HiddenGradients(grad_squeezed, grad_pooled), layout, needed, how.reading)
        return None, None, None, *_cast(grads, parameters), *hidden


def select_pool(how: How, batch: Batch, parameters: GateParameters) -> Sequence[Tensor]:
    """(o, f, p), and in training the mean and rstd of the batch."""
    engine, reading, gating = how.engine, how.reading, how.gating
    if not gating.training:
        kept = how.prepared and how.prepared.select_pool(*batch, reading.pooling, keep=True)
        return kept or engine.select_pool(batch, reading, parameters, gating)
    kept = how.prepared and how.prepared.select_pool_in_training(*batch, reading.pooling, gating.momentum)
    if kept:
        return kept
    output, squeezed, pooled, statistics = engine.select_pool_in_training(batch, reading, parameters, gating)
    return output, squeezed, pooled, *statistics


class GateInTraining(torch.autograd.Function):
    """g [B, N, D] from f with batch statistics: ``apply(how, squeezed, *parameters)``."""

    @staticmethod
    def forward(ctx: Any, how: How, squeezed: Tensor, *tensors: Any) -> Tensor:
        parameters = GateParameters(*tensors)
        gates, statistics = how.engine.gate_in_training(squeezed, None, parameters, how.gating, squeezed.dtype)
        ctx.how = how
        ctx.save_for_backward(squeezed, *parameters, *statistics)
        return gates

    @staticmethod
    def backward(ctx: Any, grad_gates: Tensor) -> tuple[Any, ...]:
        squeezed, *rest = ctx.saved_tensors
        parameters, statistics = split_parameters(rest)
        _, grad, grads = _backward_of(ctx.how).gate_in_training_backward(
            grad_gates, squeezed, None, BatchStatistics(*statistics), parameters, ctx.how.gating
        )
        return None, grad, *_cast(grads, parameters)


class Select(torch.autograd.Function):
    """v like a hidden state, with running statistics; ``apply`` as SelectPool's. It saves f, g and the hidden states."""

    @staticmethod
    def forward(ctx: Any, how: How, attention_mask: Tensor | None, cu_seqlens: Tensor | None, *tensors: Any) -> Tensor:
        parameters, hidden_states = split_parameters(tensors)
        batch = Batch(hidden_states, attention_mask, cu_seqlens)
        kept = how.prepared and how.prepared.select(*batch, keep=True)
        fused, squeezed, gates = kept or how.engine.select(batch, how.reading, parameters, how.gating)
        ctx.how = how
        squeeze_backward.save_layout(ctx, batch, squeezed, gates, *parameters, *hidden_states)
        return fused

    @staticmethod
    def backward(ctx: Any, grad_fused: Tensor) -> tuple[Any, ...]:
        layout, (squeezed, gates, *rest) = squeeze_backward.saved_layout(ctx)
        parameters, hidden_states = split_parameters(rest)
        batch = Batch(hidden_states, layout.attention_mask, layout.cu_seqlens)
        how, needed = ctx.how, ctx.needs_input_grad[_FIRST_STATE:]
        run = _backward_of(how)
        if run is how.engine and how.prepared is not None:
            found = how.prepared.select_backward(grad_fused, squeezed, gates, batch, needed)
            if found:
                return _split(found, parameters, needed)
        grad_gates = run.fuse_backward(grad_fused, batch)
        grad_squeezed, grads = run.gate_backward(grad_gates, squeezed, parameters, how.gating)
        hidden_grads = HiddenGradients(grad_squeezed, None, grad_fused, gates)
        hidden = _hidden_gradients(run, hidden_grads, layout, needed, how.reading)
        return None, None, None, *_cast(grads, parameters), *hidden


class _Ops:
    """The backward functions of an engine, as recorded ops."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def gate_pool_backward(
        self, grad_output: Tensor, squeezed: Tensor, pooled: Tensor, parameters: GateParameters, gating: Gating
    ) -> tuple[Tensor, Tensor, GateParameters]:
        grad_pooled, grad_squeezed, grads = gate_pool_backward.run(
            grad_output, squeezed, pooled, parameters, gating, self.backend
        )
        return grad_pooled, grad_squeezed, GateParameters(**grads)

    def gate_backward(
        self, grad_gates: Tensor, squeezed: Tensor, parameters: GateParameters, gating: Gating
    ) -> tuple[Tensor, GateParameters]:
        grad_squeezed, grads = gate_backward.run(grad_gates, squeezed, parameters, gating, self.backend)
        return grad_squeezed, GateParameters(**grads)

    def gate_in_training_backward(
        self,
        grad: Tensor,
        squeezed: Tensor,
        pooled: Tensor | None,
        statistics: BatchStatistics,
        parameters: GateParameters,
        gating: Gating,
    ) -> tuple[Tensor | None, Tensor, GateParameters]:
        """No op has batch statistics. The formula can be mapped; what it leaves out of a second derivative is refused."""
        grad_pooled, grad_squeezed, grads = reference.gate_in_training_backward(
            grad, squeezed, pooled, statistics, parameters, gating
        )
        once = _Once.apply
        return None if grad_pooled is None else once(grad_pooled), once(grad_squeezed), grads.each(once)

    def fuse_backward(self, grad_fused: Tensor, batch: Batch) -> Tensor:
        return fuse_backward.run(grad_fused, batch, self.backend)

    def squeeze_backward(
        self, grads: HiddenGradients, layout: Layout, needed: Sequence[bool], reading: Reading
    ) -> list[Tensor | None]:
        return squeeze_backward.run(grads, layout, needed, reading, self.backend)


class _Once(torch.autograd.Function):
    """A tensor that cannot be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        refuse(ctx, *grads)


def _backward_of(how: How) -> Engine | _Ops:
    recorded = torch.is_grad_enabled() or not dispatcher_is_idle()
    return _Ops(how.backend) if recorded else how.engine


def _hidden_gradients(
    run: Engine | _Ops, grads: HiddenGradients, layout: Layout, needed: Sequence[bool], reading: Reading
) -> list[Tensor | None]:
    if not any(needed):
        return [None] * len(needed)
    return run.squeeze_backward(grads, layout, needed, reading)


def _split(found: list[Tensor], parameters: GateParameters, needed: Sequence[bool]) -> tuple[Any, ...]:
    """A prepared backward's gradients, as ``apply`` takes its arguments."""
    hidden = [grad if need else None for grad, need in zip(found, needed, strict=False)]
    learned = with_gradient(parameters)
    of_gate = dict(zip(GateParameters._fields, found[len(needed) :], strict=True))
    return None, None, None, *(grad if name in learned else None for name, grad in of_gate.items()), *hidden


def _cast(grads: GateParameters, parameters: GateParameters) -> list[Tensor | None]:
    """The gradients in their parameters' dtypes. The running statistics have none."""
    return [
        None if grad is None or tensor is None else grad if grad.dtype == tensor.dtype else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, parameters, strict=True)
    ]

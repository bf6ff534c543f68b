"""The token path around a gate of ordinary modules, with each hidden state's gradient written once.

Squeeze and fuse both contribute to du_n, and the gate lies between them, so no single op sees both shares: autograd would write
each and then add them. Instead squeeze also returns two *carriers*: tensors of zero strides, shaped like v and g, that hold
nothing. Fuse receives the hidden states detached and returns dv and g as the carriers' "gradients". Autograd runs squeeze's
backward last, with everything that one write needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formula.call import Batch, HiddenGradients
from . import fuse, fuse_backward, squeeze, squeeze_backward


class SqueezeForFuse(torch.autograd.Function):
    """squeeze that also writes fuse's share of the hidden states' gradients.

    ``apply(attention_mask, cu_seqlens, reading, backend, *hidden_states)`` -> f [B, D], carrier like v, carrier like g.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        attention_mask, cu_seqlens, ctx.reading, ctx.backend, *hidden_states = args
        batch = Batch(hidden_states, attention_mask, cu_seqlens)
        squeezed, _ = squeeze.run(batch, ctx.reading, ctx.backend)
        squeeze_backward.save_layout(ctx, batch)
        ctx.set_materialize_grads(False)
        gates_shape = (squeezed.shape[0], batch.num_blocks, squeezed.shape[1])
        first = hidden_states[0]
        return squeezed, first.new_zeros(()).expand(first.shape), squeezed.new_zeros(()).expand(gates_shape)

    @staticmethod
    def backward(
        ctx: Any, grad_squeezed: Tensor | None, grad_fused: Tensor | None, gates: Tensor | None
    ) -> tuple[Any, ...]:
        layout, _ = squeeze_backward.saved_layout(ctx)
        grads = HiddenGradients(grad_squeezed, None, grad_fused, gates)
        hidden = squeeze_backward.run(grads, layout, ctx.needs_input_grad[4:], ctx.reading, ctx.backend)
        return None, None, None, None, *hidden


class FuseFromCarriers(torch.autograd.Function):
    """fuse that leaves the hidden states' gradients to ``SqueezeForFuse``.

    ``apply(gates, carrier_fused, carrier_gates, attention_mask, cu_seqlens, backend, *detached_hidden_states)`` -> v.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        gates, _, _, attention_mask, cu_seqlens, ctx.backend, *hidden_states = args
        ctx.save_for_backward(gates, attention_mask, cu_seqlens, *hidden_states)
        return fuse.run(Batch(hidden_states, attention_mask, cu_seqlens), gates, ctx.backend)

    @staticmethod
    def backward(ctx: Any, grad_fused: Tensor) -> tuple[Any, ...]:
        gates, attention_mask, cu_seqlens, *hidden_states = ctx.saved_tensors
        grad_gates = None
        if ctx.needs_input_grad[0]:
            batch = Batch(hidden_states, attention_mask, cu_seqlens)
            grad_gates = fuse_backward.run(grad_fused, batch, ctx.backend)
        return grad_gates, grad_fused, gates, None, None, None, *(None for _ in hidden_states)

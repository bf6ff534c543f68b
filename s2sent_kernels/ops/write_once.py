"""The derivatives of torch.ops.s2sent.*, and the private pair that writes the token path's gradients once.

Section by section this is the backward of the formulas in ``reference``; the reading and writing of hidden states happens in
two ops, ``fuse_backward`` (dg, the only one that reads them) and ``squeeze_backward`` (every du_n, written once).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .reference import GateParameters

_P = ops.NUM_PARAMETERS


class _Batch:
    """What a backward must know of the batch without keeping a hidden state alive."""

    def __init__(self, hidden_states: Sequence[Tensor]) -> None:
        first = hidden_states[0]
        self.shape, self.dtype, self.device = first.shape, first.dtype, first.device


def _hidden_gradients(
    batch: _Batch,
    needed: Sequence[bool],
    grad_squeezed: Tensor | None,
    grad_pooled: Tensor | None,
    grad_fused: Tensor | None,
    gates: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
    backend: str,
) -> list[Tensor | None]:
    """du_n for the hidden states that need one, None for the others."""
    nothing = grad_squeezed is None and grad_pooled is None and grad_fused is None
    if nothing or not any(needed):
        return [None] * len(needed)
    grads = torch.ops.s2sent.squeeze_backward(
        grad_squeezed, grad_pooled, grad_fused, gates, batch.shape, batch.dtype, batch.device, list(needed),
        attention_mask, cu_seqlens, frequencies, profile, pooling, backend,
    )  # fmt: skip
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


def _needed(ctx: Any, position: int = 0) -> list[bool]:
    return list(ctx.needs_input_grad[position])


def _add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return right if left is None else left if right is None else left + right


# ---------------------------------------------------------------- squeeze


def _squeeze_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden_states, attention_mask, cu_seqlens, *ctx.options = inputs
    ctx.batch = _Batch(hidden_states)
    ctx.save_for_backward(attention_mask, cu_seqlens)
    ctx.set_materialize_grads(False)


def _squeeze_backward(ctx: Any, grad_squeezed: Tensor | None, grad_pooled: Tensor | None) -> tuple[Any, ...]:
    mask, cu_seqlens = ctx.saved_tensors
    frequencies, profile, pooling, backend = ctx.options
    grads = _hidden_gradients(
        ctx.batch, _needed(ctx), grad_squeezed, grad_pooled if pooling is not None else None, None, None, mask,
        cu_seqlens, frequencies, profile, pooling, backend,
    )  # fmt: skip
    return grads, None, None, None, None, None, None


torch.library.register_autograd("s2sent::squeeze", _squeeze_backward, setup_context=_squeeze_context, lib=ops._library)


# ---------------------------------------------------------------- gate


def _gate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    squeezed, *rest = inputs
    ctx.options = rest[_P:]
    ctx.save_for_backward(squeezed, *rest[:_P])


def _gate_backward(ctx: Any, grad_gates: Tensor) -> tuple[Any, ...]:
    squeezed, *parameters = ctx.saved_tensors
    _, activation, eps, backend = ctx.options
    grad_squeezed, grads = ops._gate_gradients(
        grad_gates, squeezed, GateParameters(*parameters), activation, eps, backend
    )
    return grad_squeezed, *grads, None, None, None, None


torch.library.register_autograd("s2sent::gate", _gate_backward, setup_context=_gate_context, lib=ops._library)


# ---------------------------------------------------------------- fuse


def _fuse_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden_states, attention_mask, cu_seqlens, gates, ctx.backend = inputs
    ctx.batch = _Batch(hidden_states)
    ctx.save_for_backward(attention_mask, cu_seqlens, gates, *hidden_states)


def _fuse_backward(ctx: Any, grad_fused: Tensor) -> tuple[Any, ...]:
    mask, cu_seqlens, gates, *hidden_states = ctx.saved_tensors
    grad_gates = None
    if ctx.needs_input_grad[3]:
        grad_gates = torch.ops.s2sent.fuse_backward(grad_fused, hidden_states, mask, cu_seqlens, ctx.backend)
        grad_gates = grad_gates.to(gates.dtype)
    grads = _hidden_gradients(
        ctx.batch, _needed(ctx), None, None, grad_fused, gates, mask, cu_seqlens, 1, "paper", None, ctx.backend
    )
    return grads, None, None, grad_gates, None


torch.library.register_autograd("s2sent::fuse", _fuse_backward, setup_context=_fuse_context, lib=ops._library)


# ---------------------------------------------------------------- the whole selector


def _select_pool_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden_states, attention_mask, cu_seqlens, *rest = inputs
    ctx.options = rest[_P:]
    ctx.batch = _Batch(hidden_states)
    _, squeezed, pooled = output
    ctx.save_for_backward(attention_mask, cu_seqlens, squeezed, pooled, *rest[:_P])
    ctx.set_materialize_grads(False)


def _select_pool_backward(
    ctx: Any, grad_output: Tensor | None, grad_squeezed: Tensor | None, grad_pooled: Tensor | None
) -> tuple[Any, ...]:
    """No hidden state is read or was saved: dg = do p and dp = g do come from f and p."""
    mask, cu_seqlens, squeezed, pooled, *tensors = ctx.saved_tensors
    frequencies, pooling, activation, eps, backend = ctx.options
    parameters = GateParameters(*tensors)
    grads: list[Tensor | None] = [None] * _P
    if grad_output is not None:
        through_pool, through_gate, grads = ops._gate_pool_gradients(
            grad_output, squeezed, pooled, parameters, activation, eps, backend
        )
        grad_squeezed, grad_pooled = _add(grad_squeezed, through_gate), _add(grad_pooled, through_pool)
    hidden = _hidden_gradients(
        ctx.batch, _needed(ctx), grad_squeezed, grad_pooled, None, None, mask, cu_seqlens, frequencies, "paper",
        pooling, backend,
    )  # fmt: skip
    return hidden, None, None, *grads, None, None, None, None, None


torch.library.register_autograd(
    "s2sent::select_pool", _select_pool_backward, setup_context=_select_pool_context, lib=ops._library
)


def _select_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden_states, attention_mask, cu_seqlens, *rest = inputs
    ctx.options = rest[_P:]
    ctx.batch = _Batch(hidden_states)
    _, squeezed, gates = output
    ctx.save_for_backward(attention_mask, cu_seqlens, squeezed, gates, *rest[:_P], *hidden_states)
    ctx.set_materialize_grads(False)


def _select_backward(
    ctx: Any, grad_fused: Tensor | None, grad_squeezed: Tensor | None, grad_gates: Tensor | None
) -> tuple[Any, ...]:
    mask, cu_seqlens, squeezed, gates, *tensors = ctx.saved_tensors
    parameters, hidden_states = GateParameters(*tensors[:_P]), tensors[_P:]
    frequencies, activation, eps, backend = ctx.options
    grads: list[Tensor | None] = [None] * _P
    if grad_fused is not None:
        through_fuse = torch.ops.s2sent.fuse_backward(grad_fused, hidden_states, mask, cu_seqlens, backend)
        grad_gates = _add(grad_gates, through_fuse)
    if grad_gates is not None:
        through_gate, grads = ops._gate_gradients(grad_gates, squeezed, parameters, activation, eps, backend)
        grad_squeezed = _add(grad_squeezed, through_gate)
    hidden = _hidden_gradients(
        ctx.batch, _needed(ctx), grad_squeezed, None, grad_fused, gates, mask, cu_seqlens, frequencies, "paper",
        None, backend,
    )  # fmt: skip
    return hidden, None, None, *grads, None, None, None, None


torch.library.register_autograd("s2sent::select", _select_backward, setup_context=_select_context, lib=ops._library)


# ---------------------------------------------------------------- no second derivatives


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("s2sent: second derivatives are not implemented")


for _name in ("squeeze_backward", "gate_backward", "gate_pool_backward", "fuse_backward"):
    torch.library.register_autograd(f"s2sent::{_name}", _refuse, lib=ops._library)


# ---------------------------------------------------------------- one write for the token path


class SqueezeForFuse(torch.autograd.Function):
    """squeeze that takes over fuse's share of the hidden states' gradients.

    Between squeeze and fuse stands a gate of ordinary modules, so no single op can see both shares of du_n, and autograd
    would write each and then add them. Instead this squeeze also returns two carriers: tensors of zero strides, shaped
    like v and g, that hold nothing. ``FuseFromCarriers`` takes the hidden states detached and returns dv and g as
    the carriers' "gradients". Autograd runs this backward last, with all that one write needs.

    ``apply(attention_mask, cu_seqlens, frequencies, profile, backend, *hidden_states)`` -> f [B, D], carrier like v,
    carrier like g.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        attention_mask, cu_seqlens, frequencies, profile, backend, *hidden_states = args
        squeezed, _ = torch.ops.s2sent.squeeze(
            hidden_states, attention_mask, cu_seqlens, frequencies, profile, None, backend
        )
        ctx.options = (frequencies, profile, backend)
        ctx.batch = _Batch(hidden_states)
        ctx.save_for_backward(attention_mask, cu_seqlens)
        ctx.set_materialize_grads(False)
        first = hidden_states[0]
        gates_shape = (squeezed.shape[0], len(hidden_states), squeezed.shape[1])
        return squeezed, first.new_zeros(()).expand(first.shape), squeezed.new_zeros(()).expand(gates_shape)

    @staticmethod
    def backward(
        ctx: Any, grad_squeezed: Tensor | None, grad_fused: Tensor | None, gates: Tensor | None
    ) -> tuple[Any, ...]:
        mask, cu_seqlens = ctx.saved_tensors
        frequencies, profile, backend = ctx.options
        needed = list(ctx.needs_input_grad[5:])
        grads = _hidden_gradients(
            ctx.batch, needed, grad_squeezed, None, grad_fused, gates, mask, cu_seqlens, frequencies, profile, None,
            backend,
        )  # fmt: skip
        return None, None, None, None, None, *grads


class FuseFromCarriers(torch.autograd.Function):
    """fuse that leaves the hidden states' gradients to ``SqueezeForFuse``.

    ``apply(gates, carrier_fused, carrier_gates, attention_mask, cu_seqlens, backend, *detached_hidden_states)`` -> v.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        gates, _, _, attention_mask, cu_seqlens, ctx.backend, *hidden_states = args
        ctx.save_for_backward(gates, attention_mask, cu_seqlens, *hidden_states)
        return torch.ops.s2sent.fuse(hidden_states, attention_mask, cu_seqlens, gates, ctx.backend)

    @staticmethod
    def backward(ctx: Any, grad_fused: Tensor) -> tuple[Any, ...]:
        gates, mask, cu_seqlens, *hidden_states = ctx.saved_tensors
        grad_gates = None
        if ctx.needs_input_grad[0]:
            grad_gates = torch.ops.s2sent.fuse_backward(grad_fused, hidden_states, mask, cu_seqlens, ctx.backend)
        return grad_gates, grad_fused, gates, None, None, None, *(None for _ in hidden_states)

"""s2sent::squeeze_backward: the gradient of every hidden state that needs one, written once.

    du_n = g_n dv + w dp_n + alpha_n beta df

Squeeze, fuse and the whole selector all end here. It reads no hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import validate
from ..engines.choice import engine_for
from ..formula.call import Batch, Call, HiddenGradients, Layout, Pooling, Profile, Reading
from .library import register
from .namespace import OPS

SCHEMA = (
    "(Tensor? grad_squeezed, Tensor? grad_pooled, Tensor? grad_fused, Tensor? gates, "
    "SymInt[] shape, ScalarType dtype, Device device, bool[] needed, Tensor? attention_mask, Tensor? cu_seqlens, "
    "int frequencies, str profile, str? pooling, str backend) -> Tensor[]"
)


def run(
    grads: HiddenGradients, layout: Layout, needed: Sequence[bool], reading: Reading, backend: str
) -> list[Tensor | None]:
    """du_n for the hidden states that need one, None for the others."""
    nothing = grads.squeezed is None and grads.pooled is None and grads.fused is None
    if nothing or not any(needed):
        return [None] * len(needed)
    results = OPS.squeeze_backward(
        *grads,
        layout.shape,
        layout.dtype,
        layout.device,
        list(needed),
        layout.attention_mask,
        layout.cu_seqlens,
        *reading,
        backend,
    )
    return [grad if need else None for grad, need in zip(results, needed, strict=True)]


def save_layout(ctx: Any, batch: Batch, *tensors: Tensor | None) -> None:
    """Keeps what a backward pass needs of the batch, no hidden state among it, and ``tensors``."""
    ctx.shape, ctx.dtype, ctx.device = batch.shape, batch.dtype, batch.device
    ctx.save_for_backward(batch.attention_mask, batch.cu_seqlens, *tensors)


def saved_layout(ctx: Any) -> tuple[Layout, list[Tensor]]:
    """The layout that ``save_layout`` kept, and the tensors beside it."""
    mask, cu_seqlens, *tensors = ctx.saved_tensors
    return Layout(ctx.shape, ctx.dtype, ctx.device, mask, cu_seqlens), tensors


def _implementation(
    grad_squeezed: Tensor | None,
    grad_pooled: Tensor | None,
    grad_fused: Tensor | None,
    gates: Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    needed: list[bool],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: Profile,
    pooling: Pooling | None,
    backend: str,
) -> list[Tensor]:
    grads = HiddenGradients(grad_squeezed, grad_pooled, grad_fused, gates)
    layout = Layout(shape, dtype, device, attention_mask, cu_seqlens)
    reading = Reading(frequencies, profile, pooling)
    validate.layout(layout, len(needed), reading)
    validate.token_values(layout)
    validate.hidden_gradients(grads, layout, len(needed))
    engine = engine_for(backend, Call(device, dtype, num_blocks=len(needed)))
    results = engine.squeeze_backward(grads, layout, needed, reading)
    return [torch.empty(0, dtype=dtype, device=device) if grad is None else grad for grad in results]


def _fake(
    grad_squeezed: Tensor | None,
    grad_pooled: Tensor | None,
    grad_fused: Tensor | None,
    gates: Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    needed: list[bool],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: Profile,
    pooling: Pooling | None,
    backend: str,
) -> list[Tensor]:
    layout = Layout(shape, dtype, device, attention_mask, cu_seqlens)
    validate.layout(layout, len(needed), Reading(frequencies, profile, pooling))
    validate.hidden_gradients(HiddenGradients(grad_squeezed, grad_pooled, grad_fused, gates), layout, len(needed))
    return [torch.empty(shape if need else [0], dtype=dtype, device=device) for need in needed]


register("squeeze_backward", SCHEMA, _implementation, _fake)

"""s2sent::fuse: v like a hidden state, from gates g [B, N, D]."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import validate
from ..engines.choice import engine_for
from ..formula.call import Batch, Call, HiddenGradients, Reading
from . import fuse_backward, squeeze_backward
from .library import BATCH, Arguments, Gradients, batch_of, register
from .namespace import OPS

SCHEMA = f"({BATCH}, Tensor gates, str backend) -> Tensor"
# Fuse has no components. One, in profile "paper", is what every batch has.
_READING = Reading(frequencies=1)


def run(batch: Batch, gates: Tensor, backend: str) -> Tensor:
    return OPS.fuse(*batch, gates, backend)


def validate_fuse(batch: Batch, gates: Tensor) -> None:
    validate.batch(batch, _READING)
    validate.gates(gates, batch)
    validate.forward_mode((*batch.hidden_states, gates))


def _implementation(
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gates: Tensor,
    backend: str,
) -> Tensor:
    batch = Batch(hidden_states, attention_mask, cu_seqlens)
    validate_fuse(batch, gates)
    validate.token_values(batch)
    return engine_for(backend, Call.of(batch)).fuse(batch, gates)


def _fake(
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gates: Tensor,
    backend: str,
) -> Tensor:
    batch = Batch(hidden_states, attention_mask, cu_seqlens)
    validate_fuse(batch, gates)
    return hidden_states[0].new_empty(batch.shape)


def _save(ctx: Any, arguments: Arguments, output: Tensor) -> None:
    batch = batch_of(arguments)
    ctx.backend = arguments["backend"]
    squeeze_backward.save_layout(ctx, batch, arguments["gates"], *batch.hidden_states)


def _backward(ctx: Any, grad_fused: Tensor) -> Gradients:
    layout, (gates, *hidden_states) = squeeze_backward.saved_layout(ctx)
    grad_gates = None
    if ctx.needs_input_grad[3]:
        batch = Batch(hidden_states, layout.attention_mask, layout.cu_seqlens)
        grad_gates = fuse_backward.run(grad_fused, batch, ctx.backend).to(gates.dtype)
    grads = HiddenGradients(fused=grad_fused, gates=gates)
    hidden = squeeze_backward.run(grads, layout, ctx.needs_input_grad[0], _READING, ctx.backend)
    return {"hidden_states": hidden, "gates": grad_gates}


register("fuse", SCHEMA, _implementation, _fake, _save, _backward)

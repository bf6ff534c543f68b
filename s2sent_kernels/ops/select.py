"""s2sent::select: the whole selector, tokens, for profile "paper" with running statistics: (v, f, g).

f and g are in memory between the kernels anyway, and the backward pass needs them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import validate
from ..engines.choice import engine_for, engine_of
from ..formula.call import Batch, Call, GateParameters, Gating, HiddenGradients, Reading, compute_dtype
from . import direct, fuse_backward, gate_backward, squeeze_backward
from .library import (
    BATCH,
    PARAMETERS,
    Arguments,
    Gradients,
    add,
    batch_of,
    call,
    gradient_wanted,
    is_ordinary,
    parameters_of,
    register,
    split_parameters,
)

SCHEMA = f"({BATCH}, {PARAMETERS}, int frequencies, str activation, float eps, str backend) -> (Tensor, Tensor, Tensor)"


def run(batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating, backend: str) -> Tensor:
    """v like a hidden state. ``backend`` is one that ``choose`` returned."""
    if is_ordinary((*batch.hidden_states, *parameters)):
        validate.select(batch, reading, parameters, gating)
        validate.token_values(batch)
        engine = engine_of(backend)
        if gradient_wanted((*batch.hidden_states, *parameters)):
            how = direct.How(reading, gating, backend, engine)
            return direct.Select.apply(how, batch.attention_mask, batch.cu_seqlens, *parameters, *batch.hidden_states)
        return engine.select(batch, reading, parameters, gating)[0]
    options = (reading.frequencies, gating.activation, gating.eps, backend)
    return call("select", batch, parameters, options)[0]


def _unpacked(
    hidden_states: list[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None, rest: Any
) -> tuple[Batch, Reading, GateParameters, Gating, str]:
    parameters, (frequencies, activation, eps, backend) = split_parameters(rest)
    batch = Batch(hidden_states, attention_mask, cu_seqlens)
    return batch, Reading(frequencies), parameters, Gating(activation, eps), backend


def _implementation(
    hidden_states: list[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, reading, parameters, gating, backend = _unpacked(hidden_states, attention_mask, cu_seqlens, rest)
    validate.select(batch, reading, parameters, gating)
    validate.token_values(batch)
    return engine_for(backend, Call.of(batch)).select(batch, reading, parameters, gating)


def _fake(
    hidden_states: list[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, reading, parameters, gating, _ = _unpacked(hidden_states, attention_mask, cu_seqlens, rest)
    validate.select(batch, reading, parameters, gating)
    first, dtype = hidden_states[0], compute_dtype(batch.dtype)
    rows, size = batch.num_sentences, batch.hidden_size
    return (
        first.new_empty(batch.shape),
        first.new_empty(rows, size, dtype=dtype),
        first.new_empty(rows, batch.num_blocks, size, dtype=dtype),
    )


def _save(ctx: Any, arguments: Arguments, output: tuple[Tensor, Tensor, Tensor]) -> None:
    batch = batch_of(arguments)
    ctx.reading = Reading(arguments["frequencies"])
    ctx.gating, ctx.backend = Gating(arguments["activation"], arguments["eps"]), arguments["backend"]
    _, squeezed, gates = output
    squeeze_backward.save_layout(ctx, batch, squeezed, gates, *parameters_of(arguments), *batch.hidden_states)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_fused: Tensor | None, grad_squeezed: Tensor | None, grad_gates: Tensor | None
) -> Gradients:
    layout, (squeezed, gates, *rest) = squeeze_backward.saved_layout(ctx)
    parameters, hidden_states = split_parameters(rest)
    grads: Gradients = {}
    if grad_fused is not None:
        batch = Batch(hidden_states, layout.attention_mask, layout.cu_seqlens)
        grad_gates = add(grad_gates, fuse_backward.run(grad_fused, batch, ctx.backend))
    if grad_gates is not None:
        through_gate, grads = gate_backward.run(grad_gates, squeezed, parameters, ctx.gating, ctx.backend)
        grad_squeezed = add(grad_squeezed, through_gate)
    hidden = HiddenGradients(grad_squeezed, None, grad_fused, gates)
    needed = ctx.needs_input_grad[0]
    return {"hidden_states": squeeze_backward.run(hidden, layout, needed, ctx.reading, ctx.backend), **grads}


register("select", SCHEMA, _implementation, _fake, _save, _backward)

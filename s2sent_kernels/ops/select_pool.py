"""s2sent::select_pool: the whole selector, pooled, for profile "paper" with running statistics: (o, f, p).

f and p cost nothing, because the kernels write them anyway. They are all that the backward pass needs: dg = do p and dp = g do.
It reads no hidden state, and none is saved.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import validate
from ..engines.choice import engine_for, engine_of
from ..formula.call import Batch, Call, GateParameters, Gating, HiddenGradients, Reading, compute_dtype
from . import direct, gate_pool_backward, squeeze_backward
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

SCHEMA = (
    f"({BATCH}, {PARAMETERS}, int frequencies, str pooling, str activation, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)


def run(batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating, backend: str) -> Tensor:
    """o [B, D]. ``backend`` is one that ``choose`` returned."""
    if is_ordinary((*batch.hidden_states, *parameters)):
        validate.select(batch, reading, parameters, gating)
        validate.token_values(batch)
        engine = engine_of(backend)
        if gradient_wanted((*batch.hidden_states, *parameters)):
            how = direct.How(reading, gating, backend, engine)
            return direct.SelectPool.apply(
                how, batch.attention_mask, batch.cu_seqlens, *parameters, *batch.hidden_states
            )
        return engine.select_pool(batch, reading, parameters, gating)[0]
    options = (reading.frequencies, reading.pooling, gating.activation, gating.eps, backend)
    return call("select_pool", batch, parameters, options)[0]


def _unpacked(
    hidden_states: list[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None, rest: Any
) -> tuple[Batch, Reading, GateParameters, Gating, str]:
    parameters, (frequencies, pooling, activation, eps, backend) = split_parameters(rest)
    reading = Reading(frequencies, pooling=pooling)
    return Batch(hidden_states, attention_mask, cu_seqlens), reading, parameters, Gating(activation, eps), backend


def _implementation(
    hidden_states: list[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, reading, parameters, gating, backend = _unpacked(hidden_states, attention_mask, cu_seqlens, rest)
    validate.select(batch, reading, parameters, gating)
    validate.token_values(batch)
    return engine_for(backend, Call.of(batch)).select_pool(batch, reading, parameters, gating)


def _fake(
    hidden_states: list[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, reading, parameters, gating, _ = _unpacked(hidden_states, attention_mask, cu_seqlens, rest)
    validate.select(batch, reading, parameters, gating)
    first, dtype = hidden_states[0], compute_dtype(batch.dtype)
    rows, size = batch.num_sentences, batch.hidden_size
    return (
        first.new_empty(rows, size),
        first.new_empty(rows, size, dtype=dtype),
        first.new_empty(rows, batch.num_blocks, size, dtype=dtype),
    )


def _save(ctx: Any, arguments: Arguments, output: tuple[Tensor, Tensor, Tensor]) -> None:
    batch = batch_of(arguments)
    ctx.reading = Reading(arguments["frequencies"], pooling=arguments["pooling"])
    ctx.gating, ctx.backend = Gating(arguments["activation"], arguments["eps"]), arguments["backend"]
    _, squeezed, pooled = output
    squeeze_backward.save_layout(ctx, batch, squeezed, pooled, *parameters_of(arguments))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_output: Tensor | None, grad_squeezed: Tensor | None, grad_pooled: Tensor | None
) -> Gradients:
    layout, (squeezed, pooled, *tensors) = squeeze_backward.saved_layout(ctx)
    grads: Gradients = {}
    if grad_output is not None:
        through_pool, through_gate, grads = gate_pool_backward.run(
            grad_output, squeezed, pooled, GateParameters(*tensors), ctx.gating, ctx.backend
        )
        grad_squeezed, grad_pooled = add(grad_squeezed, through_gate), add(grad_pooled, through_pool)
    hidden = HiddenGradients(grad_squeezed, grad_pooled)
    needed = ctx.needs_input_grad[0]
    return {"hidden_states": squeeze_backward.run(hidden, layout, needed, ctx.reading, ctx.backend), **grads}


register("select_pool", SCHEMA, _implementation, _fake, _save, _backward)

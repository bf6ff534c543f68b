"""s2sent::squeeze: f [B, D], and p [B, N, D] with a pooling (else p is empty, [B, 0, D])."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import validate
from ..engines.choice import engine_for
from ..formula.call import Batch, Call, HiddenGradients, Pooling, Profile, Reading, compute_dtype
from . import squeeze_backward
from .library import BATCH, Arguments, Gradients, batch_of, register
from .namespace import OPS

SCHEMA = f"({BATCH}, int frequencies, str profile, str? pooling, str backend) -> (Tensor, Tensor)"


def run(batch: Batch, reading: Reading, backend: str) -> tuple[Tensor, Tensor | None]:
    squeezed, pooled = OPS.squeeze(*batch, *reading, backend)
    return squeezed, None if reading.pooling is None else pooled


def _validate(batch: Batch, reading: Reading) -> None:
    validate.batch(batch, reading)
    validate.forward_mode(batch.hidden_states)


def _implementation(
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: Profile,
    pooling: Pooling | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, reading = Batch(hidden_states, attention_mask, cu_seqlens), Reading(frequencies, profile, pooling)
    _validate(batch, reading)
    validate.token_values(batch)
    squeezed, pooled = engine_for(backend, Call.of(batch)).squeeze(batch, reading)
    if pooled is None:
        pooled = squeezed.new_empty(squeezed.shape[0], 0, squeezed.shape[1])
    return squeezed, pooled


def _fake(
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: Profile,
    pooling: Pooling | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, reading = Batch(hidden_states, attention_mask, cu_seqlens), Reading(frequencies, profile, pooling)
    _validate(batch, reading)
    rows, size, dtype = batch.num_sentences, batch.hidden_size, compute_dtype(batch.dtype)
    first, blocks = hidden_states[0], 0 if pooling is None else batch.num_blocks
    return first.new_empty(rows, size, dtype=dtype), first.new_empty(rows, blocks, size, dtype=dtype)


def _save(ctx: Any, arguments: Arguments, output: tuple[Tensor, Tensor]) -> None:
    batch = batch_of(arguments)
    ctx.reading = Reading(arguments["frequencies"], arguments["profile"], arguments["pooling"])
    ctx.backend = arguments["backend"]
    squeeze_backward.save_layout(ctx, batch)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_squeezed: Tensor | None, grad_pooled: Tensor | None) -> Gradients:
    layout, _ = squeeze_backward.saved_layout(ctx)
    grads = HiddenGradients(grad_squeezed, grad_pooled if ctx.reading.pooling is not None else None)
    return {
        "hidden_states": squeeze_backward.run(grads, layout, ctx.needs_input_grad[0], ctx.reading, ctx.backend),
    }


register("squeeze", SCHEMA, _implementation, _fake, _save, _backward)

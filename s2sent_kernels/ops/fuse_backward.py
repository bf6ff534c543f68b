"""s2sent::fuse_backward: dg [B, N, D] from dv. The only backward op that reads hidden states."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..engines.choice import engine_for
from ..formula.call import Batch, Call, Reading, compute_dtype
from .library import BATCH, register
from .namespace import OPS

SCHEMA = f"(Tensor grad_fused, {BATCH}, str backend) -> Tensor"


def run(grad_fused: Tensor, batch: Batch, backend: str) -> Tensor:
    return OPS.fuse_backward(grad_fused, *batch, backend)


def _implementation(
    grad_fused: Tensor,
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> Tensor:
    batch = Batch(hidden_states, attention_mask, cu_seqlens)
    validate.batch(batch, Reading(frequencies=1))
    validate.token_values(batch)
    validate.received("grad_fused", grad_fused, batch.shape, batch.device)
    return engine_for(backend, Call.of(batch)).fuse_backward(grad_fused, batch)


def _fake(
    grad_fused: Tensor,
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> Tensor:
    batch = Batch(hidden_states, attention_mask, cu_seqlens)
    validate.batch(batch, Reading(frequencies=1))
    validate.received("grad_fused", grad_fused, batch.shape, batch.device)
    shape = (batch.num_sentences, batch.num_blocks, batch.hidden_size)
    return hidden_states[0].new_empty(shape, dtype=compute_dtype(batch.dtype))


register("fuse_backward", SCHEMA, _implementation, _fake)

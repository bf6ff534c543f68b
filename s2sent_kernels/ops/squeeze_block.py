"""s2sent::squeeze_block: one block's hidden state into partial sums, in place. For inference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import validate
from ..engines.choice import engine_for
from ..formula.call import Batch, Call, PartialSums, Place, Pooling, Profile, Reading, compute_dtype
from .library import register_in_place
from .namespace import OPS

SCHEMA = (
    "(Tensor hidden_state, int block, int num_blocks, Tensor(a!) squeezed_groups, Tensor(b!)? pooled, "
    "Tensor? attention_mask, Tensor? cu_seqlens, int frequencies, str profile, str? pooling, str backend) -> ()"
)


def run(batch: Batch, place: Place, sums: PartialSums, reading: Reading, backend: str) -> None:
    (hidden_state,), mask, cu_seqlens = batch
    OPS.squeeze_block(hidden_state, *place, *sums, mask, cu_seqlens, *reading, backend)


def _implementation(
    hidden_state: Tensor,
    block: int,
    num_blocks: int,
    squeezed_groups: Tensor,
    pooled: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: Profile,
    pooling: Pooling | None,
    backend: str,
) -> None:
    batch, reading = Batch([hidden_state], attention_mask, cu_seqlens), Reading(frequencies, profile, pooling)
    validate.words(reading)
    validate.tensors(batch, profile)
    validate.components(num_blocks, batch.hidden_size, frequencies, profile)
    validate.forward_mode(batch.hidden_states)
    validate.token_values(batch)
    if not 0 <= block < num_blocks:
        raise ValueError(f"block: expected 0 to {num_blocks - 1}, got {block}")
    engine = engine_for(backend, Call(batch.device, batch.dtype, num_blocks=num_blocks))
    rows, size, dtype = batch.num_sentences, batch.hidden_size, compute_dtype(batch.dtype)
    shape = (rows, engine.num_groups(num_blocks), size)
    validate.buffer("squeezed_groups", squeezed_groups, shape, dtype, batch.device)
    if pooled is not None:
        validate.buffer("pooled", pooled, (rows, num_blocks, size), dtype, batch.device)
    engine.squeeze_block(batch, Place(block, num_blocks), PartialSums(squeezed_groups, pooled), reading)


def _fake(*arguments: Any) -> None:
    return None


register_in_place("squeeze_block", SCHEMA, _implementation, _fake)

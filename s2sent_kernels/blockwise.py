"""The pooled path fed one block at a time, so that an encoder's hidden states need not be kept."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import ops, validate
from .engines import plain
from .engines.choice import engine_for
from .engines.interface import Engine
from .formula import reference
from .formula.call import POOLINGS, Batch, Call, GateParameters, Gating, PartialSums, Place, Reading, compute_dtype
from .ops.library import without_dispatcher


class Gate(Protocol):
    """What a stream needs of a selector."""

    num_blocks: int
    hidden_size: int
    backend: str

    def gate(self, squeezed: Tensor) -> Tensor: ...

    def reading(self, pooling: str | None) -> Reading: ...

    def gating(self) -> Gating: ...

    def gate_parameters(self) -> GateParameters | None: ...


class _Kind(NamedTuple):
    """What every block of a stream has in common with the first."""

    shape: tuple[int, ...]  # torch.compile compares tuples, and in some releases no lists
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(hidden_state: Tensor) -> _Kind:
        return _Kind(tuple(hidden_state.shape), hidden_state.dtype, hidden_state.device)

    def __str__(self) -> str:
        return f"{list(self.shape)} of {self.dtype} on {self.device}"


class BlockwisePool:
    """Accumulates f and p over the blocks, each as it finishes; ``result`` gates and sums.

        stream = selector.blockwise(attention_mask)
        for block, hidden_state in enumerate(...):     # lowest first, each once
            stream.add(block, hidden_state)
        embeddings = stream.result()                   # the same bits as selector.pool(...), profile paper, eval, Triton

    For inference: it keeps no hidden state, so there is nothing to differentiate through. The first block is validated with
    mask and gate; of a later one only that it is like the first.

    Raises:
        RuntimeError: from ``add`` where a hidden state requires a gradient; from ``result`` where a block is missing.
        NotImplementedError: on forward-mode derivatives; in plain PyTorch they are right.
        ValueError: a block is repeated, out of order, or of another shape than the first.
    """

    def __init__(self, gate: Gate, attention_mask: Tensor | None, cu_seqlens: Tensor | None, pooling: str) -> None:
        validate.token_types(attention_mask, cu_seqlens)
        validate.option("pooling", pooling, POOLINGS)
        self._gate, self._reading = gate, gate.reading(pooling)
        self._mask, self._cu_seqlens = attention_mask, cu_seqlens
        self._next = 0
        self._first: _Kind | None = None
        self._engine: Engine = plain
        self._sums = PartialSums(torch.empty(0), None)

    def add(self, block: int, hidden_state: Tensor) -> None:
        """Squeeze and pool block ``block``'s hidden state, [B, L, D] or packed [T, D]."""
        num_blocks = self._gate.num_blocks
        if block != self._next or block == num_blocks:
            wanted = "no more" if self._next == num_blocks else self._next
            raise ValueError(f"block: expected {wanted}, blocks come in ascending order and once, got {block}")
        validate.tensor("hidden_state", hidden_state)
        if torch.is_grad_enabled() and hidden_state.requires_grad:
            raise RuntimeError("blockwise pooling is for inference: hidden_state requires a gradient")
        batch = Batch([hidden_state], self._mask, self._cu_seqlens)
        if self._first is None:
            self._start(batch)
        else:
            # Compare the values, not the formatted strings: torch.compile cannot guard on a string built from a symbolic size.
            kind = _Kind.of(hidden_state)
            if kind != self._first:
                raise ValueError(f"hidden_state: expected {self._first} as block 0, got {kind}")
        if self._engine is not plain:
            validate.forward_mode((hidden_state,))
        place = Place(block, num_blocks)
        # Plain PyTorch also serves devices for which no op is registered.
        if self._engine is plain or without_dispatcher((hidden_state,)):
            with torch.no_grad():
                self._engine.squeeze_block(batch, place, self._sums, self._reading)
        else:
            ops.squeeze_block.run(batch, place, self._sums, self._reading, self._gate.backend)
        self._next += 1

    def squeezed_and_pooled(self) -> tuple[Tensor, Tensor]:
        """f [B, D] and p [B, N, D], as ``functional.squeeze`` returns them."""
        self._require_all()
        assert self._sums.pooled is not None
        return plain.sum_groups(self._sums.squeezed_groups), self._sums.pooled

    def _require_all(self) -> None:
        if self._next != self._gate.num_blocks:
            raise RuntimeError(f"expected {self._gate.num_blocks} blocks, got {self._next}")

    def result(self) -> Tensor:
        """Sentence embeddings o [B, D]."""
        self._require_all()
        assert self._first is not None and self._sums.pooled is not None
        parameters, dtype = self._gate.gate_parameters(), self._first.dtype
        with torch.no_grad():
            if parameters is not None:
                if self._engine is not plain:
                    validate.forward_mode(parameters)
                frequencies, gating = self._reading.frequencies, self._gate.gating()
                return self._engine.gate_pool(self._sums, parameters, frequencies, gating, dtype)[0]
            gates = self._gate.gate(plain.sum_groups(self._sums.squeezed_groups))
            return reference.pool(gates, self._sums.pooled, dtype)

    def _start(self, batch: Batch) -> None:
        """Validate the first block, choose the engine and allocate its partial sums."""
        gate, first = self._gate, batch.hidden_states[0]
        validate.words(self._reading)
        validate.tensors(batch, self._reading.profile)
        if batch.hidden_size != gate.hidden_size:
            raise ValueError(f"hidden_state: expected D = {gate.hidden_size} features, got {list(first.shape)}")
        validate.components(gate.num_blocks, gate.hidden_size, self._reading.frequencies, self._reading.profile)
        parameters = gate.gate_parameters()
        if parameters is not None:
            validate.gate_parameters(parameters, gate.num_blocks, gate.hidden_size, first.device)
        validate.token_values(batch)
        self._first, dtype = _Kind.of(first), compute_dtype(first.dtype)
        self._engine = engine_for(gate.backend, Call(first.device, first.dtype, num_blocks=gate.num_blocks))
        rows, groups, size = batch.num_sentences, self._engine.num_groups(gate.num_blocks), gate.hidden_size
        self._sums = PartialSums(
            first.new_zeros(rows, groups, size, dtype=dtype),
            first.new_empty(rows, gate.num_blocks, size, dtype=dtype),
        )

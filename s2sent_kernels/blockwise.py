"""The pooled path fed one block at a time, so that an encoder's hidden states need not be kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops, reference, validate

if TYPE_CHECKING:
    from .selector import S2SentSelector

_Kind = tuple[list[int], torch.dtype, torch.device]


class BlockwisePool:
    """Accumulates f and p over the blocks as they come; ``result`` gates and sums.

        stream = selector.blockwise(attention_mask)
        for block, hidden_state in enumerate(...):     # lowest first, each once
            stream.add(block, hidden_state)
        embeddings = stream.result()                   # the same bits as selector.pool(...), profile paper, eval, Triton

    For inference: it keeps no hidden state, so there is nothing to differentiate through.

    Raises:
        RuntimeError: from ``add`` where a hidden state requires a gradient; from ``result`` where a block is missing.
        ValueError: a block comes twice, out of order, or in another shape than the first.
    """

    def __init__(
        self, selector: S2SentSelector, attention_mask: Tensor | None, cu_seqlens: Tensor | None, pooling: str
    ) -> None:
        validate.option("pooling", pooling, validate.POOLINGS)
        self._selector, self._mask, self._cu_seqlens, self._pooling = selector, attention_mask, cu_seqlens, pooling
        self._next = 0
        self._squeezed_groups = self._pooled = torch.empty(0)
        self._dtype = torch.float32
        self._first: _Kind | None = None
        self._engine: Any = None

    def add(self, block: int, hidden_state: Tensor) -> None:
        """Squeeze and pool block ``block``'s hidden state, [B, L, D] or packed [T, D]."""
        selector = self._selector
        if block != self._next or block == selector.num_blocks:
            wanted = "no more" if self._next == selector.num_blocks else self._next
            raise ValueError(f"block: expected {wanted}, blocks come in ascending order and once, got {block}")
        if not isinstance(hidden_state, Tensor):
            raise TypeError(f"hidden_state: expected a tensor, got {type(hidden_state).__name__}")
        if torch.is_grad_enabled() and hidden_state.requires_grad:
            raise RuntimeError("blockwise pooling is for inference: hidden_state requires a gradient")
        if self._first is None:
            self._start(hidden_state)
        else:
            # Not by their descriptions: torch.compile cannot compare words that hold a size which may vary.
            expected, came = self._first, _kind(hidden_state)
            if came != expected:
                raise ValueError(f"hidden_state: expected {_describe(expected)} as block 0, got {_describe(came)}")
        arguments = (
            hidden_state, block, selector.num_blocks, self._squeezed_groups, self._pooled, self._mask,
            self._cu_seqlens, selector.frequencies, selector.profile, self._pooling,
        )  # fmt: skip
        if self._engine is ops.plain:  # which also runs where no op is registered
            with torch.no_grad():
                ops.plain.squeeze_block(*arguments)
        else:
            torch.ops.s2sent.squeeze_block(*arguments, selector.backend)
        self._next += 1

    def result(self) -> Tensor:
        """Sentence embeddings o [B, D]."""
        selector = self._selector
        if self._next != selector.num_blocks:
            raise RuntimeError(f"expected {selector.num_blocks} blocks, got {self._next}")
        with torch.no_grad():
            if selector._is_fused():
                parameters, eps = selector._parameters_of_gate(), selector._eps()
                pool = self._engine.gate_pool(
                    self._squeezed_groups,
                    self._pooled,
                    parameters,
                    selector.frequencies,
                    selector.activation,
                    eps,
                    self._dtype,
                )
                return pool[0]
            gates = selector._gate(ops.plain.sum_groups(self._squeezed_groups))
            return reference.pool(gates, self._pooled, self._dtype)

    def _start(self, first: Tensor) -> None:
        selector = self._selector
        packed = self._cu_seqlens is not None
        validate.batch([first], self._mask, self._cu_seqlens, 1, selector.profile)
        if first.shape[-1] != selector.hidden_size:
            raise ValueError(f"hidden_state: expected D = {selector.hidden_size} features, got {list(first.shape)}")
        if selector._is_fused():
            parameters = selector._parameters_of_gate()
            validate.gate_parameters(parameters, selector.num_blocks, selector.hidden_size, first.device)
        validate.cu_seqlens_values(self._cu_seqlens, first.shape[0])
        self._first, self._dtype = _kind(first), first.dtype
        rows = self._cu_seqlens.shape[0] - 1 if packed and self._cu_seqlens is not None else first.shape[0]
        dtype = reference.compute_dtype(first.dtype)
        self._engine = ops.engine(selector.backend, first.device, first.dtype)
        groups = self._engine.num_groups(selector.num_blocks)
        self._squeezed_groups = first.new_zeros(rows, groups, selector.hidden_size, dtype=dtype)
        self._pooled = first.new_empty(rows, selector.num_blocks, selector.hidden_size, dtype=dtype)


def _kind(hidden_state: Tensor) -> _Kind:
    return list(hidden_state.shape), hidden_state.dtype, hidden_state.device


def _describe(kind: _Kind) -> str:
    shape, dtype, device = kind
    return f"{shape} of {dtype} on {device}"

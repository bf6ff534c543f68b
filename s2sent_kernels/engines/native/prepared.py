"""A selector's calls, and their backward passes, in one crossing into the compiled library: see csrc/bindings/plan.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...formula.call import Batch, BatchStatistics, GateParameters, Gating, Layout, Pooling, Reading
from .layout import activation_number, block_factors, pooling_number

_ops = torch.ops.s2sent_native


class Prepared:
    """The gate's tensors (not copies of them) and the constants of the DCT, known to the library by a number."""

    def __init__(self, parameters: GateParameters, num_blocks: int, reading: Reading, gating: Gating) -> None:
        alpha, y = block_factors(num_blocks, reading.frequencies, reading.profile, parameters.down_weight.device)
        # The library knows the number for as long as its owner lives.
        self._number, self._owner = _ops.plan(*parameters, alpha, y, activation_number(gating.activation), gating.eps)
        # An overload is found once. These take tensors, and no gradient is wanted of them.
        self._pool, self._select = _ops.planned_pool.default._op, _ops.planned_select.default._op
        self._pool_in_training = _ops.planned_pool_in_training.default._op
        self._pool_backward = _ops.planned_pool_backward.default._op
        self._select_backward = _ops.planned_select_backward.default._op

    def select_pool(
        self,
        hidden_states: Sequence[Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        pooling: Pooling | None,
        keep: bool = False,
    ) -> list[Tensor]:
        """[o], or [o, f, p] where they are kept; nothing where the call is one for the engine's other functions."""
        return self._pool(hidden_states, attention_mask, cu_seqlens, self._number, pooling_number(pooling), keep)

    def select(
        self,
        hidden_states: Sequence[Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        keep: bool = False,
    ) -> list[Tensor]:
        """[v], or [v, f, g]; nothing as above."""
        return self._select(hidden_states, attention_mask, cu_seqlens, self._number, keep)

    def select_pool_in_training(
        self,
        hidden_states: Sequence[Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        pooling: Pooling | None,
        momentum: float,
    ) -> list[Tensor]:
        """[o, f, p, mean, rstd], the last two of the batch, and the running statistics moved; nothing as above, and with fewer
        than two sentences or without a norm."""
        number = pooling_number(pooling)
        return self._pool_in_training(hidden_states, attention_mask, cu_seqlens, self._number, number, momentum)

    def select_pool_backward(
        self,
        grad_output: Tensor,
        squeezed: Tensor,
        pooled: Tensor,
        statistics: BatchStatistics | None,
        layout: Layout,
        pooling: Pooling | None,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        """The gradients of the hidden states (empty where not needed), then those of the gate's tensors in their order (empty
        where there is none); nothing as above. ``statistics``: those of a call in training."""
        mean, rstd = statistics or (None, None)
        return self._pool_backward(
            grad_output,
            squeezed,
            pooled,
            mean,
            rstd,
            layout.shape,
            layout.attention_mask,
            layout.cu_seqlens,
            self._number,
            pooling_number(pooling),
            needed,
        )

    def select_backward(
        self, grad_fused: Tensor, squeezed: Tensor, gates: Tensor, batch: Batch, needed: Sequence[bool]
    ) -> list[Tensor]:
        """As ``select_pool_backward``, with running statistics."""
        return self._select_backward(grad_fused, squeezed, gates, *batch, self._number, needed)

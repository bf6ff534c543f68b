"""A selector's calls in one crossing into the compiled library: see csrc/bindings/plan.h."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ...formula.call import GateParameters, Gating, Pooling, Reading
from .layout import activation_number, block_factors, pooling_number

_ops = torch.ops.s2sent_native


class Prepared:
    """The gate's tensors (not copies of them) and the constants of the DCT, known to the library by a number."""

    def __init__(self, parameters: GateParameters, num_blocks: int, reading: Reading, gating: Gating) -> None:
        alpha, y = block_factors(num_blocks, reading.frequencies, reading.profile, parameters.down_weight.device)
        number = _ops.plan(*parameters, alpha, y, activation_number(gating.activation), gating.eps)
        weakref.finalize(self, _ops.forget, number)
        self._number = number
        # An overload is found once. These take tensors, and no gradient is wanted of them.
        self._pool, self._select = _ops.planned_pool.default._op, _ops.planned_select.default._op

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

"""Which tokens are real, in plain PyTorch: the one description of a batch that the reference works on.

A batch comes padded, ``[B, L, D]`` with an optional mask ``[B, L]`` (right, left or with holes), or packed, ``[T, D]`` with
``cu_seqlens [B + 1]``. ``Tokens`` hides the difference: every token has a sentence, a rank among its sentence's real tokens
and that sentence's length; ``sum`` reduces over a sentence's tokens and ``spread`` hands a sentence's row to its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POOLINGS = ("mean", "cls", "last")


@dataclass(frozen=True)
class Tokens:
    """
    Attributes:
        real: bool, [B, L] or [T]: whether the token is real.
        rank: int64, like ``real``: place among the sentence's real tokens, from 0 (meaningless where not real).
        length: int64, [B, 1] or [T]: real tokens of the token's sentence; broadcasts against ``real``.
        sentence: int64 [T] for packed batches, None for padded ones.
        num_sentences: B.
    """

    real: Tensor
    rank: Tensor
    length: Tensor
    sentence: Tensor | None
    num_sentences: int

    @staticmethod
    def of(
        shape: Sequence[int],
        device: torch.device,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tokens:
        """Describe a batch from one hidden state's ``shape``: [B, L, D], or [T, D] with ``cu_seqlens``."""
        if cu_seqlens is not None:
            index = torch.arange(shape[0], device=device)
            starts = cu_seqlens.long()
            sentence = torch.bucketize(index, starts[1:], right=True)
            length = (starts[1:] - starts[:-1])[sentence]
            rank = index - starts[sentence]
            return Tokens(torch.ones_like(index, dtype=torch.bool), rank, length, sentence, cu_seqlens.shape[0] - 1)
        batch, size = shape[:2]
        if attention_mask is None:
            real = torch.ones(batch, size, dtype=torch.bool, device=device)
        else:
            real = attention_mask != 0
        running = real.cumsum(dim=1)
        return Tokens(real, running - 1, running[:, -1:] if size else running.new_zeros(batch, 1), None, batch)

    def keep_real(self, values: Tensor) -> Tensor:
        """``values`` ([B, L, D] or [T, D]) with 0 at padding; never by multiplication, since NaN * 0 is NaN."""
        return torch.where(self.real[..., None], values, 0)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each sentence's tokens: [B, L, D] or [T, D] -> [B, D]."""
        if self.sentence is None:
            return values.sum(dim=1)
        zeros = values.new_zeros(self.num_sentences, values.shape[-1])
        return zeros.index_add(0, self.sentence, values)

    def spread(self, rows: Tensor) -> Tensor:
        """Hand each sentence's row to its tokens: [B, D] -> [B, 1, D] (broadcasts over L) or [T, D]."""
        return rows[:, None] if self.sentence is None else rows[self.sentence]

    def pooling_weights(self, pooling: str) -> Tensor:
        """w in float64, shaped like ``real``: mean 1/l on real tokens; cls the first, last the last real token; 0 elsewhere."""
        if pooling == "mean":
            return torch.where(self.real, 1.0 / self.length.clamp(min=1).double(), 0.0)
        if pooling == "cls":
            return (self.real & (self.rank == 0)).double()
        if pooling == "last":
            return (self.real & (self.rank == self.length - 1)).double()
        raise ValueError(f"pooling: expected one of {POOLINGS}, got {pooling!r}")

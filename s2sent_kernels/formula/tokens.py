"""Which tokens are real, in plain PyTorch: the one description of a batch that the reference works on.

A batch is padded, ``[B, L, D]`` with an optional mask ``[B, L]`` (right, left or with holes), or packed, ``[T, D]`` with
``cu_seqlens [B + 1]``. ``Tokens`` hides the difference. Each token has a sentence, a rank among its sentence's real tokens
and that sentence's length; ``sum`` reduces over a sentence's tokens, and ``spread`` repeats a sentence's row for its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .call import POOLINGS, Batch, Layout


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
    def of(batch: Batch | Layout) -> Tokens:
        if batch.cu_seqlens is not None:
            index = torch.arange(batch.shape[0], device=batch.device)
            starts = batch.cu_seqlens.long()
            sentence = torch.bucketize(index, starts[1:], right=True)
            length = (starts[1:] - starts[:-1])[sentence]
            rank = index - starts[sentence]
            return Tokens(torch.ones_like(index, dtype=torch.bool), rank, length, sentence, batch.num_sentences)
        rows, padded = batch.shape[:2]
        if batch.attention_mask is None:
            real = torch.ones(rows, padded, dtype=torch.bool, device=batch.device)
        else:
            real = batch.attention_mask != 0
        running = real.long().cumsum(dim=1)  # of bool, ONNX has no such sum
        return Tokens(real, running - 1, running[:, -1:] if padded else running.new_zeros(rows, 1), None, rows)

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
        """Each sentence's row for each of its tokens: [B, D] -> [B, 1, D] (broadcasts over L) or [T, D]."""
        return rows[:, None] if self.sentence is None else rows[self.sentence]

    def pooling_weights(self, pooling: str) -> Tensor:
        """w in float64, shaped like ``real``: mean is 1/l on real tokens, cls 1 on the first, last 1 on the last; else 0."""
        if pooling == "mean":
            return torch.where(self.real, 1.0 / self.length.clamp(min=1).double(), 0.0)
        if pooling == "cls":
            return (self.real & (self.rank == 0)).double()
        if pooling == "last":
            return (self.real & (self.rank == self.length - 1)).double()
        raise ValueError(f"pooling: expected one of {POOLINGS}, got {pooling!r}")

"""Fusions of an encoder's blocks that a selector is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import validate


class ScalarMix(nn.Module):
    """One learned weight per block, softmax over the blocks: the baseline that every other fusion has to beat."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        validate.positive_int("num_blocks", num_blocks)
        self.num_blocks = num_blocks
        self.block_prior = nn.Parameter(torch.zeros(num_blocks))

    @classmethod
    def of_weights(cls, weights: Sequence[float]) -> ScalarMix:
        """The mix with these positive weights, up to their sum."""
        if not weights or min(weights) <= 0:
            raise ValueError(f"weights: expected positive numbers, one for each block, got {list(weights)}")
        mix = cls(len(weights))
        with torch.no_grad():
            mix.block_prior.copy_(torch.tensor(weights, dtype=torch.float64).log())
        return mix

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, D] from p [B, N, D]."""
        return torch.einsum("n,bnd->bd", self.block_prior.softmax(dim=0), pooled)

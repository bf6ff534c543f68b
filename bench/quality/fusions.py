"""What a selector has to beat behind a frozen encoder: fusions that do not look at the sentence before they choose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s2sent_kernels.frozen import Features

LAST = 3.0  # where the logits of the last block start, as in a selector's block prior


class MeanOfLast(nn.Module):
    def forward(self, features: Features) -> Tensor:
        return features.pooled[:, -1]


class Average(nn.Module):
    def forward(self, features: Features) -> Tensor:
        return features.pooled.mean(dim=1)


class Concatenation(nn.Module):
    def forward(self, features: Features) -> Tensor:
        return features.pooled.flatten(1)


class ConstantGates(nn.Module):
    """A gate for every block and feature, the same for every sentence: a selector without its squeeze."""

    def __init__(self, num_blocks: int, hidden_size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_blocks, hidden_size))
        with torch.no_grad():
            self.logits[-1] = LAST

    def forward(self, features: Features) -> Tensor:
        return (self.logits.softmax(dim=0) * features.pooled).sum(dim=1)


class LinearMap(nn.Module):
    """A D x D map of the mean of the last block, from the identity on: as many weights, and one block."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(hidden_size))

    def forward(self, features: Features) -> Tensor:
        return features.pooled[:, -1] @ self.weight.T

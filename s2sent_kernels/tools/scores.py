"""Gold scores on a scale, and Spearman's and Pearson's correlation by scipy, times 100, which need the extra evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..files import require

SPEARMAN = "Spearman's correlation x 100"  # in words


class Correlations(NamedTuple):
    """Times 100, as the literature reports them."""

    spearman: float
    pearson: float


def correlations(similarity: Sequence[float], gold: Sequence[float]) -> Correlations:
    """The correlations of ``similarity`` with ``gold``. NaN if either is constant."""
    stats = require("scipy.stats", "scipy", "evaluate")
    if len(similarity) != len(gold):
        raise ValueError(f"gold: expected {len(similarity)} scores, one for each pair, got {len(gold)}")
    return Correlations(
        100 * float(stats.spearmanr(similarity, gold).statistic),
        100 * float(stats.pearsonr(similarity, gold).statistic),
    )


def unit_scores(gold: Tensor) -> Tensor:
    """Gold scores on a scale from 0 to 1. ValueError where one is not finite, or all are equal."""
    low, high = gold.min(), gold.max()
    if not (torch.isfinite(gold).all() and low < high):
        raise ValueError(f"gold: expected finite and different scores, got {low} to {high}")
    return (gold - low) / (high - low)

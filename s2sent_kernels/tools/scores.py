"""Spearman's and Pearson's correlation by scipy, times 100. Needs the extra evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..files import require


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

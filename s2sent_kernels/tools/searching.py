"""Exact search: the embeddings nearest to those of queries, by cosine, block by block in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import require

if TYPE_CHECKING:
    import numpy as np

QUERIES = 256  # compared with a block at once
Best = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]  # queries [Q, D], block [n, D], k: scores and rows [Q, k]


class Hit(NamedTuple):
    row: int
    score: float  # the cosine


class Found(NamedTuple):
    hits: list[list[Hit]]  # of each query, best first
    without: int  # rows that have no embedding


def by_torch(queries: Tensor, block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of equal scores the first row's comes first."""
    scores, rows = torch.sort(queries @ block.T, dim=1, descending=True, stable=True)
    return scores[:, :count], rows[:, :count]


def by_faiss(queries: Tensor, block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same by FAISS's exact search."""
    faiss = require("faiss", "faiss-cpu", None)
    scores, rows = faiss.knn(queries.numpy(), block.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(scores), torch.from_numpy(rows)


ENGINES: dict[str, Best] = {"torch": by_torch, "faiss": by_faiss}


def nearest(queries: np.ndarray, blocks: Iterable[np.ndarray], count: int, engine: str = "torch") -> Found:
    """For each query the ``count`` nearest rows, or all if there are fewer. A row of NaN alone has no embedding, as one that
    `s2sent encode --on-error skip` has skipped, and is near to nothing.

    Args:
        queries: [Q, D] float32.
        blocks: [n, D] float32 each; their rows are numbered from 0 over all of them.
        engine: one of ENGINES.

    Raises:
        ValueError: another embedding is not finite; names its row, from 0.
        MissingPackage: the engine's library is not installed; names it.
    """
    best = ENGINES[engine]
    asked = F.normalize(torch.from_numpy(queries), dim=1)
    scores, rows = torch.empty(len(asked), 0), torch.empty(len(asked), 0, dtype=torch.int64)
    first = without = 0
    for values in blocks:
        block = F.normalize(torch.from_numpy(values), dim=1)
        index = first + torch.arange(len(block))
        if not bool((finite := block.isfinite().all(dim=1)).all()):
            missing = torch.from_numpy(values).isnan().all(dim=1)
            wrong = index[~finite & ~missing]
            if len(wrong):
                raise ValueError(f"row {int(wrong[0])}: expected finite numbers")
            block, index = block[finite], index[finite]
        first, without = first + len(values), without + len(values) - len(block)
        found = [best(some, block, min(count, len(block))) for some in asked.split(QUERIES)]
        # What was found before stands first, and a stable sort leaves it there among equal scores.
        scores = torch.cat([scores, torch.cat([one for one, _ in found])], dim=1)
        rows = torch.cat([rows, index[torch.cat([one for _, one in found])]], dim=1)
        scores, order = torch.sort(scores, dim=1, descending=True, stable=True)
        scores, rows = scores[:, :count], rows.gather(1, order[:, :count])
    hits = [
        [Hit(*pair) for pair in zip(line, some, strict=True)]
        for line, some in zip(rows.tolist(), scores.tolist(), strict=True)
    ]
    return Found(hits, without)

"""A chunk's embeddings: collected as batches finish, averaged over the windows of a text, and in the wanted precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Tokens
from .files import require

if TYPE_CHECKING:
    import numpy as np

PRECISIONS = ("float32", "float16", "int8", "uint8", "binary", "ubinary")


class Chunk:
    """Texts that are sorted together, and their rows' embeddings as they arrive.

    Args:
        tokens: of the texts.
        size: D.
        skip: tokens at the start of a text that do not count in the pooling.

    Attributes:
        texts: how many.
        left: rows that have not arrived.
    """

    def __init__(self, tokens: Tokens, size: int, skip: int = 0) -> None:
        self.tokens, self.texts, self._skip = tokens, int(tokens.text[-1]) + 1, skip
        self.left = int((tokens.lengths > 0).sum())
        self._embeddings = torch.zeros(len(tokens.ids), size, dtype=torch.float32)  # 0: a row without tokens

    def counts(self, rows: np.ndarray) -> tuple[int, int]:
        """How many texts begin in these rows, and how many tokens they have."""
        text = self.tokens.text
        begins = (rows == 0) | (text[rows] != text[rows - 1])
        return int(begins.sum()), sum(len(self.tokens.ids[row]) for row in rows)

    def keep(self, rows: np.ndarray, values: Tensor) -> None:
        self._embeddings[torch.from_numpy(rows)] = values
        self.left -= len(rows)

    def result(self) -> Tensor:
        """[S, D]: the windows of each text, weighted by the tokens that count. A text of one row keeps its bits."""
        import numpy as np

        values, tokens = self._embeddings, self.tokens
        if len(values) == self.texts:
            return values
        counted = np.maximum(tokens.lengths - tokens.uncounted(self._skip), 0)
        starts = np.searchsorted(tokens.text, np.arange(self.texts + 1))
        result = values[torch.from_numpy(starts[:-1])]
        for text in np.flatnonzero(np.diff(starts) > 1):
            part = slice(int(starts[text]), int(starts[text + 1]))
            weights = torch.from_numpy(counted[part]).float()
            result[text] = (weights / weights.sum()) @ values[part]
        return result


def finished(values: Tensor, head: nn.Module | None, truncate_dim: int | None, normalize: bool) -> Tensor:
    """[S, D'] float32 on the host: the head, then truncation, then normalization."""
    if head is not None:
        with torch.no_grad():
            values = head(like(head, values)).float().cpu()
    if truncate_dim is not None:
        values = values[:, :truncate_dim]
    return F.normalize(values, dim=1) if normalize else values


def like(head: nn.Module, values: Tensor) -> Tensor:
    """The values where the head's parameters are, if it has some."""
    parameter = next(head.parameters(), None)
    return values if parameter is None else values.to(parameter.device, parameter.dtype)


def quantized(values: Tensor, precision: str) -> np.ndarray:
    if precision == "float32":
        return values.numpy()
    if precision == "float16":
        return values.half().numpy()
    util = require("sentence_transformers.util", "sentence-transformers", "sentence-transformers")
    return util.quantize_embeddings(values.numpy(), precision=precision)

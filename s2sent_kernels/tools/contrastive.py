"""The contrastive loss of several processes: each anchor against the positives and hard negatives of all of them. Needs the extra
train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import importing

with importing(None, "train"):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank

_PRIME = 1_000_003  # of a polynomial over token ids, modulo 2 ** 64


class GatheredNegatives(MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss over the batches of all processes, each as large as the others. A candidate whose text is the
    anchor's or its positive's is no negative: a process's batch has no text twice, those of several have."""

    def __init__(self, model: Any, scale: float) -> None:
        super().__init__(model, scale=scale, gather_across_devices=True)
        self._texts: list[Tensor] = []

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        columns = list(sentence_features)
        self._texts = [_fingerprints(**column) for column in columns]
        return super().forward(columns, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        anchors, positives, *negatives = embeddings  # [B, D] each, of W processes
        own = torch.arange(len(anchors), device=anchors.device) + get_rank() * len(anchors)
        candidates = torch.cat([all_gather_with_grad(part) for part in (positives, *negatives)])  # [W B columns, D]
        texts = torch.cat([all_gather(part) for part in self._texts[1:]])
        scores = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).T * self.scale
        same = (texts == self._texts[0][:, None]) | (texts == texts[own][:, None])
        same[torch.arange(len(own), device=own.device), own] = False
        return F.cross_entropy(scores.masked_fill(same, -torch.inf), own)


def _fingerprints(input_ids: Tensor, attention_mask: Tensor, **others: Any) -> Tensor:
    """int64 [B]: equal for equal token ids, whatever the padding."""
    powers = torch.full(input_ids.shape[1:], _PRIME, device=input_ids.device, dtype=torch.int64).cumprod(dim=0)
    # Tokens are counted from the first real one, so that padding on the left changes nothing.
    place = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return ((input_ids + 1) * powers[place] * attention_mask).sum(dim=1)

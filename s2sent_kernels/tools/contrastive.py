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
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
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
        return _loss(embeddings, self._texts, self.scale)


class CachedGatheredNegatives(CachedMultipleNegativesRankingLoss):
    """The same loss and gradients, where the encoder runs on ``mini_batch_size`` examples at once: first without gradients, then
    with them, once those of the loss are known. For modules whose output for a text does not depend on the batch."""

    def __init__(self, model: Any, scale: float, mini_batch_size: int) -> None:
        super().__init__(model, scale=scale, mini_batch_size=mini_batch_size, gather_across_devices=True)
        self._texts: list[Tensor] = []

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        columns = list(sentence_features)
        self._texts = [_fingerprints(**column) for column in columns]
        return super().forward(columns, labels)

    def calculate_loss(self, reps: list[list[Tensor]], *labels: Any, with_backward: bool = False) -> Tensor:
        loss = _loss([torch.cat(column) for column in reps], self._texts, self.scale)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss


def _loss(embeddings: list[Tensor], own_texts: list[Tensor], scale: float) -> Tensor:
    """The loss of this process's anchors, from its columns of embeddings [B, D] and the fingerprints [B] of their texts; W
    processes have as many each."""
    anchors, positives, *negatives = embeddings
    own = torch.arange(len(anchors), device=anchors.device) + get_rank() * len(anchors)
    candidates = torch.cat([all_gather_with_grad(part) for part in (positives, *negatives)])  # [W B columns, D]
    texts = torch.cat([all_gather(part) for part in own_texts[1:]])
    scores = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).T * scale
    same = (texts == own_texts[0][:, None]) | (texts == texts[own][:, None])
    same[torch.arange(len(own), device=own.device), own] = False
    return F.cross_entropy(scores.masked_fill(same, -torch.inf), own)


def _fingerprints(input_ids: Tensor, attention_mask: Tensor, **others: Any) -> Tensor:
    """int64 [B]: equal for equal token ids, whatever the padding."""
    powers = torch.full(input_ids.shape[1:], _PRIME, device=input_ids.device, dtype=torch.int64).cumprod(dim=0)
    # Tokens are counted from the first real one, so that padding on the left changes nothing.
    place = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return ((input_ids + 1) * powers[place] * attention_mask).sum(dim=1)

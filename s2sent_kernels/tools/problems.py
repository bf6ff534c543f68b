"""What a classifier's head is trained for: transformers' problem types, each with its loss and with the score that chooses an
epoch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .. import validate

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
CLASSES, LABELS, NUMBERS = PROBLEMS
SCORES = {CLASSES: "accuracy", LABELS: "micro F1", NUMBERS: "R2"}


def check_dropout(dropout: float) -> None:
    """Of the embedding, before the head. ValueError or TypeError where it is no number from 0 to below 1."""
    validate.number("dropout", dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a number from 0 to below 1, got {dropout}")


class Problem(NamedTuple):
    """What a head's outputs mean.

    Targets of "single_label_classification" are classes, int64 [S]; of "multi_label_classification" 0 and 1, float32 [S, K]; of
    "regression" numbers, float32 [S].
    """

    kind: str  # one of PROBLEMS
    outputs: int  # of the head: classes, labels, or 1

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """transformers' loss for this problem type, of logits [B, outputs]."""
        if self.kind == CLASSES:
            return F.cross_entropy(logits, targets)
        if self.kind == LABELS:
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.mse_loss(logits[:, 0], targets)

    def score(self, logits: Tensor, targets: Tensor) -> float:
        """Times 100, higher is better: the accuracy; F1 of all labels at probability 1/2; the part of the targets' variance that
        is explained. NaN where that is not defined."""
        if self.kind == CLASSES:
            return 100 * (logits.argmax(dim=1) == targets).double().mean().item()
        if self.kind == LABELS:
            found, wanted = logits > 0, targets > 0
            both = int(found.sum()) + int(wanted.sum())
            return 100 * 2 * int((found & wanted).sum()) / both if both else math.nan
        errors, spread = (logits[:, 0] - targets).square().mean(), targets.var(correction=0)
        return 100 * (1 - errors / spread).item() if spread > 0 else math.nan

    def score_of_constant(self, known: Tensor, targets: Tensor) -> float:
        """The score on ``targets`` of what is best without reading a text, by other targets: their most frequent class, the
        labels that half of them have, their mean."""
        if self.kind == CLASSES:
            logits = F.one_hot(known, self.outputs).double().sum(dim=0)
        else:
            logits = known.double().mean(dim=0, keepdim=self.kind == NUMBERS) - (0.5 if self.kind == LABELS else 0.0)
        return self.score(logits.expand(len(targets), -1), targets)

    def check(self) -> None:
        """ValueError where there is no such problem."""
        validate.option("kind", self.kind, PROBLEMS)
        validate.positive_int("outputs", self.outputs)
        if self.kind == CLASSES and self.outputs < 2:
            raise ValueError(f"outputs: expected two or more classes, got {self.outputs}")
        if self.kind == NUMBERS and self.outputs != 1:
            raise ValueError(f"outputs: expected 1 for a regression, got {self.outputs}")

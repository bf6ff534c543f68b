"""Training a selector behind a frozen encoder: f and p of a sentence are then constants, read from a cache.

The objective is the published one: InfoNCE over cosine similarities at temperature 0.05, each anchor against every positive and
every hard negative of its batch. A step reads [3 B, N, D] numbers and runs no encoder: an epoch takes seconds in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cache, frozen_loop, validate
from .cache import BlockCache
from .formula import dct
from .frozen_loop import History as History  # public under this name
from .selector import S2SentSelector
from .tools.baselines import ScalarMix as ScalarMix  # public under this name
from .tools.encoders import in_eval_mode
from .tools.scores import correlations

EMBEDDED_AT_ONCE = 2048  # sentences, without gradients


class Recipe(NamedTuple):
    """The hyperparameters. Block prior and gate scale have their own learning rate: they move much further than a weight."""

    epochs: int = 5
    batch_size: int = 256
    temperature: float = 0.05
    learning_rate: float = 3e-3
    prior_learning_rate: float = 1e-2
    weight_decay: float = 0.01  # of matrices; 0 for biases, norms and priors
    patience: int | None = None  # epochs without a better dev score before training stops
    seed: int = 0


DEFAULT = Recipe()


class Features(NamedTuple):
    """f and p of S sentences, on any device."""

    squeezed: Tensor  # f [S, D]
    pooled: Tensor  # p [S, N, D]

    @staticmethod
    def of(cached: BlockCache, num_blocks: int, frequencies: int, rows: Tensor | None = None) -> Features:
        return Features(cached.squeezed(num_blocks, frequencies, rows), cached.pooled(num_blocks, rows))

    def to(self, device: torch.device | str) -> Features:
        return Features(*(tensor.to(device) for tensor in self))

    def take(self, rows: Tensor) -> Features:
        return Features(self.squeezed[rows], self.pooled[rows])


def embed(module: nn.Module, features: Features) -> Tensor:
    """o [B, D] of a selector or a scalar mix, from f and p."""
    if isinstance(module, S2SentSelector):
        return (module.gate(features.squeezed) * features.pooled).sum(dim=1)
    return module(features.pooled)


def embed_all(module: nn.Module, features: Features) -> Tensor:
    """``embed`` in eval mode and without gradients, a slice of the sentences at a time."""
    with in_eval_mode(module), torch.no_grad():
        starts = range(0, len(features.pooled), EMBEDDED_AT_ONCE)
        slices = [Features(*(t[start : start + EMBEDDED_AT_ONCE] for t in features)) for start in starts]
        return torch.cat([embed(module, some) for some in slices])


def info_nce(anchor: Tensor, positive: Tensor, negative: Tensor | None, temperature: float) -> Tensor:
    """Each anchor's [B, D] cross entropy over all positives [B, D] and hard negatives [K, D] of the batch."""
    candidates = positive if negative is None else torch.cat([positive, negative])
    scores = F.normalize(anchor, dim=1) @ F.normalize(candidates, dim=1).T / temperature
    return F.cross_entropy(scores, torch.arange(len(anchor), device=anchor.device))


def train(
    module: nn.Module,
    features: Features,
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    recipe: Recipe = DEFAULT,
    *,
    score: Callable[[nn.Module], float] | None = None,
) -> History:
    """Train a selector or a scalar mix in place, on rows of ``features``. The seed fixes the order of the triplets.

    Args:
        module: an S2SentSelector or a ScalarMix, on the device of ``features``.
        anchor, positive, negative: rows, int64 [T]; ``negative`` may be [T, K], -1 for a missing one, or None for pairs.
        score: called before the first epoch and after each; the state with the highest score is kept. Without it, the last one.

    Raises:
        ValueError: the sizes do not fit, a number of the recipe is out of range, or the training diverged.
    """
    _check(recipe, len(anchor))

    def loss_of(chosen: Tensor) -> Tensor:
        rows = [anchor[chosen], positive[chosen]]
        if negative is not None:
            rows.append(negative[chosen][negative[chosen] >= 0])
        # One call of the gate for the whole batch: its norm must see one distribution, not anchors apart from the rest.
        together = embed(module, features.take(torch.cat(rows).to(features.pooled.device)))
        anchors, positives, negatives = together.split([len(chosen), len(chosen), len(together) - 2 * len(chosen)])
        return info_nce(anchors, positives, negatives, recipe.temperature)

    return frozen_loop.run(module, len(anchor), loss_of, recipe, None if score is None else lambda: score(module))


def _check(recipe: Recipe, count: int) -> None:
    frozen_loop.check(recipe)
    validate.positive_number("temperature", recipe.temperature)
    if count < 2:
        raise ValueError(f"anchor: expected at least two, since a batch's others are the negatives, got {count}")


@dataclass(frozen=True)
class Dev:
    """A scorer for ``train``: 100 times Spearman's correlation of cosine similarities with ``gold``, over pairs of rows."""

    features: Features
    first: Tensor
    second: Tensor
    gold: Sequence[float]

    def __call__(self, module: nn.Module) -> float:
        embeddings = embed_all(module, self.features)
        similarity = F.cosine_similarity(embeddings[self.first], embeddings[self.second])
        return correlations(similarity.tolist(), self.gold).spearman


def token_frequencies(selector: S2SentSelector) -> int:
    """Y: the number of token frequencies that the selector's components need."""
    return 1 + max(y for _, y in dct.frequency_pairs(selector.num_blocks, selector.frequencies))


def fit(
    encoder: nn.Module,
    tokenizer: Any,
    selector: S2SentSelector,
    examples: Sequence[tuple[str, ...]],
    *,
    folder: str | Path,
    dev: Sequence[tuple[str, str, float]] | None = None,
    recipe: Recipe = DEFAULT,
    settings: cache.Settings = cache.DEFAULT,
    progress: bool = False,
) -> History:
    """Encode once (or open the cache), and train ``selector`` in place from it.

    Args:
        examples: (anchor, positive, hard negatives ...), all of one length; a negative that is empty or None is skipped.
        folder: of the caches.
        dev: (sentence, sentence, score); chooses the epoch.
        settings: of the cache. The selector reads the last N of its blocks.

    Raises:
        ValueError: the selector does not fit the cached blocks, there are fewer than two examples, or a setting is wrong.
    """
    if selector.profile != "paper":
        raise ValueError(f"selector: expected profile 'paper', got {selector.profile!r}")
    _check(recipe, len(examples))  # before encoding, which may take hours
    cached = cache.make(
        encoder, tokenizer, [t for row in examples for t in row if t], folder, settings, progress=progress
    )
    if selector.hidden_size != cached.hidden_size:
        raise ValueError(f"selector: expected hidden_size = {cached.hidden_size}, got {selector.hidden_size}")
    score: Dev | None = None
    if dev is not None:
        pairs = [text for one, other, _ in dev for text in (one, other)]
        cached_dev = cache.make(encoder, tokenizer, pairs, folder, settings, progress=progress)
        rows = cached_dev.rows(pairs)
        score = Dev(
            Features.of(cached_dev, selector.num_blocks, selector.frequencies),
            rows[::2],
            rows[1::2],
            [gold for _, _, gold in dev],
        )
    device = next(selector.parameters()).device
    features = Features.of(cached, selector.num_blocks, selector.frequencies).to(device)
    if score is not None:
        score = replace(score, features=score.features.to(device))
    anchor, positive = cached.rows([row[0] for row in examples]), cached.rows([row[1] for row in examples])
    negatives = [[cached.row(text) if text else -1 for text in row[2:]] for row in examples]
    negative = torch.tensor(negatives, dtype=torch.int64)
    return train(selector, features, anchor, positive, negative, recipe, score=score)

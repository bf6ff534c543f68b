"""Training a selector behind a frozen encoder: f and p of a sentence are then constants, read from a cache.

The objective is the published one: InfoNCE over cosine similarities at temperature 0.05, each anchor against every positive and
every hard negative of its batch. A step reads [3 B, N, D] numbers and runs no encoder: an epoch takes seconds in plain PyTorch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cache, validate
from .cache import BlockCache
from .formula import dct
from .selector import S2SentSelector
from .tools.baselines import ScalarMix as ScalarMix  # public under this name
from .tools.encoders import in_eval_mode
from .tools.scores import correlations

EMBEDDED_AT_ONCE = 2048  # sentences, without gradients


class Recipe(NamedTuple):
    """The hyperparameters. The block prior has its own learning rate, because it moves much further than a weight."""

    epochs: int = 5
    batch_size: int = 256
    temperature: float = 0.05
    learning_rate: float = 3e-3
    prior_learning_rate: float = 1e-2
    weight_decay: float = 0.01  # of matrices; 0 for biases, norms and priors
    seed: int = 0


DEFAULT = Recipe()


class History(NamedTuple):
    """Mean loss of each epoch; the dev score before the first epoch and after each; the epoch whose state was kept."""

    losses: list[float]
    scores: list[float]
    kept: int


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


def _optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    named = list(module.named_parameters())
    priors = [p for name, p in named if name.endswith(("block_prior", "gate_scale"))]
    matrices = [p for name, p in named if not name.endswith(("block_prior", "gate_scale")) and p.dim() > 1]
    vectors = [p for name, p in named if not name.endswith(("block_prior", "gate_scale")) and p.dim() == 1]
    groups = [
        {"params": matrices, "lr": recipe.learning_rate, "weight_decay": recipe.weight_decay},
        {"params": vectors, "lr": recipe.learning_rate, "weight_decay": 0.0},
        {"params": priors, "lr": recipe.prior_learning_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])


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
    # A batch of one has no batch statistics and no negatives, so a last batch that is less than half full is dropped.
    size = min(recipe.batch_size, len(anchor))
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = _optimizer(module, recipe)
    losses: list[float] = []
    scores = [] if score is None else [score(module)]
    best, kept = None, 0
    for epoch in range(1, recipe.epochs + 1):
        module.train()
        order = torch.randperm(len(anchor), generator=generator)
        total, batches = torch.zeros((), device=features.pooled.device), 0
        for chosen in order.split(size):
            if 2 * len(chosen) < size:
                continue
            rows = [anchor[chosen], positive[chosen]]
            if negative is not None:
                rows.append(negative[chosen][negative[chosen] >= 0])
            # One call of the gate for the whole batch: its norm must see one distribution, not anchors apart from the rest.
            together = embed(module, features.take(torch.cat(rows).to(features.pooled.device)))
            anchors, positives, negatives = together.split([len(chosen), len(chosen), len(together) - 2 * len(chosen)])
            loss = info_nce(anchors, positives, negatives, recipe.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
            batches += 1
        losses.append((total / batches).item())
        module.eval()
        if score is not None:
            scores.append(score(module))
            if best is None or _order(scores[-1]) > _order(scores[kept]):
                best, kept = copy.deepcopy(module.state_dict()), epoch
        else:
            kept = epoch
    if best is not None:
        module.load_state_dict(best)
    validate.finite_state("module", module)
    return History(losses, scores, kept)


def _order(score: float) -> float:
    """A score for comparison. NaN, the correlation of identical embeddings, ranks below every number."""
    return -math.inf if math.isnan(score) else score


def _check(recipe: Recipe, count: int) -> None:
    for name in ("epochs", "batch_size"):
        validate.positive_int(name, getattr(recipe, name))
    for name in ("temperature", "learning_rate", "prior_learning_rate"):
        validate.positive_number(name, getattr(recipe, name))
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

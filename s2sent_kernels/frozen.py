"""Training a selector behind a frozen encoder: f and p of a sentence are then constants, read from a cache.

``train`` has the published objective: InfoNCE over cosine similarities at temperature 0.05, each anchor against every positive
and every hard negative of its batch. ``train_scored`` learns from scored pairs. A step reads [3 B, N, D] numbers and runs no
encoder: an epoch takes seconds in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cache, families, frozen_loop, validate, waiting
from .cache import BlockCache
from .formula import dct
from .frozen_loop import History as History  # public under this name
from .frozen_loop import Told
from .selector import S2SentSelector
from .tools.baselines import ScalarMix as ScalarMix  # public under this name
from .tools.encoders import in_eval_mode
from .tools.recipe import LOSSES
from .tools.scores import correlations, unit_scores

EMBEDDED_AT_ONCE = 2048  # sentences, without gradients


class Recipe(NamedTuple):
    """The hyperparameters. Block prior and gate scale have their own learning rate: they move much further than a weight."""

    epochs: int = 5
    batch_size: int = 256
    temperature: float = 0.05
    symmetric: bool = False  # of ``train``: each positive also against every anchor
    # Of ``train``: the loss is the mean over these numbers of first features, and over all.
    widths: tuple[int, ...] = ()
    learning_rate: float = 3e-3
    prior_learning_rate: float = 1e-2
    weight_decay: float = 0.01  # of matrices; 0 for biases, norms and priors
    patience: int | None = None  # epochs without a better dev score before training stops
    seed: int = 0


DEFAULT = Recipe()
# Of scored pairs. CoSENT's sum over all pairs of a batch is at 0.05 little more than its few worst terms.
SCORED = DEFAULT._replace(epochs=3, temperature=0.2)


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
    """o [B, D] of a selector or a scalar mix, from f and p. Any other module is called with the features."""
    if isinstance(module, S2SentSelector):
        return (module.gate(features.squeezed) * features.pooled).sum(dim=1)
    return module(features.pooled if isinstance(module, ScalarMix) else features)


def embed_all(module: nn.Module, features: Features) -> Tensor:
    """``embed`` in eval mode and without gradients, a slice of the sentences at a time."""
    with in_eval_mode(module), torch.no_grad():
        starts = range(0, len(features.pooled), EMBEDDED_AT_ONCE)
        slices = [Features(*(t[start : start + EMBEDDED_AT_ONCE] for t in features)) for start in starts]
        return torch.cat([embed(module, some) for some in slices])


def info_nce(
    anchor: Tensor, positive: Tensor, negative: Tensor | None, temperature: float, symmetric: bool = False
) -> Tensor:
    """Each anchor's [B, D] cross entropy over all positives [B, D] and hard negatives [K, D] of the batch; if ``symmetric``, its
    mean with each positive's over all anchors."""
    candidates = positive if negative is None else torch.cat([positive, negative])
    scores = F.normalize(anchor, dim=1) @ F.normalize(candidates, dim=1).T / temperature
    own = torch.arange(len(anchor), device=anchor.device)
    loss = F.cross_entropy(scores, own)
    return (loss + F.cross_entropy(scores[:, : len(anchor)].T, own)) / 2 if symmetric else loss


def cosent(similarity: Tensor, gold: Tensor, temperature: float) -> Tensor:
    """CoSENT of cosine similarities [B] and gold scores [B]: the log of 1 plus a sum over pairs of examples in which the lower
    gold score has the higher similarity, or nearly. The order of the gold scores counts alone."""
    difference = (similarity[:, None] - similarity[None]) / temperature
    wrong = torch.where(gold[:, None] < gold[None], difference, -math.inf).flatten()
    return torch.cat([wrong, wrong.new_zeros(1)]).logsumexp(dim=0)


def train(
    module: nn.Module,
    features: Features,
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    recipe: Recipe = DEFAULT,
    *,
    score: Callable[[nn.Module], float] | None = None,
    told: Told = lambda _: None,
) -> History:
    """Train a selector or a scalar mix in place, on rows of ``features``. The seed fixes the order of the triplets.

    Args:
        module: an S2SentSelector, a ScalarMix, or a module from Features to embeddings, on the device of ``features``.
        anchor, positive, negative: rows, int64 [T]; ``negative`` may be [T, K], -1 for a missing one, or None for pairs.
        score: called before the first epoch and after each; the epoch with the highest score is kept. Without it, the last one.
        told: called with each ``frozen_loop.Epoch`` as it ends.

    Raises:
        ValueError: the sizes do not fit, a number of the recipe is out of range, or the training diverged.
    """
    check(recipe, len(anchor), features.pooled.shape[-1])

    def loss_of(chosen: Tensor) -> Tensor:
        rows = [anchor[chosen], positive[chosen]]
        if negative is not None:
            rows.append(negative[chosen][negative[chosen] >= 0])
        # One call of the gate for the whole batch: its norm must see one distribution, not anchors apart from the rest.
        together = embed(module, features.take(torch.cat(rows).to(features.pooled.device)))
        anchors, positives, negatives = together.split([len(chosen), len(chosen), len(together) - 2 * len(chosen)])

        def of_first(width: int | None) -> Tensor:
            parts = (anchors[:, :width], positives[:, :width], negatives[:, :width])
            return info_nce(*parts, recipe.temperature, recipe.symmetric)

        return torch.stack([of_first(width) for width in (*recipe.widths, None)]).mean()

    return frozen_loop.run(module, len(anchor), loss_of, recipe, None if score is None else lambda: score(module), told)


def train_scored(
    module: nn.Module,
    features: Features,
    pairs: Tensor,
    gold: Tensor,
    recipe: Recipe = SCORED,
    *,
    loss: str = LOSSES[0],
    score: Callable[[nn.Module], float] | None = None,
    told: Told = lambda _: None,
) -> History:
    """``train`` on scored pairs.

    Args:
        pairs: rows of ``features``, int64 [T, 2].
        gold: float32 [T], higher is more alike.
        loss: "cosent"; or "cosine", the squared error of the cosine similarity, where the lowest gold score means 0 and the
            highest 1.

    Raises:
        ValueError: as ``train``; or a gold score is not finite, or all are equal.
    """
    check(recipe, len(pairs), features.pooled.shape[-1])
    validate.option("loss", loss, LOSSES)
    gold = unit_scores(gold).to(features.pooled.device)

    def loss_of(chosen: Tensor) -> Tensor:
        together = embed(module, features.take(pairs[chosen].T.flatten().to(features.pooled.device)))
        first, second = together.chunk(2)
        similarity, wanted = F.cosine_similarity(first, second), gold[chosen.to(gold.device)]
        if loss == "cosine":
            return F.mse_loss(similarity, wanted)
        return cosent(similarity, wanted, recipe.temperature)

    return frozen_loop.run(module, len(pairs), loss_of, recipe, None if score is None else lambda: score(module), told)


def check(recipe: Recipe, count: int, hidden_size: int) -> None:
    """ValueError or TypeError where a number of the recipe is out of range, or there are fewer than two examples."""
    frozen_loop.check(recipe)
    for width in recipe.widths:
        validate.positive_int("widths", width)
        if width >= hidden_size:
            raise ValueError(f"widths: expected fewer than all {hidden_size} features, got {width}")
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
    mean_of_last: Tensor | None = None  # [S, D] of the encoder's last block; None if it is not cached

    def __call__(self, module: nn.Module) -> float:
        return self.of(embed_all(module, self.features))

    def of(self, embeddings: Tensor) -> float:
        """The score of embeddings [S, D] of the same sentences."""
        similarity = F.cosine_similarity(embeddings[self.first], embeddings[self.second])
        return correlations(similarity.tolist(), self.gold).spearman


def token_frequencies(selector: S2SentSelector) -> int:
    """Y: the number of token frequencies that the selector's components need."""
    return 1 + max(y for _, y in dct.frequency_pairs(selector.num_blocks, selector.frequencies))


class Prepared(NamedTuple):
    """What ``prepare`` gives to trainings: f and p on the selector's device, rows int64 [T, K], and the scorer of a dev part."""

    features: Features
    rows: Tensor  # of the examples' texts, -1 for a missing one
    score: Dev | None

    def train(self, module: nn.Module, recipe: Recipe = DEFAULT, told: Told = lambda _: None) -> History:
        """``train`` on (anchor, positive, negatives ...)."""
        anchor, positive, negative = self.rows[:, 0], self.rows[:, 1], self.rows[:, 2:]
        return train(module, self.features, anchor, positive, negative, recipe, score=self.score, told=told)

    def train_scored(
        self,
        module: nn.Module,
        gold: Tensor,
        recipe: Recipe,
        loss: str = LOSSES[0],
        told: Told = lambda _: None,
    ) -> History:
        """``train_scored`` on pairs, with their gold scores [T]."""
        return train_scored(module, self.features, self.rows, gold, recipe, loss=loss, score=self.score, told=told)


def prepare(
    encoder: nn.Module,
    tokenizer: Any,
    selector: S2SentSelector,
    examples: Sequence[Sequence[str | None]],
    *,
    folder: str | Path,
    dev: Sequence[tuple[str, str, float]] | None = None,
    settings: cache.Settings = cache.DEFAULT,
    progress: bool = False,
    verify: bool = False,
) -> Prepared:
    """Encode once (or open the cache), for any number of trainings. Arguments and errors as ``fit``."""
    if selector.profile != "paper":
        raise ValueError(f"selector: expected profile 'paper', got {selector.profile!r}")
    _check_texts(examples, dev)
    texts = [text for row in examples for text in row if text]
    cached = cache.make(encoder, tokenizer, texts, folder, settings, progress=progress, verify=verify)
    if selector.hidden_size != cached.hidden_size:
        raise ValueError(f"selector: expected hidden_size = {cached.hidden_size}, got {selector.hidden_size}")
    device = next(selector.parameters()).device
    score: Dev | None = None
    if dev is not None:
        pairs = [text for one, other, _ in dev for text in (one, other)]
        cached_dev = cache.make(encoder, tokenizer, pairs, folder, settings, progress=progress, verify=verify)
        rows = cached_dev.rows(pairs)
        whole = cached_dev.blocks[-1] == len(families.find_blocks(encoder)) - 1
        last = cached_dev.mean_of_last() if whole else None
        features = Features.of(cached_dev, selector.num_blocks, selector.frequencies).to(device)
        score = Dev(features, rows[::2], rows[1::2], [gold for _, _, gold in dev], last)
    with waiting.told("reading the cache", progress):
        features = Features.of(cached, selector.num_blocks, selector.frequencies).to(device)
    numbers = [[cached.row(text) if text else -1 for text in row] for row in examples]
    return Prepared(features, torch.tensor(numbers, dtype=torch.int64), score)


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
    verify: bool = False,
) -> History:
    """Encode once (or open the cache), and train ``selector`` in place from it.

    Args:
        examples: tuples or lists (anchor, positive, hard negatives ...), all of one length; a negative that is empty or None is
            skipped.
        folder: of the caches.
        dev: (sentence, sentence, score); chooses the epoch.
        settings: of the cache. The selector reads the last N of its blocks.
        verify: compare a cache that is opened with its checksums.

    Raises:
        ValueError: the selector does not fit the cached blocks, there are fewer than two examples, an anchor or a positive is
            empty, an example has another length than the first, or a setting is wrong.
        TypeError: an example is no tuple or list, or a text no string.
    """
    _check_rows("examples", examples)  # before their number is believed
    check(recipe, len(examples), selector.hidden_size)  # before encoding, which may take hours
    prepared = prepare(
        encoder,
        tokenizer,
        selector,
        examples,
        folder=folder,
        dev=dev,
        settings=settings,
        progress=progress,
        verify=verify,
    )
    return prepared.train(selector, recipe)


def _check_texts(examples: Sequence[Sequence[str | None]], dev: Sequence[tuple[str, str, float]] | None) -> None:
    """Judge what ``fit`` is given."""
    for place, row in _rows("examples", examples):
        if len(row) < 2:
            raise ValueError(f"{place}: expected anchor and positive at least, got {len(row)}")
        if len(row) != len(examples[0]):
            raise ValueError(f"{place}: expected {len(examples[0])} texts, as examples[0] has, got {len(row)}")
        for number, text in enumerate(row):
            name = ("anchor", "positive", "negative")[min(number, 2)]
            if text is not None and not isinstance(text, str):
                raise TypeError(f"{place}: expected a string as {name}, got {type(text).__name__}")
            if number < 2 and not text:
                raise ValueError(f"{place}: expected {name} to have a text, got {text!r}")
    for place, row in _rows("dev", () if dev is None else dev):
        if len(row) != 3:
            raise ValueError(f"{place}: expected (sentence, sentence, score), got {len(row)} values")
        for text in row[:2]:
            if not isinstance(text, str):
                raise TypeError(f"{place}: expected a string as sentence, got {type(text).__name__}")
        score = float(row[2]) if isinstance(row[2], Real) else row[2]  # numpy's too
        validate.finite_number(f"{place}: score", score)


def _check_rows(name: str, rows: Any) -> None:
    """Of a string or a dict the letters or keys would pass as texts."""
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Sequence):
        raise TypeError(f"{name}: expected a sequence of tuples, got {type(rows).__name__}")


def _rows(name: str, rows: Any) -> Iterator[tuple[str, Sequence[Any]]]:
    """The rows and their names, where they are tuples or lists."""
    _check_rows(name, rows)
    for number, row in enumerate(rows):
        if not isinstance(row, (tuple, list)):
            raise TypeError(f"{name}[{number}]: expected a tuple, got {type(row).__name__}")
        yield f"{name}[{number}]", row

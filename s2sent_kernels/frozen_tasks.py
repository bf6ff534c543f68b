"""Training on a task behind a frozen encoder: a selector, or another module from Features to embeddings, and with it a dropout
and a linear head.

    problem = Problem("single_label_classification", outputs=6)
    found = search(lambda: S2SentSelector(384, 6, 32, block_prior=True, gate_scale=4.0), train_part, dev_part, problem)
    found.trained.module, found.trained.head        # the best on the dev part; found.trials lists all that was tried

No step runs the encoder, so a training takes seconds, and several learning rates and dropouts are tried.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import frozen, frozen_loop
from .frozen import Features
from .frozen_loop import Epoch, History, Told
from .tools.problems import CLASSES, LABELS, NUMBERS, check_dropout
from .tools.problems import Problem as Problem  # public under this name

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
DROPOUTS = (0.0, 0.2)


class Recipe(NamedTuple):
    """The hyperparameters. ``learning_rate`` is that of selector and head."""

    epochs: int = 8
    batch_size: int = 64
    learning_rate: float = 3e-3
    dropout: float = 0.2  # of the embedding, before the head
    prior_learning_rate: float = 1e-2
    weight_decay: float = 0.01
    patience: int | None = None  # epochs without a better dev score before training stops
    seed: int = 0


DEFAULT = Recipe()


class Part(NamedTuple):
    """f and p of S texts or pairs of texts, and their targets, on one device."""

    features: Features
    targets: Tensor


class Trained(NamedTuple):
    """An embedding's module and the head behind it, in eval mode."""

    module: nn.Module
    head: nn.Linear

    def logits(self, features: Features) -> Tensor:
        """[S, outputs], without gradients."""
        with torch.no_grad():
            return self.head(frozen.embed_all(self.module, features))


class Trial(NamedTuple):
    """One training of a search."""

    recipe: Recipe
    history: History
    seconds: float


class Found(NamedTuple):
    """All that was tried, in order, and what the best trial trained."""

    trials: list[Trial]
    best: Trial
    trained: Trained


def train(
    module: nn.Module,
    part: Part,
    problem: Problem,
    recipe: Recipe = DEFAULT,
    *,
    dev: Part | None = None,
    told: Told = lambda _: None,
) -> tuple[Trained, History]:
    """Train ``module`` in place, and a fresh head behind it. The seed fixes the head's start, the dropout and the order.

    Args:
        module: an S2SentSelector, a ScalarMix, or a module from Features to embeddings [B, any size]. Features may have further
            dimensions after the first, as f [S, 2, D] and p [S, 2, N, D] of two sentences that are encoded apart.
        dev: chooses the epoch. Without it, the last one is kept.
        told: called with each ``frozen_loop.Epoch`` as it ends.

    Raises:
        ValueError, TypeError: a number of the recipe or the problem is wrong, targets do not fit the features or the problem, or
            the training diverged.
    """
    check(problem, recipe)
    for name, some in (("part", part), ("dev", dev)):
        if some is not None:
            _check_part(name, some, problem)
    device = part.features.pooled.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        size = frozen.embed_all(module, part.features.take(torch.zeros(1, dtype=torch.int64))).shape[1]
        head = nn.Linear(size, problem.outputs).to(device)
        targets, shift, scale = part.targets, 0.0, 1.0
        if problem.kind == NUMBERS:  # the head learns in units of the targets' spread, from their mean
            shift, scale = targets.mean().item(), targets.std(correction=0).item() or 1.0
            targets = (targets - shift) / scale
        dropout = nn.Dropout(recipe.dropout)
        trained = Trained(module, head)

        def loss_of(chosen: Tensor) -> Tensor:
            rows = chosen.to(device)
            logits = head(dropout(frozen.embed(module, part.features.take(rows))))
            return problem.loss(logits, targets[rows])

        def score() -> float:
            assert dev is not None
            return problem.score(trained.logits(dev.features) * scale + shift, dev.targets)

        both = nn.ModuleList([module, dropout, head])
        history = frozen_loop.run(both, len(targets), loss_of, recipe, None if dev is None else score, told)
    with torch.no_grad():
        head.weight.mul_(scale)
        head.bias.mul_(scale).add_(shift)
    return trained, history


def grid(
    recipe: Recipe = DEFAULT,
    learning_rates: Sequence[float] = LEARNING_RATES,
    dropouts: Sequence[float] = DROPOUTS,
    seeds: Sequence[int] = (0,),
) -> list[Recipe]:
    """The recipe with every learning rate, dropout and seed."""
    every = itertools.product(learning_rates, dropouts, seeds)
    return [recipe._replace(learning_rate=rate, dropout=dropout, seed=seed) for rate, dropout, seed in every]


def search(
    make: Callable[[], nn.Module],
    part: Part,
    dev: Part,
    problem: Problem,
    recipes: Sequence[Recipe] | None = None,
    *,
    told: Callable[[Recipe, Epoch], None] = lambda *_: None,
    ended: Callable[[Trial], None] = lambda _: None,
) -> Found:
    """``train`` with every recipe; the best score on ``dev`` decides, and of equal ones the first.

    Args:
        make: a fresh module, called once for each recipe, under its seed.
        recipes: by default ``grid()``.
        told: called with each epoch of each trial as it ends.
        ended: called with each trial as it ends.

    Raises:
        ValueError, TypeError: as ``train``; or there is no recipe.
    """
    tried = grid() if recipes is None else list(recipes)
    if not tried:
        raise ValueError("recipes: expected at least one, got none")
    for recipe in tried:
        check(problem, recipe)
    trials: list[Trial] = []
    best: tuple[Trial, Trained] | None = None
    for recipe in tried:
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            module = make().to(part.features.pooled.device)
        trained, history = train(module, part, problem, recipe, dev=dev, told=partial(told, recipe))
        trials.append(Trial(recipe, history, time.perf_counter() - start))
        ended(trials[-1])
        if best is None or frozen_loop.order(history.score) > frozen_loop.order(best[0].history.score):
            best = trials[-1], trained
    assert best is not None
    return Found(trials, *best)


def check(problem: Problem, recipe: Recipe) -> None:
    """ValueError or TypeError where a number of the recipe, or the problem, is out of range."""
    frozen_loop.check(recipe)
    check_dropout(recipe.dropout)
    problem.check()


def _check_part(name: str, part: Part, problem: Problem) -> None:
    count, targets = len(part.features.pooled), part.targets
    several = problem.kind == LABELS
    expected = [count, problem.outputs] if several else [count]
    if list(targets.shape) != expected:
        raise ValueError(f"{name}: expected targets {expected} of {count} texts, got {list(targets.shape)}")
    if count < 2:
        raise ValueError(f"{name}: expected two or more texts, got {count}")
    if problem.kind == CLASSES:
        if targets.dtype != torch.int64:
            raise TypeError(f"{name}: expected classes as torch.int64, got {targets.dtype}")
        if int(targets.min()) < 0 or int(targets.max()) >= problem.outputs:
            raise ValueError(
                f"{name}: expected classes from 0 to {problem.outputs - 1}, got {targets.unique().tolist()}"
            )
    elif not targets.dtype.is_floating_point:
        raise TypeError(f"{name}: expected floating point targets, got {targets.dtype}")
    elif not targets.isfinite().all():
        raise ValueError(f"{name}: expected finite targets, got a NaN or an infinity")

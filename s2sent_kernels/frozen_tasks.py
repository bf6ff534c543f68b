"""Training on a task behind a frozen encoder: a selector, or another module that makes an embedding of f and p, and with it a
dropout and a linear head.

    problem = Problem("single_label_classification", outputs=6)
    found = search(lambda: S2SentSelector(384, 6, 32, block_prior=True, gate_scale=4.0), train_part, dev_part, problem)
    found.trained.module, found.trained.head        # the best on the dev part; found.trials lists all that was tried

No step runs the encoder, so a training takes seconds, and several learning rates and dropouts are tried.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import frozen, frozen_loop, validate
from .frozen import Features
from .frozen_loop import History

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")  # transformers' words
SCORES = dict(zip(PROBLEMS, ("accuracy", "micro F1", "R2"), strict=True))
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


class Problem(NamedTuple):
    """What a head's outputs mean.

    Targets of "single_label_classification" are classes, int64 [S]; of "multi_label_classification" 0 and 1, float32 [S, K]; of
    "regression" numbers, float32 [S].
    """

    kind: str  # one of PROBLEMS
    outputs: int  # of the head: classes, labels, or 1

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """transformers' loss for this problem type, of logits [B, outputs]."""
        if self.kind == "single_label_classification":
            return F.cross_entropy(logits, targets)
        if self.kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.mse_loss(logits[:, 0], targets)

    def score(self, logits: Tensor, targets: Tensor) -> float:
        """Times 100, higher is better: the accuracy; F1 of all labels at probability 1/2; the part of the targets' variance that
        is explained. NaN where that is not defined."""
        if self.kind == "single_label_classification":
            return 100 * (logits.argmax(dim=1) == targets).double().mean().item()
        if self.kind == "multi_label_classification":
            found, wanted = logits > 0, targets > 0
            both = int(found.sum()) + int(wanted.sum())
            return 100 * 2 * int((found & wanted).sum()) / both if both else math.nan
        errors, spread = (logits[:, 0] - targets).square().mean(), targets.var(correction=0)
        return 100 * (1 - errors / spread).item() if spread > 0 else math.nan


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

    learning_rate: float
    dropout: float
    history: History
    seconds: float


class Found(NamedTuple):
    """All that was tried, in order, and what the best trial trained."""

    trials: list[Trial]
    best: Trial
    trained: Trained


def train(
    module: nn.Module, part: Part, problem: Problem, recipe: Recipe = DEFAULT, *, dev: Part | None = None
) -> tuple[Trained, History]:
    """Train ``module`` in place, and a fresh head behind it. The seed fixes the head's start, the dropout and the order.

    Args:
        module: an S2SentSelector, or a module from p [B, N, D] to embeddings [B, any size]; as ``frozen.embed`` takes it.
        dev: chooses the epoch. Without it, the last one is kept.

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
        if problem.kind == "regression":  # the head learns in units of the targets' spread, from their mean
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
        history = frozen_loop.run(both, len(targets), loss_of, recipe, None if dev is None else score)
    with torch.no_grad():
        head.weight.mul_(scale)
        head.bias.mul_(scale).add_(shift)
    return trained, history


def search(
    make: Callable[[], nn.Module],
    part: Part,
    dev: Part,
    problem: Problem,
    recipe: Recipe = DEFAULT,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    dropouts: Sequence[float] = DROPOUTS,
) -> Found:
    """``train`` with every learning rate and dropout; the best score on ``dev`` decides, and of equal ones the first.

    Args:
        make: a fresh module, called once for each trial under the recipe's seed: all start from the same weights.

    Raises:
        ValueError, TypeError: as ``train``; or there is nothing to try.
    """
    if not learning_rates or not dropouts:
        raise ValueError("learning_rates, dropouts: expected at least one of each, got none")
    tried = [recipe._replace(learning_rate=r, dropout=d) for r, d in itertools.product(learning_rates, dropouts)]
    for one in tried:
        check(problem, one)
    trials: list[Trial] = []
    best: tuple[Trial, Trained] | None = None
    for one in tried:
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(one.seed)
            module = make().to(part.features.pooled.device)
        trained, history = train(module, part, problem, one, dev=dev)
        trial = Trial(one.learning_rate, one.dropout, history, time.perf_counter() - start)
        trials.append(trial)
        if best is None or frozen_loop.order(history.score) > frozen_loop.order(best[0].history.score):
            best = trial, trained
    assert best is not None
    return Found(trials, *best)


def check(problem: Problem, recipe: Recipe) -> None:
    """ValueError or TypeError where a number of the recipe, or the problem, is out of range."""
    frozen_loop.check(recipe)
    validate.number("dropout", recipe.dropout)
    if not 0 <= recipe.dropout < 1:
        raise ValueError(f"dropout: expected a number from 0 to below 1, got {recipe.dropout}")
    validate.option("kind", problem.kind, PROBLEMS)
    validate.positive_int("outputs", problem.outputs)
    if problem.kind == "single_label_classification" and problem.outputs < 2:
        raise ValueError(f"outputs: expected two or more classes, got {problem.outputs}")
    if problem.kind == "regression" and problem.outputs != 1:
        raise ValueError(f"outputs: expected 1 for a regression, got {problem.outputs}")


def _check_part(name: str, part: Part, problem: Problem) -> None:
    count, targets = len(part.features.pooled), part.targets
    several = problem.kind == "multi_label_classification"
    expected = [count, problem.outputs] if several else [count]
    if list(targets.shape) != expected:
        raise ValueError(f"{name}: expected targets {expected} of {count} texts, got {list(targets.shape)}")
    if count < 2:
        raise ValueError(f"{name}: expected two or more texts, got {count}")
    if problem.kind == "single_label_classification":
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

"""The loop that every training behind a frozen encoder runs: epochs over rows in a random order, AdamW with the prior's own
learning rate, the best state kept, and an end where the score no longer rises."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import validate
from .tools.recipe import PRIORS


class Pace(Protocol):
    """What the loop reads of a recipe."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def prior_learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def patience(self) -> int | None: ...
    @property
    def seed(self) -> int: ...


class Epoch(NamedTuple):
    """An epoch that ended; number 0 is the state before the first."""

    number: int
    step: int  # of the optimizer, counted from the beginning
    loss: float | None  # the mean of its batches; None before the first epoch
    score: float | None  # on the dev part; None without one


Told = Callable[[Epoch], None]


class History(NamedTuple):
    """Mean loss of each epoch; the dev score before the first epoch and after each; the epoch whose state was kept; how many
    steps there were in all."""

    losses: list[float]
    scores: list[float]
    kept: int
    steps: int

    @property
    def rising(self) -> bool:
        """Whether the last epoch was kept."""
        return self.kept == len(self.losses)

    @property
    def score(self) -> float:
        """The kept epoch's; NaN without scores."""
        return self.scores[self.kept] if self.scores else math.nan


def check(pace: Pace) -> None:
    """ValueError or TypeError where a number of a recipe is out of range."""
    for name in ("epochs", "batch_size"):
        validate.positive_int(name, getattr(pace, name))
    for name in ("learning_rate", "prior_learning_rate"):
        validate.positive_number(name, getattr(pace, name))
    if pace.patience is not None:
        validate.positive_int("patience", pace.patience)


def order(score: float) -> float:
    """A score for comparison. NaN, the correlation of identical embeddings, ranks below every number."""
    return -math.inf if math.isnan(score) else score


def run(
    module: nn.Module,
    count: int,
    loss_of: Callable[[Tensor], Tensor],
    pace: Pace,
    score: Callable[[], float] | None = None,
    told: Told = lambda _: None,
) -> History:
    """Train ``module`` in place, and leave it in eval mode.

    Args:
        count: of the examples.
        loss_of: the loss of a batch, from the numbers of its examples, int64 [B] on the CPU.
        score: called before the first epoch and after each; the epoch with the highest score is kept. Without it, the last one.
        told: called with each epoch as it ends, and before the first one with its score.

    Raises:
        ValueError: the training diverged, or patience is set without ``score``.
    """
    if pace.patience is not None and score is None:
        raise ValueError("patience: expected dev, whose score it waits for")
    # A batch of one has no batch statistics and no negatives, so a last batch that is less than half full is dropped.
    size = min(pace.batch_size, count)
    validate.batch_for_norm("batch_size", size, module)
    generator = torch.Generator().manual_seed(pace.seed)
    optimizer = optimizer_of(module, pace)
    losses: list[float] = []
    scores = [] if score is None else [score()]
    if scores:
        told(Epoch(0, 0, None, scores[0]))
    best, kept, steps = None, 0, 0
    for epoch in range(1, pace.epochs + 1):
        module.train()
        of_batches = []
        for chosen in torch.randperm(count, generator=generator).split(size):
            if 2 * len(chosen) < size:
                continue
            loss = loss_of(chosen)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            of_batches.append(loss.detach())
        losses.append(torch.stack(of_batches).mean().item())
        steps += len(of_batches)
        module.eval()
        if score is None:
            kept = epoch
            told(Epoch(epoch, steps, losses[-1], None))
            continue
        scores.append(score())
        told(Epoch(epoch, steps, losses[-1], scores[-1]))
        if best is None or order(scores[-1]) > order(scores[kept]):
            best, kept = copy.deepcopy(module.state_dict()), epoch
        if pace.patience is not None and epoch - kept >= pace.patience:
            break
    if best is not None:
        module.load_state_dict(best)
    validate.finite_state("module", module)
    return History(losses, scores, kept, steps)


def optimizer_of(module: nn.Module, pace: Pace) -> torch.optim.Optimizer:
    """AdamW. Weight decay is of matrices alone; block prior and gate scale have their own learning rate."""
    priors: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in PRIORS:
            priors.append(parameter)
        else:
            (matrices if parameter.dim() > 1 else others).append(parameter)
    groups = [
        {"params": matrices, "lr": pace.learning_rate, "weight_decay": pace.weight_decay},
        {"params": others, "lr": pace.learning_rate, "weight_decay": 0.0},
        {"params": priors, "lr": pace.prior_learning_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])

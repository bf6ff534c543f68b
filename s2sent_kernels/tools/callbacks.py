"""What both trainers are called back for. Needs the extra train."""

from __future__ import annotations

from typing import Any

from ..files import importing
from . import processes
from .recipe import Recipe

with importing("transformers", "train"):
    from transformers import EarlyStoppingCallback, TrainerCallback


class _OwnDropout(TrainerCallback):
    """A resumed training restores the random numbers of each process later."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        processes.seed_dropout(args.seed)


def callbacks_of(recipe: Recipe) -> list[TrainerCallback]:
    return [_OwnDropout(), *([] if recipe.patience is None else [EarlyStoppingCallback(recipe.patience)])]

"""How encoder and selector are trained together. Needs no extra, so that the command line can print the defaults."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import validate

PRECISIONS = ("float32", "bfloat16", "float16")  # the latter two by autocast
LOSSES = ("cosent", "cosine")  # of scored pairs
PRIORS = ("block_prior", "gate_scale")  # parameters with the prior's learning rate
REPORTERS = ("tensorboard", "wandb")  # libraries that the trainers know
DROPOUT = 0.1  # of a classifier's embedding, before the head
GATE_SCALE = 4.0  # where the gate scale starts


class Recipe(NamedTuple):
    epochs: int = 3
    batch_size: int = 64
    learning_rate: float = 3e-5  # of the encoder
    selector_learning_rate: float = 1e-3  # the selector is untrained, the encoder is not
    prior_learning_rate: float = 1e-2  # of PRIORS, which move much further than a weight
    temperature: float = 0.05
    warmup: float = 0.1  # fraction of all steps
    accumulation: int = 1  # batches a step
    precision: str = "float32"  # one of PRECISIONS
    patience: int | None = None  # epochs without a better dev score before training stops
    seed: int = 0
    mini_batch: int | None = None  # examples that the encoder runs on at once, of a contrastive batch; None: the batch
    report_to: str | None = None  # one of REPORTERS; changes nothing that is computed
    # Without a checkpoint, after which there is one within an epoch, too; 0: at the ends of epochs alone. Changes nothing.
    save_minutes: float = 10.0

    def computed(self) -> dict[str, Any]:
        """The fields that the result depends on."""
        return {name: value for name, value in self._asdict().items() if name not in ("report_to", "save_minutes")}


DEFAULT = Recipe()


def check(recipe: Recipe) -> None:
    """ValueError or TypeError where a number that every training reads is out of range."""
    for name in ("epochs", "batch_size", "accumulation"):
        validate.positive_int(name, getattr(recipe, name))
    for name in ("selector_learning_rate", "prior_learning_rate"):
        validate.positive_number(name, getattr(recipe, name))
    for name in ("learning_rate", "save_minutes"):
        validate.at_least_zero(name, getattr(recipe, name))
    validate.option("precision", recipe.precision, PRECISIONS)

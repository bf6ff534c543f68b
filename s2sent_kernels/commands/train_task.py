"""What the ways of training share: the options that were given, in one record, and what a training prints as it goes and at its
end."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import __version__, families, validate, waiting
from ..frozen_loop import Epoch, History, order
from ..selector import S2SentSelector
from ..tools import columns, examples, labelled, processes, tables
from ..tools.columns import Columns
from ..tools.history import Line
from ..tools.recipe import GATE_SCALE
from . import common
from .common import UserError

CONTRASTIVE, STS, CLASSIFICATION = TASKS = ("contrastive", "sts", "classification")
MAX_LENGTH = 256  # tokens, of an encoder whose folder does not say
CACHE = "s2sent_cache"  # the default folder
REMEDIES = {  # of a loss that says nothing
    CONTRASTIVE: "harder negatives (a column negative), a larger --batch-size or a higher --temperature leave more",
    STS: "more pairs, or with --loss cosent a higher --temperature, leave more",
    CLASSIFICATION: "more data, a higher --dropout or fewer --epochs may do better",
}
_READS = (  # columns that a task needs
    (CONTRASTIVE, {"anchor", "positive"}),
    (STS, {"score", *labelled.PAIR}),
    (CLASSIFICATION, {"label", *labelled.TEXT}),
    (CLASSIFICATION, {"label", *labelled.PAIR}),
)


def another_task(error: tables.WrongColumns, task: Task) -> str | None:
    """The error of ``--data`` whose columns are those of another task, which was not asked for."""
    names = set(error.names)
    others = [kind for kind, needed in _READS if kind != task.kind and needed <= names]
    if not others or error.path != task.given["data"]:
        return None
    return f"{error.said}, as --task {others[0]} reads them"


class Stage:
    """How far a frozen training is, for what is said where it is interrupted."""

    encoded = False  # all texts are


class Used(NamedTuple):
    """What a training was given."""

    examples: int
    data: str  # digests, by which other texts, labels and scores are told from these
    dev: str | None

    @classmethod
    def of(cls, examples: int, data: Any, dev: Any) -> Used:
        from ..tools.resuming import digest

        return cls(examples, digest(data), None if dev is None else digest(dev))

    def entries(self) -> dict[str, Any]:
        """Those of a model's configuration."""
        return {"examples": self.examples, "digests": {"data": self.data, "dev": self.dev}}


class Task(NamedTuple):
    """The options of `s2sent train`."""

    kind: str  # one of TASKS
    given: Mapping[str, Any]  # those that were given, by name
    output: Path
    stage: Stage

    @property
    def frozen(self) -> bool:
        return self.given["freeze_encoder"]

    @property
    def pooling(self) -> str:
        return self.given["pooling"]

    @property
    def max_length(self) -> int:
        """Tokens at which texts are cut in training and, since the result's folder says so, ever after."""
        found = common.within(self.given.get("max_length"), common.max_length(self.given.get("model")))
        return MAX_LENGTH if found is None else found

    @property
    def blocks(self) -> str | list[int] | None:
        return self.given.get("blocks")

    @property
    def cache(self) -> str:
        return self.given.get("cache", CACHE)

    @property
    def verify_cache(self) -> bool:
        return "verify_cache" in self.given

    @property
    def columns(self) -> Columns:
        """What the options say of the columns of ``--data``. ValueError where they are broken."""
        known = {CONTRASTIVE: examples.COLUMNS, STS: labelled.SCORED, CLASSIFICATION: labelled.LABELLED}[self.kind]
        named, ignored = self.given.get("columns"), self.given.get("ignore_columns")
        return Columns(
            {} if named is None else columns.parse(named, known, "negative" if self.kind == CONTRASTIVE else None),
            [] if ignored is None else columns.names(ignored),
            waiting.say if processes.is_first() else None,
            self.given.get("format"),
        )

    @property
    def dev_columns(self) -> Columns:
        """The same of ``--dev``, a table like ``--data``; but of scored pairs where that has none."""
        return Columns(
            {} if self.kind == CONTRASTIVE else self.columns.named, format=self.given.get("format"), judged=False
        )

    @property
    def device(self) -> torch.device:
        name, rank = self.given.get("device"), os.environ.get("LOCAL_RANK")
        if processes.count() > 1 and name is not None and name.startswith("cuda:") and name != f"cuda:{rank}":
            raise UserError(
                f"--device: expected cuda, of which process {rank} of this machine takes its own, got {name}"
            )
        return common.device_of(name)

    def several(self, name: str) -> list[Any] | None:
        """The values of an option that takes several, or None where it was not given."""
        return self.given.get(name)

    def one(self, name: str) -> dict[str, Any]:
        """Such an option with its one value, or nothing: an argument of a recipe's ``_replace``."""
        return {name: self.given[name][0]} if name in self.given else {}

    def fields(self, recipe: Any) -> dict[str, Any]:
        """The given fields of a recipe that take one value."""
        return {
            name: self.given[name]
            for name in recipe._fields
            if name in self.given and not isinstance(self.given[name], list)
        }

    def provenance(self, recipe: Any, used: Used) -> dict[str, Any]:
        """How a model was made, for its configuration. No times: the same training writes the same bytes."""
        encoder = self.given.get("model") or common.BUNDLED
        return {
            "version": __version__,
            "encoder": encoder,
            "task": self.kind,
            "freeze_encoder": self.frozen,
            "recipe": recipe._asdict(),
            **used.entries(),
        }

    def selector_arguments(self, size: int) -> dict[str, Any]:
        """Those of S2SentSelector, for an encoder of ``size`` features."""
        prior = not self.given["no_prior"]
        scale = GATE_SCALE if prior and not self.given["no_gate_scale"] else None
        return {
            "bottleneck": self.given.get("bottleneck") or max(1, size // 12),
            "frequencies": self.given["frequencies"],
            "gate_norm": None if self.given["no_norm"] else "batch",
            "block_prior": prior,
            "gate_scale": self.given.get("gate_scale", scale),
        }

    def judge(self) -> int | None:
        """What can be told by the encoder's configuration, before its weights are loaded: its D, or None where it does not say.

        Raises:
            ValueError, TypeError: there are no such blocks, the selector cannot be made, or a batch of one example has no
                statistics.
            UserError: texts would be cut behind what the encoder's folder says.
        """
        _ = self.max_length  # for its error
        sizes = common.sizes(self.given.get("model"))
        if sizes is None or sizes.features is None:
            return None
        blocks = families.indices(self.blocks, sizes.depth)
        with torch.device("meta"):
            selector = S2SentSelector(sizes.features, len(blocks), **self.selector_arguments(sizes.features))
        validate.batch_for_norm("batch_size", self.given.get("batch_size", 2), selector)
        return sizes.features


class Pace:
    """In its ``with`` block says on standard error how far frozen trainings are, where an epoch of theirs lasts. Called with each
    epoch.

    Args:
        recipes: of the trainings, one after another.
        what: is trained, where that is not what was asked for.
    """

    def __init__(self, recipes: Sequence[Any], what: str = "") -> None:
        self._planned = [recipe.epochs for recipe in recipes]
        self._prefix = f"{what}: " if what else ""
        self._trial = self._epoch = 0  # in work, from 0; those of it that ended
        self._count = 0  # epochs that ended, of all
        self._begun = self._ended = waiting.clock()
        self.lines = waiting.Lines(self._line, waiting.PROGRESS_EVERY)

    def __call__(self, recipe: Any, epoch: Epoch) -> None:
        if epoch.number <= self._epoch and self._count:  # the next training begins
            self._trial, self._epoch = self._trial + 1, 0
        self._count += epoch.number - self._epoch
        self._epoch, self._ended = epoch.number, waiting.clock()
        self.lines.look()

    def _line(self) -> str:
        planned = self._planned[self._trial]
        trial = f"trial {self._trial + 1} of {len(self._planned)}, " if len(self._planned) > 1 else ""
        said = f"{self._prefix}{trial}epoch {min(self._epoch + 1, planned)} of {planned}"
        if not self._count:
            return f"{said} ..."
        left = sum(self._planned[self._trial :]) - self._epoch
        seconds = round((self._ended - self._begun) / self._count * left)
        return f"{said}, {seconds // 60:02}:{seconds % 60:02} left"

    def __enter__(self) -> Pace:
        self._begun = self._ended = waiting.clock()
        self.lines.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.lines.__exit__(*error)


class Epochs(Pace):
    """Prints each epoch of a frozen training as it ends, and keeps them for its history. Of several trials, each of which has a
    line at its end, it prints the epochs that scored more than all before.

    Args:
        varied: the fields of a recipe that tell trials apart.
    """

    def __init__(self, recipes: Sequence[Any], varied: tuple[str, ...]) -> None:
        super().__init__(recipes)
        self.varied = varied if len(recipes) > 1 else ()
        self.history: list[Line] = []
        self._best = -math.inf

    def __call__(self, recipe: Any, epoch: Epoch) -> None:
        trial = {name: getattr(recipe, name) for name in self.varied}
        self.history.append(Line(epoch.step, epoch.number, epoch.loss, epoch.score, trial))
        better = epoch.score is None or order(epoch.score) > self._best
        if epoch.score is not None and epoch.loss is not None:
            self._best = max(self._best, order(epoch.score))
        if epoch.loss is not None and (better or not self.varied):
            score = "" if epoch.score is None else f", dev {epoch.score:.2f}"
            self.lines.heard()
            print(f"epoch {epoch.number}: loss {epoch.loss:.4f}{score}", flush=True)
        super().__call__(recipe, epoch)


def print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)


def print_trial(recipe: Any, history: History, names: tuple[str, ...], what: str) -> None:
    """A line of what a trial varied and of its best epoch."""
    values = {name.replace("_", " "): getattr(recipe, name) for name in names}
    varied = ", ".join(
        f"{name} {value if isinstance(value, int) else format(value, 'g')}" for name, value in values.items()
    )
    print(f"{varied}: {what} {history.score:.2f} (epoch {history.kept} of {len(history.losses)})", flush=True)

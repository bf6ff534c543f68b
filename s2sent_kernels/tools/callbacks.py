"""What both trainers are called back for, and how they say how far they are. Needs the extra train."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic as clock
from typing import Any

from .. import waiting
from ..files import PROGRESS_EVERY, importing, on_terminal
from . import processes
from .recipe import Recipe

with importing(None, "train"):
    from tqdm import tqdm
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback


class _OwnDropout(TrainerCallback):
    """A resumed training restores the random numbers of each process later."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        processes.seed_dropout(args.seed)


class _LossOfEachEpoch(TrainerCallback):
    """The log has a loss at the end of each epoch, where the checkpoints are: a training that goes on from one then logs what an
    uninterrupted one does, and no mean is over steps of two epochs."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        control.should_log = True


class _SavesWithinEpochs(TrainerCallback):
    """A checkpoint after so many minutes without one, at the next step at which a loss is logged: a training that goes on from it
    then logs what an uninterrupted one does. An epoch's last step is left to its end: a training that goes on from there begins
    with the next epoch, and this one must have been evaluated."""

    def __init__(self, minutes: float) -> None:
        super().__init__()
        self._seconds = 60 * minutes
        self._saved = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._saved = clock()

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._saved = clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if control.should_log and not float(state.epoch).is_integer():  # the same in every process
            due = clock() - self._saved >= self._seconds
            control.should_save = processes.of_first(due, args.device) or control.should_save


class _OrderOfEachEpoch(TrainerCallback):
    """Each epoch has an order of its own, also where a training goes on within it: the trainer then wraps the samplers, and no
    longer tells all of them the epoch's number."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        for sampler in _samplers(others["train_dataloader"].batch_sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(int(state.epoch or 0))


def _samplers(outer: Any) -> Iterator[Any]:
    while outer is not None:
        yield outer
        yield getattr(outer, "sampler", None)
        outer = getattr(outer, "batch_sampler", None)


def callbacks_of(recipe: Recipe) -> list[TrainerCallback]:
    found: list[TrainerCallback] = [_OwnDropout(), _OrderOfEachEpoch(), _LossOfEachEpoch()]
    if recipe.patience is not None:
        found.append(EarlyStoppingCallback(recipe.patience))
    if recipe.save_minutes:
        found.append(_SavesWithinEpochs(recipe.save_minutes))
    return found


def show(trainer: Any, score: str, factor: float = 1.0) -> None:
    """Put words in the place of the dictionaries that the trainer prints: beside its bar on a terminal, else by lines alone.

    Args:
        score: the name of the dev score in its log.
        factor: of that score.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback((Bar if on_terminal() else Lines)(score, factor))


class _Words:
    """Turns what a trainer logs into a line."""

    def __init__(self, score: str, factor: float = 1.0) -> None:
        super().__init__()
        self._score, self._factor = score, factor

    def words(self, state: Any, logs: Any) -> str | None:
        found = []
        if "loss" in logs:
            found.append(f"loss {float(logs['loss']):.4f}")
        if self._score in logs:
            found.append(f"dev {self._factor * float(logs[self._score]):.2f}")
        if not found:
            return None
        return f"epoch {state.epoch:.2f}, step {state.global_step:,} of {state.max_steps:,}: {', '.join(found)}"


class Bar(_Words, ProgressCallback):
    """The trainer's bar, which has the time left."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        line = self.words(state, logs or {})
        if line is not None and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line)


class Lines(_Words, TrainerCallback):
    """What is logged on standard output; on standard error how far it is, where nothing was said for PROGRESS_EVERY seconds;
    once soon, so that the time left is known."""

    def __init__(self, score: str, factor: float = 1.0) -> None:
        super().__init__(score, factor)
        self._begun = self._said = 0.0
        self._wait = PROGRESS_EVERY
        self._before = 0  # steps of an earlier call

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._begun = self._said = clock()
        self._wait = waiting.first(PROGRESS_EVERY)
        self._before = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        now = clock()
        if not state.is_world_process_zero or now - self._said < self._wait:
            return
        self._said, self._wait = now, PROGRESS_EVERY
        each = (now - self._begun) / max(1, state.global_step - self._before)
        left = tqdm.format_interval(each * (state.max_steps - state.global_step))
        waiting.say(f"step {state.global_step:,} of {state.max_steps:,}, {left} left")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        line = self.words(state, logs or {})
        if line is not None and state.is_world_process_zero:
            self._said = clock()
            print(line, flush=True)

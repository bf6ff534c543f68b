"""What both trainers are called back for, and how they say how far they are. Needs the extra train."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from time import monotonic as clock
from types import TracebackType
from typing import Any, NamedTuple

from torch import nn

from .. import waiting
from ..files import importing, on_terminal
from ..waiting import PROGRESS_EVERY
from . import processes
from .progress import Progress, drawn
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


class Dev(NamedTuple):
    """The dev part that a trainer scores."""

    texts: int
    module: nn.Module  # called with each batch of them
    rows: Callable[[Any], int]  # of a batch, from what ``module`` returns


def show(trainer: Any, score: str, factor: float = 1.0, dev: Dev | None = None) -> Display:
    """Put words in the place of the dictionaries that the trainer prints: beside its bar on a terminal, else by lines alone.

    Args:
        score: the name of the dev score in its log.
        factor: of that score.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    display = (Bar if on_terminal() else Lines)(score, factor, dev)
    trainer.add_callback(display)
    return display


class Display:
    """Turns what a trainer logs into lines, and tells how far its scoring of the dev part is. In a ``with`` block around all that
    the trainer does: an error ends it, too."""

    def __init__(self, score: str, factor: float = 1.0, dev: Dev | None = None) -> None:
        super().__init__()
        self._score, self._factor, self._dev = score, factor, dev

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """In here the dev part is scored. The first process speaks, as elsewhere."""
        if self._dev is None or not processes.is_first():
            yield
            return
        texts, module, rows = self._dev
        done = 0
        with Progress(texts, part="dev") as progress:

            def advance(_: nn.Module, given: Any, output: Any) -> None:
                nonlocal done
                more = min(rows(output), texts - done)
                done += more
                progress.advance(more, None)

            handle = module.register_forward_hook(advance)
            try:
                yield
            finally:
                handle.remove()

    def words(self, state: Any, logs: Any) -> str | None:
        found = []
        if "loss" in logs:
            found.append(f"loss {float(logs['loss']):.4f}")
        if self._score in logs:
            found.append(f"dev {self._factor * float(logs[self._score]):.2f}")
        if not found:
            return None
        return f"epoch {state.epoch:.2f}, step {state.global_step:,} of {state.max_steps:,}: {', '.join(found)}"


class Bar(Display, ProgressCallback):
    """The trainer's bar, drawn as those of texts are. A resumed training counts its own steps alone for the time left."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = drawn(state.max_steps, state.global_step, "steps")
        self.current_step = state.global_step

    def on_prediction_step(self, *given: Any, **named: Any) -> None:
        """``scoring`` has a bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        line = self.words(state, logs or {})
        if line is not None and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line)


class Lines(Display, TrainerCallback):
    """What is logged on standard output; on standard error how far it is, where nothing was said for PROGRESS_EVERY seconds."""

    def __init__(self, score: str, factor: float = 1.0, dev: Dev | None = None) -> None:
        super().__init__(score, factor, dev)
        self._lines = waiting.Lines(self._line, PROGRESS_EVERY)
        self._state: Any = None
        self._begun = self._ended = 0.0  # the training, and the last step
        self._before = 0  # steps of an earlier call
        self._open = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._state, self._before = state, state.global_step
        self._begun = self._ended = waiting.clock()
        if state.is_world_process_zero:
            self._open.enter_context(self._lines)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._ended = waiting.clock()
        if state.is_world_process_zero:
            self._lines.look()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        line = self.words(state, logs or {})
        if line is not None and state.is_world_process_zero:
            self._lines.heard()
            print(line, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._open.close()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        with self._lines.left_to_another(), super().scoring():
            yield

    def _line(self) -> str:
        step, steps = self._state.global_step, self._state.max_steps
        said = f"step {step:,} of {steps:,}"
        if step <= self._before:  # the first step is in work
            return f"{said} ..."
        left = (self._ended - self._begun) / (step - self._before) * (steps - step)
        return f"{said}, {tqdm.format_interval(left)} left"

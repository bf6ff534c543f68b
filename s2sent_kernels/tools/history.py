"""What a training was like: a line of JSON for each epoch or evaluation, and their curve as a picture beside it."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files import MissingPackage, require, write_atomically

FILE, PICTURE = "history.jsonl", "history.png"
MOST_CURVES = 8  # of which a picture has a legend


class Line(NamedTuple):
    """What is known at a step. ``loss``: the mean since the last line of this trial."""

    step: int  # of the optimizer
    epoch: float
    loss: float | None = None
    dev: float | None = None  # the score on the dev part; higher is better
    trial: Mapping[str, float] = {}  # what was varied, where several were tried

    def content(self) -> dict[str, Any]:
        """As JSON, which has no NaN: a number that is none is left out."""
        numbers = {"loss": self.loss, "dev": self.dev}
        known = {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}
        return {**self.trial, "step": self.step, "epoch": self.epoch, **known}


def of_trainer(log: Sequence[Mapping[str, Any]], score: str, factor: float = 1.0) -> list[Line]:
    """The lines of a trainer's ``state.log_history``, which it keeps in its checkpoints.

    Args:
        score: the name of the dev score in the log.
        factor: of that score.
    """
    found: dict[int, Line] = {}
    for entry in log:
        known: dict[str, Any] = {}
        if "loss" in entry:
            known["loss"] = float(entry["loss"])
        if score in entry:
            known["dev"] = factor * float(entry[score])
        if known:
            step = int(entry["step"])
            found[step] = found.get(step, Line(step, float(entry["epoch"])))._replace(**known)
    return list(found.values())


def write(folder: Path, lines: Sequence[Line], what: str | None) -> None:
    """Write both files into ``folder``. Without matplotlib the picture is left out, and standard error has a line.

    Args:
        what: the dev score, in words; None without one.
    """
    text = "".join(f"{json.dumps(line.content())}\n" for line in lines)
    write_atomically(folder / FILE, text.encode())
    try:
        write_atomically(folder / PICTURE, picture(lines, what))
    except MissingPackage as error:
        print(f"{PICTURE} is left out: {error}", file=sys.stderr)


def read(folder: Path) -> list[Line]:
    """The lines of a folder that ``write`` wrote, without their trials."""
    found = (json.loads(line) for line in (folder / FILE).read_text(encoding="utf-8").splitlines())
    return [Line(each["step"], each["epoch"], each.get("loss"), each.get("dev")) for each in found]


def of_best(lines: Sequence[Line]) -> str:
    """The epoch of the highest dev score, of equal ones the first, as " (epoch 2)"; empty where there is none."""
    scored = [line for line in lines if line.dev is not None]
    return f" (epoch {max(scored, key=lambda line: line.dev or 0.0).epoch:g})" if scored else ""


def last_loss(lines: Sequence[Line]) -> float | None:
    """The loss of the last line that has one."""
    return next((line.loss for line in reversed(lines) if line.loss is not None), None)


def picture(lines: Sequence[Line], what: str | None) -> bytes:
    """A PNG of loss and dev score by epochs, a curve for each trial.

    Raises:
        MissingPackage: matplotlib is missing; names the extra.
    """
    figure = require("matplotlib.figure", "matplotlib", "train").Figure(figsize=(7, 4), layout="constrained")
    panels = [("loss", "loss")] + ([] if what is None else [("dev", f"{what} on dev")])
    trials: dict[str, list[Line]] = {}
    for line in lines:
        name = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in line.trial.items())
        trials.setdefault(name, []).append(line)
    for place, (field, label) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        for name, some in trials.items():
            points = [(line.epoch, getattr(line, field)) for line in some if getattr(line, field) is not None]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name) if points else None
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        if place == 1 and 1 < len(trials) <= MOST_CURVES:
            axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()

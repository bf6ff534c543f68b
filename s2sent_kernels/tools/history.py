"""What a training was like: a line of JSON for each epoch or evaluation, and their curve as a picture beside it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files import MissingPackage, write_atomically
from . import pictures

FILE, PICTURE = "history.jsonl", "history.png"


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


def title_of(provenance: Mapping[str, Any] | None) -> str:
    """The title of the picture of a model, from what `s2sent train` records of it."""
    known = provenance or {}
    if "encoder" not in known:
        return ""
    frozen = known.get("freeze_encoder", False)
    return f"{known['encoder']}, {'the selector' if frozen else 'encoder and selector'} trained ({known['task']})"


def write(folder: Path, lines: Sequence[Line], what: str | None, title: str = "") -> None:
    """Write both files into ``folder``. Without matplotlib the picture is left out, and standard error has a line.

    Args:
        what: the dev score, in words; None without one.
        title: of the picture, as the model's name.
    """
    text = "".join(f"{json.dumps(line.content())}\n" for line in lines)
    write_atomically(folder / FILE, text.encode())
    try:
        write_atomically(folder / PICTURE, pictures.curves_picture(_curves(lines), what, title))
    except MissingPackage as error:
        print(f"{PICTURE} is left out: {error}", file=sys.stderr)


def _curves(lines: Sequence[Line]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By what was varied, the points of loss and dev score over epochs."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in lines:
        name = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in line.trial.items())
        curves = found.setdefault(name, {"loss": [], "dev": []})
        for field, value in (("loss", line.loss), ("dev", line.dev)):
            if value is not None:
                curves[field].append((line.epoch, value))
    return found


def read(folder: Path) -> list[Line]:
    """The lines of a folder that ``write`` wrote, without their trials."""
    found = (json.loads(line) for line in (folder / FILE).read_text(encoding="utf-8").splitlines())
    return [Line(each["step"], each["epoch"], each.get("loss"), each.get("dev")) for each in found]


def of_best(lines: Sequence[Line]) -> str:
    """The epoch of the highest dev score, of equal ones the first, as " (epoch 2)"; empty where there is none."""
    scored = _scored(lines)
    return f" (epoch {max(scored, key=_dev).epoch:g})" if scored else ""


def ends_best(lines: Sequence[Line]) -> bool:
    """Whether no dev score before the last one reaches it."""
    scored = _scored(lines)
    return bool(scored) and max(scored, key=_dev) is scored[-1]


def _scored(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line.dev is not None]


def _dev(line: Line) -> float:
    return line.dev or 0.0


def last_loss(lines: Sequence[Line]) -> float | None:
    """The loss of the last line that has one."""
    return next((line.loss for line in reversed(lines) if line.loss is not None), None)

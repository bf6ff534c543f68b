"""Trainings that were interrupted: the checkpoints in an output folder, which of them are whole, and whose they are. What both
trainers have in common here is that going on is one command, which works however the last one ended."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints import tensors
from ..files import locked, missing, remove_empty, write_atomically
from . import processes

CHECKPOINTS = "checkpoints"  # in the output folder, until the model is saved
_SETTINGS = "settings.json"  # of the training that wrote the checkpoints beside it
_LOCK = "lock"
_STATE = "trainer_state.json"  # the trainer writes it last
RUNS = "runs"  # what tensorboard reads; in the folder of checkpoints, then in the output folder
_DIGESTS = {  # settings that are kept as one, and what each is of
    "examples": "examples (data)",
    "dev": "examples to choose by (dev)",
    "labels": "labels",
    "parameters": "sizes of the model's weights",
}
_UNSAVED = "model-"  # a model before its files are moved into the output folder
# The file that is written last, so that a folder without it is no model.
OF_MODEL, OF_CLASSIFIER = "modules.json", "config.json"


class Start(NamedTuple):
    """Where a training goes on."""

    checkpoint: str | None = None  # None: at its beginning
    epochs: int | None = None  # that are all there will be, since patience was used up


def digest(content: Any) -> str:
    """Tells a training's texts, labels or scores from others."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def begun(output: Path) -> bool:
    """Whether there is a whole checkpoint in ``output``."""
    return _newest(output / CHECKPOINTS)[0] is not None


def is_training(output: Path) -> bool:
    """Whether the checkpoints in ``output`` are of a training, which says so in its first file."""
    return (output / CHECKPOINTS / _SETTINGS).exists()


def finished(output: Path, last: str) -> bool:
    """Whether ``output`` holds a model of this package, of which ``last`` was written last."""
    with contextlib.suppress(OSError, ValueError):
        return '"s2sent' in (output / last).read_text(encoding="utf-8")
    return False


def finished_frozen(output: Path) -> bool:
    """Whether ``output`` holds what a frozen training wrote, a selector or a classifier."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((output / OF_CLASSIFIER).read_text(encoding="utf-8"))
        whole = any(output.glob("*.safetensors"))
        return whole and isinstance(config, dict) and ("selector" in config or config.get("model_type") == "s2sent")
    return False


@contextlib.contextmanager
def own(output: Path, last: str, settings: dict[str, Any], resume: bool) -> Iterator[Start]:
    """Hold the folder of checkpoints in ``output`` for the training of these ``settings``. After an error before the first
    checkpoint, what this call made is removed; else the checkpoints stay until ``remove``.

    Args:
        last: the file without which ``output`` holds no model. One that is there is never trained over.

    Raises:
        ValueError: ``output`` holds a finished model; another process is at work; the checkpoints are of another training.
    """
    checkpoints = output / CHECKPOINTS
    if resume and finished(output, last):
        raise ValueError(f"resume: {output} holds a finished model already")
    if not processes.is_first():  # which holds the lock, and leaves whole checkpoints alone
        yield _start(checkpoints) if resume else Start()
        return
    made = missing(checkpoints)
    checkpoints.mkdir(parents=True, exist_ok=True)
    try:
        with locked(checkpoints / _LOCK, wait=False):
            try:
                if resume:
                    check_settings(output, settings)
                _sweep(checkpoints)
                start = _start(checkpoints) if resume else Start()
                if start.checkpoint is None:
                    write_atomically(checkpoints / _SETTINGS, json.dumps(settings, indent=1).encode())
                yield start
            except BaseException:
                if made and _newest(checkpoints)[0] is None:
                    shutil.rmtree(checkpoints)
                raise
    except BaseException:
        remove_empty(made)
        raise


def check_settings(output: Path, settings: dict[str, Any]) -> None:
    """ValueError where the checkpoints in ``output`` are of a training with other settings."""
    checkpoints = output / CHECKPOINTS
    note = checkpoints / _SETTINGS
    if not note.exists() and not any(checkpoints.glob("checkpoint-*")):
        return  # killed before it wrote anything
    try:
        known = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        known = {"processes": 1, "mini_batch": None, **known}  # checkpoints of earlier releases do not say
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{note}: cannot be read: {error}: remove {checkpoints} to train from the beginning"
        ) from error
    others = _differences(known, settings)
    if others:
        raise ValueError(
            f"resume: expected the settings that {checkpoints} was begun with: {'; '.join(others)}: repeat those to go on, or "
            "name another output folder to begin a training of its own"
        )


def _differences(known: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Each setting that is another, in words: of those that are kept as a digest only which."""
    found = []
    for name, value in settings.items():
        before = known.get(name)
        if name in known and before == value:
            continue
        if isinstance(before, dict) and isinstance(value, dict):
            found += _differences(before, {**dict.fromkeys(before, "nothing"), **value})
        elif name in _DIGESTS:
            found.append(f"other {_DIGESTS[name]}")
        else:
            found.append(f"{name} = {before if name in known else 'nothing'}, got {value}")
    return found


def _sweep(checkpoints: Path) -> None:
    """Remove what a killed process left half-written: the trainer's next files would mix with it."""
    for path, why in _newest(checkpoints)[1].items():
        print(f"{path}: is not whole, {why}: left out")
        shutil.rmtree(path)
    for path in checkpoints.glob(f"{_UNSAVED}*"):
        shutil.rmtree(path)


def _start(checkpoints: Path) -> Start:
    state, _ = _newest(checkpoints)
    if processes.is_first():
        print(f"training goes on from {'the beginning' if state is None else state['path']}")
        _find_best(state)
    if state is None:
        return Start()
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    stopped = bool(control.get("should_training_stop"))
    return Start(state["path"], round(state["epoch"]) if stopped else None)


def _find_best(state: dict[str, Any] | None) -> None:
    """The trainer notes the place of its best checkpoint, and keeps the last weights where it is not there: the output folder
    may have been moved since, or was named from another working directory."""
    if state is not None and state.get("best_model_checkpoint") is not None:
        path = Path(state.pop("path"))
        best = path.with_name(Path(state["best_model_checkpoint"]).name)
        content = json.dumps({**state, "best_model_checkpoint": str(best)}, indent=2, sort_keys=True) + "\n"
        write_atomically(path / _STATE, content.encode())
        state["path"] = str(path)


def _newest(checkpoints: Path) -> tuple[dict[str, Any] | None, dict[Path, str]]:
    """The trainer's state in the newest whole checkpoint, with its path, and why those after it are not whole."""
    broken: dict[Path, str] = {}
    found = [path for path in checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            return {**_whole(path), "path": str(path)}, broken
        except (OSError, ValueError) as error:
            broken[path] = str(error)
    return None, broken


def _whole(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state. ValueError or OSError where anything that going on reads is missing or half-written."""
    state = _read(checkpoint / _STATE)
    if not isinstance(state, dict) or not isinstance(state.get("epoch"), int | float):
        raise ValueError(f"{_STATE} holds no state of a trainer")
    ranks = processes.count()
    states = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    for name in ("optimizer.pt", "scheduler.pt", *states):
        if not zipfile.is_zipfile(checkpoint / name):
            raise ValueError(f"without a whole {name}")
    for path in checkpoint.rglob("*.json"):
        _read(path)
    _check_weights(checkpoint)
    best = state.get("best_model_checkpoint")
    if best is not None and Path(best).name != checkpoint.name:  # the folder may have been moved since
        _check_weights(checkpoint.with_name(Path(best).name))
    return state


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"without a whole {path.name}") from error


def _check_weights(checkpoint: Path) -> None:
    files = list(checkpoint.rglob("*.safetensors"))
    if not files:
        raise ValueError(f"{checkpoint.name} has no weights")
    for path in files:
        tensors.entries(path)


@contextlib.contextmanager
def unsaved(output: Path) -> Iterator[Path]:
    """A folder for a model before its files are moved into ``output``. What a killed process leaves there is removed by the
    next one."""
    with tempfile.TemporaryDirectory(prefix=_UNSAVED, dir=output / CHECKPOINTS) as temporary:
        yield Path(temporary)


def remove(output: Path) -> None:
    """Remove the checkpoints of a finished training. What says whose they are goes last: the model is whole, and whoever finds
    the rest of them knows what it was."""
    checkpoints = output / CHECKPOINTS
    mine = (checkpoints / _SETTINGS).exists()  # if not, only what is named as the trainer names it
    if mine and (checkpoints / RUNS).is_dir() and not (output / RUNS).exists():
        os.rename(checkpoints / RUNS, output / RUNS)
    for path in checkpoints.iterdir():
        if path.is_dir() and not path.is_symlink():
            if mine or re.fullmatch(rf"checkpoint-\d+|{_UNSAVED}\w+", path.name):
                shutil.rmtree(path)
        elif mine and path.name not in (_SETTINGS, _LOCK):
            path.unlink()
    (checkpoints / _SETTINGS).unlink(missing_ok=True)
    (checkpoints / _LOCK).unlink(missing_ok=True)
    remove_empty([checkpoints])


def remove_leftovers(output: Path, last: str) -> bool:
    """Whether ``output`` holds a finished model. Then what is left of its checkpoints is removed.

    Raises:
        ValueError: another process is writing there.
    """
    if not finished(output, last):
        return False
    if processes.is_first() and (output / CHECKPOINTS).is_dir():
        with locked(output / CHECKPOINTS / _LOCK, wait=False):
            remove(output)
    return True

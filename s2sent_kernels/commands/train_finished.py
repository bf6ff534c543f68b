"""Whether a finished result is what a command would train: what its folder says of how it was made, beside the options."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import families
from ..tools.recipe import LOSSES
from . import common
from .train_task import Task, Used

_NOT_OF_THE_RESULT = {"save_minutes", "report_to"}  # fields of a recipe
_SELECTOR = ("bottleneck", "frequencies", "gate_norm", "block_prior")  # the gate's scale is learned
_SWITCHES = {"gate_norm": "--no-norm", "block_prior": "--no-prior"}  # which leave it out
_OPTIONS = {"encoder": "model"}


def differences(task: Task, used: Callable[[Task], Used]) -> list[str]:
    """Each given option that the model in ``task.output`` was not made with, as it is typed, and whether the data are others.

    Args:
        used: what the options give to a training; reads the data.
    """
    made = _made(task.output)
    if made is None:
        return []
    recipe, selector = made.get("recipe") or {}, made.get("selector") or {}
    found = []
    for name, value in _wanted(task, recipe, made):
        before = recipe.get(name, made.get(name))
        one_of_several = isinstance(value, list) and before in value
        if not one_of_several and value != before:
            found.append(f"{common.option(_OPTIONS.get(name, name))} {_typed(name, before)}, got {_typed(name, value)}")
    if selector.get("hidden_size") is not None:
        wanted = task.selector_arguments(selector["hidden_size"])
        for name in _SELECTOR:
            if name in selector and selector[name] != wanted[name]:
                found.append(_said_of_selector(name, selector[name], wanted[name]))
    given = used(task)
    for name, digest in (("data", given.data), ("dev", given.dev)):
        if "digests" in made and made["digests"][name] != digest:  # models of earlier releases do not say
            found.append(f"other examples as {common.option(name)}")
    return found


def _typed(name: str, value: Any) -> str:
    """A value as it is given on the command line."""
    if isinstance(value, (list, tuple)):
        return ("," if name == "blocks" else " ").join(map(str, value))
    return "none" if value is None else str(value)


def _said_of_selector(name: str, before: Any, wanted: Any) -> str:
    """One of its arguments, by the option that decides on it."""
    if name not in _SWITCHES:
        return f"{common.option(name)} {before}, got {wanted}"
    switch = _SWITCHES[name]
    return f"{switch}, got none" if wanted else f"no {switch}, got it"


def _wanted(task: Task, recipe: Mapping[str, Any], made: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if "task" in made:
        yield "task", task.kind
    if "model" in task.given and "encoder" in made:
        yield "encoder", task.given["model"]
    if task.blocks is not None and "blocks" in made:
        sizes = common.sizes(task.given.get("model"))
        if sizes is not None:
            yield "blocks", list(families.indices(task.blocks, sizes.depth))
    if "pooling" in made:
        yield "pooling", task.given["pooling"]
    if "loss" in made:
        yield "loss", task.given.get("loss", LOSSES[0])
    for name in recipe:
        if name in task.given and name not in _NOT_OF_THE_RESULT:
            yield name, task.given[name]


def _made(output: Path) -> dict[str, Any] | None:
    """Encoder, task, recipe, blocks, pooling and the selector's arguments, those that are known; None if nothing is."""
    for path in (output / "config.json", *sorted(output.glob("*_S2SentPooling/config.json"))):
        with contextlib.suppress(OSError, ValueError):
            config = json.loads(path.read_text(encoding="utf-8"))
            if "recipe" in config:  # behind a frozen encoder
                return dict(config)
            if isinstance(config.get("provenance"), dict):
                own = {name: config[name] for name in ("blocks", "pooling") if config.get(name) is not None}
                selector = config.get("selector") or config.get("selector_arguments")
                return {**config["provenance"], **own, "selector": selector}
    return None

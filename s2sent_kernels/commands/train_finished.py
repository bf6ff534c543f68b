"""Whether a finished result is what a command would train: what its folder says of how it was made, beside the options."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import families
from . import common
from .train_task import Task

_NOT_OF_THE_RESULT = {"save_minutes", "report_to"}  # fields of a recipe
_SELECTOR = ("bottleneck", "frequencies", "gate_norm", "block_prior")  # the gate's scale is learned


def differences(task: Task) -> list[str]:
    """Each given option that the model in ``task.output`` was not made with, in words. Its data are not known."""
    made = _made(task.output)
    if made is None:
        return []
    recipe, selector = made.get("recipe") or {}, made.get("selector") or {}
    found = []
    for name, value in _wanted(task, recipe, made):
        before = recipe.get(name, made.get(name))
        one_of_several = isinstance(value, list) and before in value
        if not one_of_several and value != before:
            found.append(f"{name} = {before}, got {value}")
    if selector.get("hidden_size") is not None:
        wanted = task.selector_arguments(selector["hidden_size"])
        found += [
            f"{n} = {selector[n]}, got {wanted[n]}" for n in _SELECTOR if n in selector and selector[n] != wanted[n]
        ]
    return found


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

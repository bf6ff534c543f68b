"""Tasks of mteb, whose data come from the hub: each pooling in its turn as a model of that library."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

Embed = Callable[[Sequence[str]], Mapping[str, Tensor]]


def _mteb() -> Any:
    try:
        return importlib.import_module("mteb")
    except ImportError as error:
        raise ImportError(f"mteb cannot be imported ({error}): pip install 's2sent_kernels[mteb]'") from error


def model(embed: Embed, pooling: str) -> Any:
    """What ``mteb.evaluate`` takes: the embeddings of one pooling."""
    _mteb()
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta

    class Pooled(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty({"name": f"s2sent_kernels/{pooling.replace(' ', '-')}"})

        def encode(self, inputs: Any, **options: Any) -> Any:
            """[S, D] of a loader of batches, in its order."""
            return embed([text for batch in inputs for text in batch["text"]])[pooling].numpy()

    return Pooled()


def run(names: Sequence[str], embed: Embed) -> dict[str, dict[str, dict[str, float]]]:
    """Of each task each pooling's main score, times 100.

    Raises:
        ValueError: a task is not known or cannot be loaded; mteb's own words in one line.
    """
    mteb = _mteb()
    poolings = list(embed(["a text", "another"]))
    try:
        tasks = mteb.get_tasks(tasks=list(names))
    except (KeyError, ValueError) as error:
        raise ValueError(f"mteb: {error}") from error
    return score(tasks, embed, poolings)


def score(tasks: Sequence[Any], embed: Embed, poolings: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """``run`` on tasks that are there already."""
    mteb = _mteb()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for pooling in poolings:
        try:
            results = mteb.evaluate(model(embed, pooling), tasks, cache=None, show_progress_bar=False)
        except Exception as error:  # no network, no such data set: whatever the hub's client raises
            raise ValueError(f"mteb: {str(error).strip() or type(error).__name__}") from error
        for result in results.task_results:
            found.setdefault(result.task_name, {})[pooling] = {"main_score": 100 * float(result.get_score())}
    return found

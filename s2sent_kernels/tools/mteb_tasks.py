"""Tasks of mteb, whose data are on the hub. Each pooling is wrapped as a model of that library. Needs the extra mteb."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..files import require
from .evaluation import Embed


def _mteb() -> Any:
    return require("mteb", "mteb", "mteb")


def model(embed: Embed, pooling: str) -> Any:
    """The embeddings of one pooling as a model for ``mteb.evaluate``."""
    _mteb()
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta

    class Pooled(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty({"name": f"s2sent_kernels/{pooling.replace(' ', '-')}"})

        def encode(self, inputs: Any, **options: Any) -> Any:
            """[S, D] of a data loader's texts, in its order."""
            return embed([text for batch in inputs for text in batch["text"]])[pooling].numpy()

    return Pooled()


def run(names: Sequence[str], embed: Embed) -> dict[str, dict[str, dict[str, float]]]:
    """The main score of each pooling on each task, times 100.

    Raises:
        ValueError: a task is unknown or cannot be loaded; mteb's message in one line.
    """
    mteb = _mteb()
    poolings = list(embed(["a text", "another"]))
    try:
        tasks = mteb.get_tasks(tasks=list(names))
    except (KeyError, ValueError) as error:
        raise ValueError(f"mteb: {error}") from error
    return score(tasks, embed, poolings)


def score(tasks: Sequence[Any], embed: Embed, poolings: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """``run`` on task objects."""
    mteb = _mteb()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for pooling in poolings:
        try:
            results = mteb.evaluate(model(embed, pooling), tasks, cache=None, show_progress_bar=False)
        except Exception as error:  # no network, no such data set: the hub's client raises many kinds
            raise ValueError(f"mteb: {str(error).strip() or type(error).__name__}") from error
        for result in results.task_results:
            found.setdefault(result.task_name, {})[pooling] = {"main_score": 100 * float(result.get_score())}
    return found

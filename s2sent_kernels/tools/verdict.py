"""What a training brought: a table of its result beside what the encoder could do before, and a plain word where it lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import evaluation
from .baselines import ScalarMix
from .evaluation import MEAN_OF_LAST, SCALAR_MIX
from .scores import SPEARMAN as SPEARMAN
from .scores import correlations

SAYS_NOTHING = 1e-3  # a loss below it has hardly a gradient


class Row(NamedTuple):
    """A way to embed, and its score on the dev part, where higher is better."""

    name: str
    score: float


class Result(NamedTuple):
    """What was trained: its name in the words of a verdict, and the row of its best epoch."""

    name: str  # "selector"
    row: Row


def report(what: str, before: Sequence[Row], result: Result) -> list[str]:
    """The table, and after it one line for each row that the result does not reach.

    Args:
        what: the score, in words.
        before: the encoder's own mean pooling first, or whatever a training has to beat.
    """
    rows = [*before, result.row]
    width = max(len(row.name) for row in rows)
    lines = [f"on dev ({what}):", *(f"  {row.name:{width}}  {row.score:6.2f}" for row in rows)]
    for number, row in enumerate(before):
        if _order(result.row.score) >= _order(row.score):
            continue
        said = f"the trained {result.name} scores less than {_called(row.name)}"
        advice = ": do not use it, or train longer, or with a smaller learning rate" if number == 0 else ""
        lines.append(said + advice)
    return lines


def _order(score: float) -> float:
    """NaN, the correlation of equal embeddings, is below every number."""
    return -math.inf if math.isnan(score) else score


def _called(name: str) -> str:
    if name.startswith(MEAN_OF_LAST):
        return "the encoder's own mean pooling"
    if name.startswith(SCALAR_MIX):
        return "a scalar mix, one number for each block"
    return f"this: {name}"


def against_its_start(scores: Sequence[float], kept: int) -> list[str]:
    """A line about a training whose best epoch is no better than what it began with.

    Args:
        scores: on dev, before the first epoch and after each.
        kept: the best epoch.
    """
    if not scores or _order(scores[kept]) > _order(scores[0]):
        return []
    return [f"no epoch scored more than the selector before its training, {scores[0]:.2f}: try a smaller learning rate"]


def hint(loss: float | None, remedies: str) -> list[str]:
    """A line about a last loss that says nothing any more.

    Args:
        remedies: what would leave something to learn.
    """
    if loss is None or not loss < SAYS_NOTHING:
        return []
    return [f"the last loss, {loss:.1e}, is under {SAYS_NOTHING:g}: there is nothing left to learn from; {remedies}"]


def untouched(
    encoder: nn.Module,
    tokenizer: Any,
    dev: Sequence[tuple[str, str, float]],
    blocks: Sequence[int],
    pooling: str,
    max_length: int,
) -> dict[str, float]:
    """Spearman's correlation times 100 of the encoder as it is: the mean of its last block, and a scalar mix of ``blocks`` with
    equal weights. The random numbers of a training that follows stay what they were."""
    texts = [text for first, second, _ in dev for text in (first, second)]
    modules = {SCALAR_MIX: evaluation.Fusion(ScalarMix(len(blocks)), blocks)}
    with torch.random.fork_rng(devices=[]):
        found = evaluation.side_by_side(
            encoder, tokenizer, texts, modules, pooling=pooling, max_length=max_length, progress=True
        )
    return {name: _spearman(found[name], [gold for _, _, gold in dev]) for name in (MEAN_OF_LAST, SCALAR_MIX)}


def _spearman(embeddings: Tensor, gold: Sequence[float]) -> float:
    return correlations(F.cosine_similarity(embeddings[::2], embeddings[1::2]).tolist(), gold).spearman


def rows(scores: Mapping[str, float], mixed: str, alone: str = "before") -> list[Row]:
    """Those of the scores of MEAN_OF_LAST and SCALAR_MIX.

    Args:
        mixed, alone: how the scalar mix, or the mean, came to its score.
    """
    return [Row(f"{MEAN_OF_LAST}, {alone}", scores[MEAN_OF_LAST]), Row(f"{SCALAR_MIX}, {mixed}", scores[SCALAR_MIX])]

"""What a training brought: a table of its result beside what the encoder could do before, and a plain word where it lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..selector import S2SentSelector
from . import encoders, evaluation
from .baselines import ScalarMix
from .evaluation import MEAN_OF_LAST, SCALAR_MIX
from .scores import SPEARMAN as SPEARMAN
from .scores import correlations

UNTRAINED = "untrained selector"  # the row of what a training began with
SAYS_NOTHING = 1e-3  # a loss below it has hardly a gradient


class Row(NamedTuple):
    """A way to embed, and its score on the dev part, where higher is better."""

    name: str
    score: float


class Result(NamedTuple):
    """What was trained: its name in the words of a verdict, and the row of its best epoch."""

    name: str  # "selector"
    row: Row
    rising: bool  # the last epoch is the best one, so that more of them may be better


def report(what: str, before: Sequence[Row], result: Result) -> list[str]:
    """The table, and after it one line for each row that the result does not reach.

    Args:
        what: the score, in words.
        before: the encoder's own mean pooling first, or whatever a training has to beat; UNTRAINED is to be beaten, too, and
            the others to be reached.
    """
    rows = [*before, result.row]
    width = max(len(row.name) for row in rows)
    lines = [f"on dev ({what}):", *(f"  {row.name:{width}}  {row.score:6.2f}" for row in rows)]
    for number, row in enumerate(before):
        reached, wanted = _order(result.row.score), _order(row.score)
        if row.name == UNTRAINED:
            if reached <= wanted:
                start = f"the selector before its training, {row.score:.2f}"
                lines.append(f"no epoch scored more than {start}: try a smaller learning rate")
            continue
        if reached >= wanted:
            continue
        said = f"the trained {result.name} scores less than {_called(row.name)}"
        ways = "longer, or with a smaller learning rate" if result.rising else "with a smaller learning rate"
        lines.append(said + (f": do not use it, or train {ways}" if number == 0 else ""))
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


def hardly_trained(scores: Mapping[str, float], mix: nn.Module, steps: int) -> list[str]:
    """A line about a scalar mix that was trained, where it scores less than the mean of the last block: few steps move its
    weights little, and the selector seems good beside it."""
    if _order(scores[SCALAR_MIX]) >= _order(scores[MEAN_OF_LAST]):
        return []
    assert isinstance(mix, ScalarMix)
    weights = ", ".join(f"{weight:.2f}" for weight in mix.block_prior.detach().softmax(dim=0).tolist())
    many = f"{steps:,} step{'' if steps == 1 else 's'}"
    said = f"the scalar mix began with equal weights, was trained for {many} and has {weights}"
    return [f"{said}: more steps or a larger --prior-learning-rate may bring it further"]


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
    selector: S2SentSelector | None = None,
) -> dict[str, float]:
    """Spearman's correlation times 100 of the encoder as it is: the mean of its last block, a scalar mix of ``blocks`` with
    equal weights and, where one is given, a selector of them. The random numbers of a training that follows stay what they
    were."""
    texts = [text for first, second, _ in dev for text in (first, second)]
    modules = {SCALAR_MIX: evaluation.Fusion(ScalarMix(len(blocks)), blocks)}
    if selector is not None:
        modules[UNTRAINED] = evaluation.Fusion(selector, blocks)
    with torch.random.fork_rng(devices=[]), encoders.in_eval_mode(selector or encoder):
        found = evaluation.side_by_side(
            encoder, tokenizer, texts, modules, pooling=pooling, max_length=max_length, progress=True
        )
    return {name: _spearman(found[name], [gold for _, _, gold in dev]) for name in (MEAN_OF_LAST, *modules)}


def _spearman(embeddings: Tensor, gold: Sequence[float]) -> float:
    return correlations(F.cosine_similarity(embeddings[::2], embeddings[1::2]).tolist(), gold).spearman


def rows(scores: Mapping[str, float], mixed: str, alone: str = "before") -> list[Row]:
    """Those of the scores of MEAN_OF_LAST, of SCALAR_MIX and, where it is known, of UNTRAINED.

    Args:
        mixed, alone: how the scalar mix, or the mean, came to its score.
    """
    found = [Row(f"{MEAN_OF_LAST}, {alone}", scores[MEAN_OF_LAST]), Row(f"{SCALAR_MIX}, {mixed}", scores[SCALAR_MIX])]
    return found + ([Row(UNTRAINED, scores[UNTRAINED])] if UNTRAINED in scores else [])

"""Scores of embeddings: semantic textual similarity, and classification by logistic regression on frozen embeddings.

One pass of an encoder gives every pooling that is compared: a selector's, the mean of the last block, the average of the first
and the last, the average and a scalar mix of all blocks, and cls. The correlations are scipy's, the classifier scikit-learn's.

Files are tab-separated UTF-8 with a header line and no quoting:

    STS         split  score  sentence1  sentence2  [subset]
    transfer    split  label  text                            or      split  label  sentence1  sentence2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import families, waiting
from ..capture import BlockCapture
from ..files import require
from ..formula.call import Batch
from ..formula.tokens import Tokens
from ..selector import S2SentSelector
from . import encoders, tables
from .baselines import ScalarMix
from .columns import Columns
from .examples import of_split, read_rows, too_few
from .examples import splits as splits_of
from .labelled import PAIR, all_three, named_pairs
from .scores import Correlations, correlations

STRENGTHS = (0.1, 1.0, 10.0)  # scikit-learn's C, never chosen on the test split
FOLDS = 10
HELD_OUT = 0.1  # fraction of the training split on which C is chosen if a file has no split "dev"

MEAN_OF_LAST = "mean of last"
FIRST_LAST = "first-last average"
AVERAGE = "average of blocks"
CLS = "cls"
SCALAR_MIX = "scalar mix"
S2SENT = "s2sent"

Embed = Callable[[Sequence[str]], Mapping[str, Tensor]]  # texts to [S, D] for each pooling


class Pair(NamedTuple):
    sentence1: str
    sentence2: str
    score: float
    subset: str


class Labelled(NamedTuple):
    """A text, or a pair of texts, with its label."""

    texts: tuple[str, ...]
    label: str


class Accuracy(NamedTuple):
    """Times 100. F1 is that of label "1" if the labels are "0" and "1", else None."""

    accuracy: float
    f1: float | None


class Fusion(NamedTuple):
    """A selector or a scalar mix, and the encoder's blocks that it reads: by default the last ones."""

    module: S2SentSelector | ScalarMix
    blocks: Sequence[int] | None = None


# ---------------------------------------------------------------- files


def read_sts(path: str | Path, split: str | None = None, columns: Columns | None = None) -> list[Pair]:
    """The pairs of one split; by default of "test" where the file has a column split, else all, which ``columns.tell`` is told.

    Raises:
        ValueError: as ``read_rows``; a text is none; a score is no finite number (names the line); there is no such split, or it
            has fewer than two pairs, or only equal scores, for which a correlation is undefined.
    """
    found = []
    whole = read_rows(path, ("score", *PAIR), columns=columns)
    rows = of_split(path, whole, split, "test")
    for place, row in rows:
        score = tables.number(row.get("score"))
        if not math.isfinite(score):
            got = tables.shown(row.get("score", tables.ABSENT))
            raise ValueError(f"{path}: {place}: expected a number as score, got {got}")
        one, other = (tables.text(f"{path}: {place}: {name}", row.get(name, tables.ABSENT)) for name in PAIR)
        found.append(Pair(one, other, score, str(row.get("subset") or "")))
    if len(found) < 2:
        raise too_few(path, whole, rows)
    if not splits_of(path, whole) and columns is not None and columns.tell is not None:
        columns.tell(f"{path}: no column split: all {len(found):,} pairs are scored")
    if len({pair.score for pair in found}) < 2:
        raise ValueError(f"{path}: expected pairs with different scores, got {len(found)} of score {found[0].score:g}")
    return found


def read_transfer(path: str | Path, columns: Columns | None = None) -> dict[str, list[Labelled]]:
    """The texts of each split. Splits are "train", "test" and optionally "dev"; or "all", for cross-validation, as which a file
    without a column split is read, and ``columns.tell`` told.

    Raises:
        ValueError: as ``read_rows``; texts beside pairs; a text or a label is none; other splits, or fewer than two labels to
            train on.
    """
    found: dict[str, list[Labelled]] = {}
    named = named_pairs(columns)
    whole = read_rows(path, ("label",), ("text",), PAIR, columns=columns)
    splits = splits_of(path, whole)
    for place, row in whole:
        if {"text", *PAIR} <= row.keys() and named is None:
            raise all_three(path)
        names = PAIR if named or "text" not in row else ("text",)
        texts = tuple(tables.text(f"{path}: {place}: {name}", row.get(name, tables.ABSENT)) for name in names)
        if row.get("label") is None:
            got = tables.shown(row.get("label", tables.ABSENT))
            raise ValueError(f"{path}: {place}: label: expected a label, got {got}")
        found.setdefault(str(row["split"]) if splits else "all", []).append(Labelled(texts, str(row["label"])))
    if set(found) != {"all"} and not {"train", "test"} <= set(found) <= {"train", "dev", "test"}:
        raise ValueError(f"{path}: expected rows of splits train and test, or all, got {', '.join(sorted(found))}")
    labels = {item.label for item in found.get("all", found.get("train", []))}
    if len(labels) < 2:
        raise ValueError(f"{path}: expected at least two labels, got {', '.join(map(repr, labels))} in each row")
    if not splits and columns is not None and columns.tell is not None:
        columns.tell(f"{path}: no column split: classifiers are cross-validated over all {len(whole):,} rows")
    return found


# ---------------------------------------------------------------- embeddings


def side_by_side(
    encoder: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    modules: Mapping[str, Fusion | S2SentSelector | ScalarMix] | None = None,
    *,
    pooling: str = "mean",
    batch_size: int = 128,
    max_length: int | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Embeddings [S, D], float32 on the CPU, of every text by every pooling, from one pass over the encoder.

    Args:
        modules: by name, the poolings to add to MEAN_OF_LAST, FIRST_LAST, AVERAGE and CLS.
        pooling: over the tokens, of ``modules``.
        max_length: tokens at most. None: as many as the encoder takes.
    """
    kept = list(dict.fromkeys(texts))
    found: dict[str, Tensor] = {}
    with encoders.in_eval_mode(encoder), BlockCapture(encoder) as capture, torch.no_grad():
        readers = _readers(modules or {}, len(capture.blocks), families.hidden_size(encoder))
        batches = encoders.in_batches(encoders.longest_first(kept), batch_size)
        for rows, states, mask in encoders.state_batches(
            capture, tokenizer, kept, batches, max_length=max_length, progress=progress
        ):
            for name, values in _pooled(states, mask, readers, pooling).items():
                if name not in found:
                    found[name] = torch.empty(len(kept), values.shape[1])
                found[name][rows] = values.float().cpu()
    place = {text: row for row, text in enumerate(kept)}
    index = torch.tensor([place[text] for text in texts])
    return {name: values[index] for name, values in found.items()}


def _readers(modules: Mapping[str, Any], num_blocks: int, size: int | None) -> dict[str, Fusion]:
    """``modules`` with the indices of their blocks. Checked before the first text is encoded."""
    found = {}
    for name, given in modules.items():
        module, blocks = given if isinstance(given, Fusion) else Fusion(given)
        if not isinstance(module, (S2SentSelector, ScalarMix)):
            raise TypeError(f"modules: expected selectors and scalar mixes, got {type(module).__name__}")
        if module.num_blocks > num_blocks:
            raise ValueError(f"{name}: reads {module.num_blocks} blocks, got an encoder of {num_blocks}")
        if isinstance(module, S2SentSelector) and size is not None and module.hidden_size != size:
            raise ValueError(f"{name}: reads D = {module.hidden_size} features, got an encoder of {size}")
        chosen = families.indices(f"last:{module.num_blocks}" if blocks is None else blocks, num_blocks)
        found[name] = Fusion(module, chosen)
    return found


def _pooled(states: Sequence[Tensor], mask: Tensor, readers: Mapping[str, Fusion], pooling: str) -> dict[str, Tensor]:
    """[B, D] of a batch by every pooling, from the hidden states of all blocks."""
    tokens = Tokens.of(Batch(states, mask))
    mean, cls = (tokens.pooling_weights(name).float() for name in ("mean", "cls"))
    last = tokens.keep_real(states[-1].float())
    average = torch.stack([_weighted(mean, tokens.keep_real(u.float())) for u in states], dim=1)
    result = {
        MEAN_OF_LAST: average[:, -1],
        FIRST_LAST: (average[:, 0] + average[:, -1]) / 2,
        AVERAGE: average.mean(dim=1),
        CLS: _weighted(cls, last),
    }
    for name, (module, blocks) in readers.items():
        read = [states[block] for block in blocks or ()]
        if isinstance(module, S2SentSelector):
            result[name] = module.pool(read, mask, pooling=pooling)
        else:
            weights = tokens.pooling_weights(pooling).float()
            each = [_weighted(weights, tokens.keep_real(u.float())) for u in read]
            result[name] = module(torch.stack(each, dim=1))
    return result


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    return (weights[:, None] @ values)[:, 0]


# ---------------------------------------------------------------- scores


def sts(embed: Embed, pairs: Sequence[Pair]) -> dict[str, Correlations]:
    """For each pooling the correlations of cosine similarities with the gold scores."""
    gold = [pair.score for pair in pairs]
    result = {}
    for name, values in embed([text for pair in pairs for text in (pair.sentence1, pair.sentence2)]).items():
        result[name] = correlations(F.cosine_similarity(values[::2], values[1::2]).tolist(), gold)
    return result


def transfer(embed: Embed, splits: Mapping[str, Sequence[Labelled]]) -> dict[str, Accuracy]:
    """For each pooling the accuracy of logistic regression on frozen embeddings, by SentEval's protocol: the features of a pair
    are |u - v| and u * v; C is chosen on "dev", or on a tenth of the training split; "all" is cross-validated in ten folds."""
    items = [item for split in splits.values() for item in split]
    bounds, start = {}, 0
    for name, split in splits.items():
        bounds[name] = slice(start, start + len(split))
        start += len(split)
    width = len(items[0].texts)
    labels = [item.label for item in items]
    result = {}
    for name, values in embed([text for item in items for text in item.texts]).items():
        inputs = (
            values if width == 1 else torch.cat([(values[::2] - values[1::2]).abs(), values[::2] * values[1::2]], 1)
        )
        with waiting.told(f"fitting classifiers behind {name}"):
            predicted, expected = _predict(inputs.numpy(), labels, bounds)
        result[name] = _accuracy(predicted, expected)
    return result


def _predict(inputs: Any, labels: Sequence[str], bounds: Mapping[str, slice]) -> tuple[Any, Any]:
    import numpy

    selection = require("sklearn.model_selection", "scikit-learn", "evaluate")
    target = numpy.array(labels)
    if "all" in bounds:
        predicted = numpy.empty_like(target)
        folds = selection.StratifiedKFold(FOLDS, shuffle=True, random_state=0)
        for inside, outside in folds.split(inputs, target):
            predicted[outside] = _fit(inputs[inside], target[inside]).predict(inputs[outside])
        return predicted, target
    inside, outside = bounds["train"], bounds["test"]
    dev = bounds.get("dev")
    held = None if dev is None else (inputs[dev], target[dev])
    return _fit(inputs[inside], target[inside], held).predict(inputs[outside]), target[outside]


def _fit(inputs: Any, target: Any, held: tuple[Any, Any] | None = None) -> Any:
    linear = require("sklearn.linear_model", "scikit-learn", "evaluate")
    selection = require("sklearn.model_selection", "scikit-learn", "evaluate")
    rest, rest_target = inputs, target
    if held is None:
        rest, kept, rest_target, kept_target = selection.train_test_split(
            inputs, target, test_size=HELD_OUT, random_state=0, stratify=target
        )
        held = (kept, kept_target)

    def classifier(strength: float) -> Any:
        return linear.LogisticRegression(C=strength, max_iter=1000)

    best = max(STRENGTHS, key=lambda strength: classifier(strength).fit(rest, rest_target).score(*held))
    return classifier(best).fit(inputs, target)


def _accuracy(predicted: Any, expected: Any) -> Accuracy:
    metrics = require("sklearn.metrics", "scikit-learn", "evaluate")
    f1 = None
    if set(expected) <= {"0", "1"}:
        f1 = 100 * float(metrics.f1_score(expected, predicted, pos_label="1"))
    return Accuracy(100 * float(metrics.accuracy_score(expected, predicted)), f1)

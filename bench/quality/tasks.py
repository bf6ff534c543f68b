"""Section "tasks" of bench/quality/quality.py: fusions trained on a task behind a frozen encoder, each with a linear head.

All have the same search: every learning rate and dropout with the first seed, then the recipe that is best on the dev part with
the other seeds. The dev part chooses the epoch, too. Test parts choose nothing.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quality import fusions
from quality.data import MAX_LENGTH, load_encoder
from quality.train_selector import CONSTANT, GATE_SCALE, UNSCALED
from s2sent_kernels import S2SentSelector, cache, frozen, frozen_tasks
from s2sent_kernels.frozen_tasks import Part, Problem
from s2sent_kernels.tools import evaluation

TASKS = {"MR": "mr", "SST-2": "sst2", "TREC": "trec"}
MOST = 10_000  # training texts
FREQUENCIES, BOTTLENECK = 4, 32
CONCATENATION, ONE_COMPONENT = "concatenation", "s2sent, M = 1"


class Fusion(NamedTuple):
    make: Callable[[int, int], nn.Module]  # of N and D
    frequencies: int = FREQUENCIES  # M of f, which selectors alone read


def _selector(frequencies: int, scale: float | None) -> Fusion:
    def make(num_blocks: int, hidden_size: int) -> nn.Module:
        return S2SentSelector(
            hidden_size, num_blocks, BOTTLENECK, frequencies, block_prior=True, gate_scale=scale, backend="reference"
        )

    return Fusion(make, frequencies)


FUSIONS = {
    evaluation.MEAN_OF_LAST: Fusion(lambda n, d: fusions.MeanOfLast()),
    evaluation.AVERAGE: Fusion(lambda n, d: fusions.Average()),
    evaluation.SCALAR_MIX: Fusion(lambda n, d: frozen.ScalarMix(n)),
    CONSTANT: Fusion(fusions.ConstantGates),
    CONCATENATION: Fusion(lambda n, d: fusions.Concatenation()),
    UNSCALED: _selector(FREQUENCIES, None),
    ONE_COMPONENT: _selector(1, GATE_SCALE),
    evaluation.S2SENT: _selector(FREQUENCIES, GATE_SCALE),
}


class Task(NamedTuple):
    """Texts and classes of the train, dev and test part."""

    texts: list[str]
    classes: Tensor
    bounds: dict[str, Tensor]  # rows of each part
    outputs: int


def read(splits: dict[str, list[evaluation.Labelled]], most: int = MOST) -> Task:
    """A file without a test part gives a fifth for it, one without a dev part a tenth; both by a fixed shuffle."""
    shuffled = random.Random(0)
    parts = {name: list(items) for name, items in splits.items()}
    for items in parts.values():
        shuffled.shuffle(items)
    if "all" in parts:
        every = parts.pop("all")
        count = len(every) // 5
        parts = {"test": every[:count], "train": every[count:]}
    if "dev" not in parts:
        count = len(parts["train"]) // 10
        parts |= {"dev": parts["train"][:count], "train": parts["train"][count:]}
    parts["train"] = parts["train"][:most]
    items = [item for part in parts.values() for item in part]
    names = sorted({item.label for item in items})
    bounds, start = {}, 0
    for name, part in parts.items():
        bounds[name] = torch.arange(start, start + len(part))
        start += len(part)
    classes = torch.tensor([names.index(item.label) for item in items])
    return Task([item.texts[0] for item in items], classes, bounds, len(names))


def search(
    make: Callable[[], nn.Module], parts: dict[str, Part], problem: Problem, seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A row for each seed, of the recipe that is best on dev with the first one."""
    first = frozen_tasks.search(make, parts["train"], parts["dev"], problem, frozen_tasks.grid(seeds=seeds[:1]))
    tried = [
        {"learning_rate": trial.recipe.learning_rate, "dropout": trial.recipe.dropout, "dev": trial.history.score}
        for trial in first.trials
    ]
    for seed in seeds:
        found = first
        if seed != seeds[0]:
            recipe = first.best.recipe._replace(seed=seed)
            found = frozen_tasks.search(make, parts["train"], parts["dev"], problem, [recipe])
        module, best = found.trained.module, found.best
        yield {
            "seed": seed,
            "learning_rate": best.recipe.learning_rate,
            "dropout": best.recipe.dropout,
            "epoch": best.history.kept,
            "dev": best.history.score,
            "tried": tried,
            "accuracy": problem.score(found.trained.logits(parts["test"].features), parts["test"].targets),
            "features": found.trained.head.in_features,
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "seconds": sum(trial.seconds for trial in found.trials),
        }


def measure(options: Any) -> Iterator[dict[str, Any]]:
    encoder, tokenizer = load_encoder(options.model, options.device)
    index, count = options.part
    for name, file in list(TASKS.items())[index::count]:
        task = read(evaluation.read_transfer(options.data / f"transfer/{file}.tsv"), options.limit or MOST)
        settings = cache.Settings(token_frequencies=2, max_length=MAX_LENGTH)
        cached = cache.make(encoder, tokenizer, task.texts, options.cache, settings, progress=True)
        rows, num_blocks = cached.rows(task.texts), len(cached.blocks)
        problem = Problem("single_label_classification", task.outputs)
        for pooling, fusion in FUSIONS.items():
            every = frozen.Features.of(cached, num_blocks, fusion.frequencies).to(options.device)
            parts = {
                part: Part(every.take(rows[chosen].to(options.device)), task.classes[chosen].to(options.device))
                for part, chosen in task.bounds.items()
            }
            make = functools.partial(fusion.make, num_blocks, cached.hidden_size)
            for row in search(make, parts, problem, options.seeds):
                row |= {"task": name, "pooling": pooling, **{part: len(rows) for part, rows in task.bounds.items()}}
                told = {key: row[key] for key in ("seed", "learning_rate", "dropout", "epoch", "seconds")}
                print(f"{name}, {pooling}: {row['accuracy']:.2f} {told}", flush=True)
                yield row

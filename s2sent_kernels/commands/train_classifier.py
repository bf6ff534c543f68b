"""`s2sent train --task classification`: a selector and a head for labelled texts or pairs of texts, behind a frozen encoder or
with it. Both ways write an S2SentForSequenceClassification."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import cache, families, frozen, frozen_tasks, validate, waiting
from ..selector import S2SentSelector
from ..tools import evaluation, history, labelled, processes, recipe, verdict
from ..tools.baselines import ScalarMix
from ..tools.problems import CLASSES, LABELS, NUMBERS, SCORES, Problem
from . import common
from .common import UserError
from .train_task import REMEDIES, Epochs, Pace, Task, Used, print_lines, print_trial

VARIED = ("learning_rate", "dropout", "seed")  # with --freeze-encoder
TRAINED = "the best of the same trials"
ALWAYS = {  # what needs no text
    CLASSES: "always the most frequent label",
    LABELS: "always the labels of every second text",
    NUMBERS: "always the mean",
}


class _Data(NamedTuple):
    """What is trained on, what chooses, and the names of the head's outputs."""

    whole: labelled.Labelled  # of --data: the training's, and what is held out of it where there is no --dev
    train: labelled.Labelled
    dev: labelled.Labelled
    problem: Problem
    names: list[str]

    def targets(self, part: labelled.Labelled) -> Any:
        return labelled.targets(part, self.problem.kind, self.names)

    def used(self, task: Task) -> Used:
        data, dev = ([part.texts, part.labels] for part in (self.whole, self.dev))
        return Used.of(len(self.train.texts), data, dev if "dev" in task.given else None)


def run(task: Task) -> None:
    data = _read(task)
    task.judge()
    (_train_frozen if task.frozen else _fine_tune)(task, data)


def used(task: Task) -> Used:
    """What the options give to a training."""
    return _read(task).used(task)


def _read(task: Task) -> _Data:
    kind = task.given.get("problem_type", CLASSES)
    whole = labelled.read_labelled(task.given["data"], kind, task.given.get("split"), columns=task.columns)
    names = labelled.label_names(whole, kind)
    if "dev" in task.given:
        part, dev = (
            whole,
            labelled.read_labelled(task.given["dev"], kind, task.given.get("dev_split"), "dev", task.dev_columns),
        )
        if dev.pairs != part.pairs:
            wanted, got = labelled.said(part.pairs), labelled.said(dev.pairs)
            raise UserError(f"{dev.path}: expected {wanted}, as in {part.path}, got {got}")
    elif "dev_split" in task.given:
        raise UserError("--dev-split: expected --dev, whose split it names")
    else:
        part, dev = labelled.hold_out(whole)
    data = _Data(whole, part, dev, Problem(kind, len(names) or 1), names)
    data.targets(dev)  # for its error, before anything is encoded
    try:
        labelled.tell_apart(dev, kind)
    except ValueError as error:
        if "dev" in task.given:
            raise
        what = "no labels" if names else "equal numbers"
        raise UserError(f"{dev.path}: expected --dev, since the tenth to hold out has {what}") from error
    return data


def _train_frozen(task: Task, data: _Data) -> None:
    with waiting.told("importing transformers"):
        from ..tools import classifier

    common.check_writable(Path(task.cache), what="--cache")
    base = frozen_tasks.DEFAULT._replace(**task.fields(frozen_tasks.Recipe))
    recipes = frozen_tasks.grid(
        base,
        task.several("learning_rate") or frozen_tasks.LEARNING_RATES,
        task.several("dropout") or frozen_tasks.DROPOUTS,
        task.several("seed") or (base.seed,),
    )
    for one in recipes:
        frozen_tasks.check(data.problem, one)
    device = task.device
    encoder, tokenizer, _ = common.load_model(task.given.get("model"), device)
    blocks = families.indices(task.blocks, len(families.find_blocks(encoder)))
    arguments = task.selector_arguments(encoder.config.hidden_size)

    def make() -> S2SentSelector:
        return S2SentSelector(encoder.config.hidden_size, len(blocks), **arguments)

    validate.batch_for_norm("batch_size", base.batch_size, make())  # before anything is encoded
    settings = cache.DEFAULT._replace(
        blocks=blocks,
        pooling=task.pooling,
        max_length=task.max_length,
        token_frequencies=frozen.token_frequencies(make()),
    )
    # Sorted, so that the cache does not depend on which of them are held out. A file has texts or pairs, never both.
    texts: Any = sorted({*data.train.texts, *data.dev.texts})
    cached = cache.make(encoder, tokenizer, texts, task.cache, settings, progress=True, verify=task.verify_cache)
    task.stage.encoded = True

    def of(part: labelled.Labelled) -> frozen_tasks.Part:
        features = frozen.Features.of(cached, len(blocks), arguments["frequencies"], cached.rows(part.texts))
        return frozen_tasks.Part(features.to(device), data.targets(part).to(device))

    train, dev = of(data.train), of(data.dev)
    epochs = Epochs(recipes, VARIED)
    what = SCORES[data.problem.kind]

    def say(trial: frozen_tasks.Trial) -> None:
        print_trial(trial.recipe, trial.history, VARIED, f"dev {what}")

    with epochs:
        found = frozen_tasks.search(make, train, dev, data.problem, recipes, told=epochs, ended=say)
    print("kept: ", end="")
    say(found.best)

    def other(name: str, num_blocks: int, parts: tuple[frozen_tasks.Part, frozen_tasks.Part]) -> frozen_tasks.Found:
        """The trials of a scalar mix in the place of the selector: of one block that block itself."""
        mix = partial(ScalarMix, num_blocks)
        with Pace(recipes, f"{name}, to compare with") as pace:
            return frozen_tasks.search(mix, *parts, data.problem, recipes, told=pace)

    means = [_mean_of_last(cached, encoder, tokenizer, part, task.max_length) for part in (data.train, data.dev)]
    first, second = (
        part._replace(features=frozen.Features(mean, mean[:, None]).to(device))
        for part, mean in zip((train, dev), means, strict=True)
    )
    others = {
        evaluation.MEAN_OF_LAST: other(evaluation.MEAN_OF_LAST, 1, (first, second)),
        evaluation.SCALAR_MIX: other(evaluation.SCALAR_MIX, len(blocks), (train, dev)),
    }
    scores = {name: each.best.history.score for name, each in others.items()}
    best = found.best.history
    row = verdict.Row(f"trained selector (epoch {best.kept})", best.score)
    result = verdict.Result("selector", row, best.rising)
    print_lines(verdict.report(f"{what} of a head behind each", verdict.rows(scores, TRAINED, TRAINED), result))
    mixed = others[evaluation.SCALAR_MIX]
    print_lines(verdict.hardly_trained(scores, mixed.trained.module, mixed.best.history.steps))
    print_lines(verdict.hint(best.losses[-1], REMEDIES[task.kind]))
    fusion = classifier.Fusion(blocks, task.pooling, arguments)
    model = classifier.make(
        encoder, fusion, data.problem, data.names, found.best.recipe.dropout, pairs=data.train.pairs
    )
    model.config.provenance = task.provenance(found.best.recipe, data.used(task))
    model.model.selector.load_state_dict(found.trained.module.state_dict())
    model.classifier.load_state_dict(found.trained.head.state_dict())
    limit = families.max_length(encoder, tokenizer, task.max_length)
    classifier.write(model, tokenizer, task.output, limit)
    history.write(task.output, epochs.history, what, history.title_of(model.config.provenance))


def _mean_of_last(
    cached: cache.BlockCache, encoder: Any, tokenizer: Any, part: labelled.Labelled, max_length: int
) -> torch.Tensor:
    """[S, D]: the mean of the encoder's last block, from the cache where that is in it."""
    if cached.blocks[-1] == len(families.find_blocks(encoder)) - 1:
        return cached.mean_of_last()[cached.rows(part.texts)]
    texts: Any = part.texts
    return evaluation.side_by_side(encoder, tokenizer, texts, max_length=max_length, progress=True)[
        evaluation.MEAN_OF_LAST
    ]


def _fine_tune(task: Task, data: _Data) -> None:
    with waiting.told("importing transformers"):
        from ..tools import classifier

    device = task.device
    encoder, tokenizer, _ = common.load_model(task.given.get("model"), device)
    settings = recipe.DEFAULT._replace(**task.fields(recipe.Recipe), **task.one("learning_rate"), **task.one("seed"))
    torch.manual_seed(settings.seed)
    fusion = classifier.Fusion(task.blocks, task.pooling, task.selector_arguments(encoder.config.hidden_size))
    dropout = task.one("dropout").get("dropout", recipe.DROPOUT)
    model = classifier.make(encoder, fusion, data.problem, data.names, dropout, pairs=data.train.pairs)
    model.config.provenance = task.provenance(settings, data.used(task))
    examples, dev = (classifier.Examples(part.texts, data.targets(part)) for part in (data.train, data.dev))
    score = classifier.fine_tune(
        model, tokenizer, examples, dev, task.output, settings, task.max_length, resume="resume" in task.given
    )
    if processes.is_first():
        what, lines = SCORES[data.problem.kind], history.read(task.output)
        print(f"dev {what} {score:.2f}, the best epoch's")
        constant = data.problem.score_of_constant(examples.targets, dev.targets)
        always = verdict.Row(ALWAYS[data.problem.kind], constant)
        row = verdict.Row(f"trained classifier{history.of_best(lines)}", score)
        result = verdict.Result("classifier", row, history.ends_best(lines))
        print_lines(verdict.report(what, [always], result))
        print_lines(verdict.hint(history.last_loss(lines), REMEDIES[task.kind]))

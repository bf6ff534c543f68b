"""`s2sent train` on sentences that belong together, or on scored pairs (--task sts): the selector behind a frozen encoder, or
both as a SentenceTransformer."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__, cache, families, frozen, frozen_loop, validate, waiting
from ..selector import S2SentSelector
from ..tools import evaluation, history, labelled, processes, recipe, verdict
from ..tools.baselines import ScalarMix
from ..tools.examples import Examples, Scored, read_examples
from . import common
from .common import UserError
from .train_task import REMEDIES, STS, Epochs, Pace, Task, Used, print_lines, print_trial

VARIED = ("learning_rate", "seed")  # with --freeze-encoder
Dev = list[tuple[str, str, float]]  # sentence, sentence, score


def run(task: Task) -> None:
    examples, dev = _read(task)
    if not task.frozen:
        task.judge()
        _fine_tune(task, examples, dev)
        return
    if isinstance(examples, Examples) and not examples.supervised:
        message = "--freeze-encoder needs pairs: without dropout a sentence is its own copy"
        raise UserError(f"{task.given['data']}: {message}")
    _train_frozen(task, examples, dev)


def used(task: Task) -> Used:
    """What the options give to a training."""
    return _used(*_read(task))


def _used(examples: Examples | Scored, dev: Dev | None) -> Used:
    scores = examples.scores if isinstance(examples, Scored) else None
    return Used.of(len(examples.rows), [examples.rows, scores], dev)


def _read(task: Task) -> tuple[Examples | Scored, Dev | None]:
    examples: Examples | Scored
    if task.kind == STS:
        found = labelled.read_scored(task.given["data"], task.given.get("split"), columns=task.columns)
        examples = Scored(_pairs(found), found.labels, task.given.get("loss", recipe.LOSSES[0]))
    else:
        examples = read_examples(task.given["data"], task.given.get("split"), task.columns)
    if len(examples.rows) < 2:
        split = f" of split {task.given['split']!r}" if "split" in task.given else ""
        why = "since the others of a batch are the negatives"
        raise UserError(f"{task.given['data']}: expected two or more examples{split}, {why}, got {len(examples.rows)}")
    return examples, _read_dev(task)


def _read_dev(task: Task) -> Dev | None:
    if "dev" not in task.given:
        if "dev_split" in task.given:
            raise UserError("--dev-split: expected --dev, whose split it names")
        return None
    found = labelled.read_scored(task.given["dev"], task.given.get("dev_split"), "dev", task.dev_columns)
    return [(*pair, score) for pair, score in zip(_pairs(found), found.labels, strict=True)]


def _pairs(found: labelled.Labelled) -> list[tuple[str, str]]:
    return [text for text in found.texts if isinstance(text, tuple)]  # all of them


def _train_frozen(task: Task, examples: Examples | Scored, dev: Dev | None) -> None:
    common.check_writable(Path(task.cache), what="--cache")
    base = (frozen.SCORED if task.kind == STS else frozen.DEFAULT)._replace(**task.fields(frozen.Recipe))
    values = [task.several(name) or [getattr(base, name)] for name in VARIED]
    recipes = [base._replace(**dict(zip(VARIED, each, strict=True))) for each in itertools.product(*values)]
    if len(recipes) > 1 and dev is None:
        raise UserError("--dev: expected a file that chooses among several learning rates and seeds, got none")
    if "widths" in task.given:
        recipes = [one._replace(widths=tuple(task.given["widths"])) for one in recipes]
    for one in recipes:
        frozen_loop.check(one)  # before the encoder is loaded
    device, known = task.device, task.judge()
    if known is not None:
        for one in recipes:
            frozen.check(one, len(examples.rows), known)
    encoder, tokenizer, name = common.load_model(task.given.get("model"), device)
    blocks = families.indices(task.blocks, len(families.find_blocks(encoder)))
    size = encoder.config.hidden_size
    for one in recipes:
        frozen.check(one, len(examples.rows), size)

    def make(seed: int) -> S2SentSelector:
        torch.manual_seed(seed)
        return S2SentSelector(size, len(blocks), **task.selector_arguments(size)).to(device)

    validate.batch_for_norm("batch_size", base.batch_size, make(base.seed))  # before anything is encoded
    prepared = frozen.prepare(
        encoder,
        tokenizer,
        make(base.seed),
        examples.rows,
        folder=task.cache,
        dev=dev,
        settings=cache.DEFAULT._replace(
            blocks=blocks,
            pooling=task.pooling,
            max_length=task.max_length,
            token_frequencies=frozen.token_frequencies(make(base.seed)),
        ),
        progress=True,
        verify=task.verify_cache,
    )
    task.stage.encoded = True
    epochs = Epochs(recipes, VARIED)

    def train(module: torch.nn.Module, one: frozen.Recipe, told: frozen_loop.Told) -> frozen.History:
        if isinstance(examples, Scored):
            return prepared.train_scored(module, torch.tensor(examples.scores), one, examples.loss, told)
        return prepared.train(module, one, told)

    best: tuple[S2SentSelector, frozen.Recipe, frozen.History] | None = None
    with epochs:
        for one in recipes:
            selector = make(one.seed)
            found = train(selector, one, partial(epochs, one))
            if len(recipes) > 1:
                print_trial(one, found, VARIED, "dev")
            if best is None or frozen_loop.order(found.score) > frozen_loop.order(best[2].score):
                best = selector, one, found
    assert best is not None
    selector, chosen, found = best
    if len(recipes) > 1:
        print("kept: ", end="")
        print_trial(chosen, found, VARIED, "dev")
    given = _used(examples, dev)
    about: dict[str, Any] = {
        "version": __version__,
        "encoder": name,
        "blocks": list(blocks),
        "pooling": task.pooling,
        "max_length": task.max_length,
        "task": task.kind,
        "recipe": chosen._asdict(),
        **given.entries(),
        **({"loss": examples.loss} if isinstance(examples, Scored) else {}),
        "epoch": found.kept,
    }
    if dev is not None:
        assert prepared.score is not None
        mix = ScalarMix(len(blocks)).to(device)
        with Pace([chosen], "scalar mix, to compare with") as pace:
            mixed = train(mix, chosen, partial(pace, chosen))
        scores = {evaluation.SCALAR_MIX: mixed.score}
        about["scalar_mix"] = mix.block_prior.detach().double().softmax(dim=0).tolist()
        means = prepared.score.mean_of_last
        if means is None:  # its last block is not in the cache
            scores = verdict.untouched(encoder, tokenizer, dev, blocks, task.pooling, task.max_length) | scores
        else:
            scores[evaluation.MEAN_OF_LAST] = prepared.score.of(means)
        rows = verdict.rows(scores | {verdict.UNTRAINED: found.scores[0]}, "trained alike")
        best_row = verdict.Row(f"trained selector (epoch {found.kept})", found.score)
        print_lines(verdict.report(verdict.SPEARMAN, rows, verdict.Result("selector", best_row, found.rising)))
        print_lines(verdict.hardly_trained(scores, mix, mixed.steps))
    print_lines(verdict.hint(found.losses[-1], REMEDIES[task.kind]))
    what = None if dev is None else verdict.SPEARMAN
    title = history.title_of(task.provenance(chosen, given))
    history.write(
        task.output, epochs.history, what, title
    )  # first: a selector replaces an empty folder, which is locked
    selector.save_pretrained(task.output, about=about)


def _fine_tune(task: Task, examples: Examples | Scored, dev: Dev | None) -> None:
    with waiting.told("importing sentence-transformers"):
        from ..sentence_transformers import S2SentPooling, SentenceTransformer
        from ..tools import training

    device = task.device
    transformer = common.load_transformer(task.given.get("model"), task.max_length)
    settings = recipe.DEFAULT._replace(**task.fields(recipe.Recipe), **task.one("learning_rate"), **task.one("seed"))
    torch.manual_seed(settings.seed)
    pooling = S2SentPooling.behind(
        transformer,
        task.blocks,
        pooling=task.pooling,
        **task.selector_arguments(transformer.get_embedding_dimension()),
    )
    pooling.provenance = task.provenance(settings, _used(examples, dev))
    model = SentenceTransformer(modules=[transformer, pooling], device=str(device))
    columns: Any = None if dev is None else tuple(map(list, zip(*dev, strict=True)))
    resume = "resume" in task.given
    training.check(model, examples, task.output, settings, dev=columns, resume=resume)  # before dev is encoded
    before: dict[str, float] = {}
    if dev is not None and processes.is_first():
        encoder, tokenizer = transformer.auto_model, transformer.tokenizer
        before = verdict.untouched(
            encoder, tokenizer, dev, pooling.blocks, task.pooling, task.max_length, pooling.selector
        )
    score = training.fine_tune(model, examples, task.output, settings, dev=columns, resume=resume)
    if not processes.is_first():
        return
    lines = history.read(task.output)
    if score is not None:
        rows = verdict.rows(before, "equal weights, before")
        row = verdict.Row(f"trained model{history.of_best(lines)}", score)
        result = verdict.Result("model", row, history.ends_best(lines))
        print_lines(verdict.report(verdict.SPEARMAN, rows, result))
    print_lines(verdict.hint(history.last_loss(lines), REMEDIES[task.kind]))

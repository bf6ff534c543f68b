"""S2SentForSequenceClassification, from an encoder to a folder that ``pipeline("text-classification")`` loads, with transformers'
Trainer in between. Needs the extra train for the trainer, else transformers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import families, validate, waiting
from ..batches import TextTokenizer, Tokens, padded
from ..files import importing, open_to_umask, sync_files, sync_folder
from ..transformers import S2SentForSequenceClassification, S2SentModel, transformers
from . import history, processes, resuming
from .callbacks import Dev, Display, callbacks_of, show
from .encoders import Text
from .problems import NUMBERS, SCORES, Problem, check_dropout
from .recipe import DEFAULT, DROPOUT, PRIORS, Recipe
from .recipe import check as check_numbers

LAST = resuming.OF_CLASSIFIER
_SCORE = "eval_score"


class Fusion(NamedTuple):
    """Which blocks are fused, how tokens are pooled, and the arguments of S2SentSelector."""

    blocks: Sequence[int] | str | None
    pooling: str
    selector: dict[str, Any]


class Examples(NamedTuple):
    """Texts, or pairs of texts, and their targets as ``Problem`` takes them."""

    texts: Sequence[Text]
    targets: Tensor


def make(
    encoder: Any,
    fusion: Fusion,
    problem: Problem,
    names: Sequence[str],
    dropout: float = DROPOUT,
    *,
    pairs: bool = False,
) -> S2SentForSequenceClassification:
    """A fresh selector and head behind ``encoder``, which is used, not copied.

    Args:
        names: of the head's outputs; none for a regression.
        pairs: whether it reads pairs of texts; ``s2sent predict`` takes no others.
    """
    problem.check()
    check_dropout(dropout)
    model = S2SentModel.from_encoder(encoder, fusion.blocks, pooling=fusion.pooling, **fusion.selector)
    whole = S2SentForSequenceClassification.from_model(
        model, num_labels=problem.outputs, problem_type=problem.kind, classifier_dropout=dropout
    )
    whole.config.pairs = pairs
    if names:
        whole.config.id2label = dict(enumerate(names))
        whole.config.label2id = {name: number for number, name in enumerate(names)}
    return whole


def write(model: S2SentForSequenceClassification, tokenizer: Any, folder: Path, limit: int) -> None:
    """Model and tokenizer into a folder that is no other's.

    Args:
        limit: tokens at most, where ``truncation=True`` cuts a text.
    """
    model.eval().save_pretrained(folder)
    tokenizer.model_max_length = limit
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.enable_truncation(limit)
        backend.no_padding()
    tokenizer.save_pretrained(folder)
    open_to_umask(folder)
    sync_files(folder.rglob("*"))


# ---------------------------------------------------------------- transformers' Trainer


def fine_tune(
    model: S2SentForSequenceClassification,
    tokenizer: Any,
    examples: Examples,
    dev: Examples,
    folder: str | os.PathLike[str],
    recipe: Recipe = DEFAULT,
    max_length: int = 256,
    *,
    resume: bool = False,
) -> float:
    """Train encoder, selector and head in place by transformers' Trainer, keep the epoch with the best score on ``dev``, and save
    it in ``folder``. Returns that score, times 100. On several GPUs, start it with torchrun; the first process writes. Until the
    model is saved, a folder in ``folder`` holds the checkpoints; they and ``resume`` are those of ``training.fine_tune``.

    Raises:
        ValueError: a number of the recipe is out of range, one process sees several GPUs, the checkpoints to resume from were
            made with other settings or the model is finished, or the training diverged.
        MissingPackage: accelerate is not installed.
    """
    with importing(None, "train"):
        import accelerate  # noqa: F401  the trainer imports it late
    _check(recipe)
    validate.batch_for_norm("batch_size", recipe.batch_size, model)
    problem = _problem_of(model)
    limit = families.max_length(model.model.encoder, tokenizer, max_length)
    shift, scale = torch.tensor(0.0), torch.tensor(1.0)
    if (
        problem.kind == NUMBERS
    ):  # in units of their spread, from their mean: a step moves a weight by the learning rate alone
        scale, shift = torch.std_mean(examples.targets, correction=0)
        examples, dev = (part._replace(targets=(part.targets - shift) / scale) for part in (examples, dev))
    output, settings = Path(folder), _settings(model, (examples, dev), recipe, limit)
    with resuming.own(output, LAST, settings, resume) as start:
        score, lines = _train(model, tokenizer, (examples, dev), recipe, limit, output / resuming.CHECKPOINTS, start)
        with torch.no_grad():
            model.classifier.weight.mul_(scale)
            model.classifier.bias.mul_(scale).add_(shift)
        if processes.is_first():
            with resuming.unsaved(output) as temporary:
                write(model, tokenizer, temporary, limit)
                title = history.title_of(getattr(model.config, "provenance", None))
                history.write(temporary, lines, SCORES[problem.kind], title)
                # Whatever a killed process may have moved already is replaced.
                for name in sorted(os.listdir(temporary), key=LAST.__eq__):
                    os.replace(temporary / name, output / name)
                sync_folder(output)
            resuming.remove(output)
    return score


def _settings(
    model: S2SentForSequenceClassification, parts: tuple[Examples, Examples], recipe: Recipe, limit: int
) -> dict[str, Any]:
    """What identifies a training, apart from its initial weights."""

    config, fused = model.config, model.model
    found = {
        **recipe.computed(),
        "blocks": list(fused.config.blocks or ()),
        "pooling": fused.config.pooling,
        "selector": fused.selector.arguments,
        "dropout": config.classifier_dropout,
        "problem_type": config.problem_type,
        "labels": resuming.digest(config.id2label),
        "max_length": limit,
        "processes": processes.count(),
        "examples": resuming.digest([[list(part.texts), part.targets.tolist()] for part in parts[:1]]),
        "dev": resuming.digest([[list(part.texts), part.targets.tolist()] for part in parts[1:]]),
        "parameters": resuming.digest([[name, *p.shape] for name, p in model.named_parameters()]),
    }
    return json.loads(json.dumps(found))


def _train(
    model: S2SentForSequenceClassification,
    tokenizer: Any,
    parts: tuple[Examples, Examples],
    recipe: Recipe,
    limit: int,
    checkpoints: Path,
    start: resuming.Start,
) -> tuple[float, list[history.Line]]:
    problem = _problem_of(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(checkpoints),
        **processes.arguments_of(recipe, len(parts[0].texts), start.epochs),
        eval_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=_SCORE,
        greater_is_better=True,
        remove_unused_columns=False,
        use_cpu=model.device.type == "cpu",
    )
    processes.check_one_gpu(arguments)

    def metrics(found: Any) -> dict[str, float]:
        return {_SCORE: problem.score(torch.tensor(found.predictions), torch.tensor(found.label_ids))}

    tokenize = TextTokenizer(tokenizer, limit)
    with waiting.told("tokenizing the texts", processes.is_first()):
        rows, dev_rows = (_rows(tokenize, part) for part in parts)
    with waiting.told("preparing the training", processes.is_first()):
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=dev_rows,
            data_collator=partial(_collate, pad_id=tokenize.pad_id),
            compute_metrics=metrics,
            optimizers=(torch.optim.AdamW(_groups(model, recipe), weight_decay=0.0), None),
            callbacks=callbacks_of(recipe),
        )
    scored = Dev(len(dev_rows), model, lambda output: len(output["logits"]) * processes.count())  # in shares
    trainer.display = show(trainer, _SCORE, dev=scored)
    some = _collate(_rows(tokenize, Examples(parts[0].texts[:2], parts[0].targets[:2])), tokenize.pad_id)
    some = {name: tensor.to(model.device) for name, tensor in some.items() if name != "labels"}
    with processes.joined(model, lambda: model(**some).logits), trainer.display:
        trainer.train(resume_from_checkpoint=start.checkpoint)
    trainer.accelerator.wait_for_everyone()
    validate.finite_state("model", model)
    best = trainer.state.best_metric
    lines = history.of_trainer(trainer.state.log_history, _SCORE)
    return float("nan") if best is None else best, lines


def _problem_of(model: S2SentForSequenceClassification) -> Problem:
    return Problem(str(model.config.problem_type), int(model.config.num_labels or 0))


class _Trainer(transformers.Trainer):
    display: Display

    def evaluate(self, *given: Any, **named: Any) -> Any:
        with self.display.scoring():
            return super().evaluate(*given, **named)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """All of the dev part: the base method drops its last batch where training does."""
        rows: Any = self.eval_dataset
        loader = torch.utils.data.DataLoader(rows, self.args.eval_batch_size, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


class _Row(NamedTuple):
    ids: Any  # int32 [length]
    types: Any  # the same, or None
    target: Tensor


def _rows(tokenize: TextTokenizer, part: Examples) -> list[_Row]:
    """The tokens of each text, not padded yet."""
    texts: Any = part.texts
    tokens = tokenize(texts) if isinstance(texts[0], str) else tokenize.pairs(texts)
    types: Any = [None] * len(tokens.ids) if tokens.types is None else tokens.types
    return [_Row(*row) for row in zip(tokens.ids, types, part.targets, strict=True)]


def _collate(rows: Sequence[_Row], pad_id: int) -> dict[str, Tensor]:
    types = None if rows[0].types is None else [row.types for row in rows]
    tokens = Tokens([row.ids for row in rows], None, 0, types)  # type: ignore[arg-type]
    return padded(tokens, range(len(rows)), pad_id) | {"labels": torch.stack([row.target for row in rows])}


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The optimizer's groups: encoder; selector and head; block prior and gate scale."""
    found: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in PRIORS:
            rate = recipe.prior_learning_rate
        else:
            rate = recipe.learning_rate if name.startswith("model.encoder.") else recipe.selector_learning_rate
        found.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in found.items()]


def _check(recipe: Recipe) -> None:
    check_numbers(recipe)
    if recipe.mini_batch is not None:
        raise ValueError(f"mini_batch: expected None for a classifier, which has no negatives, got {recipe.mini_batch}")

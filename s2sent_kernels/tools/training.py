"""Fine-tuning of an encoder and its selector, contrastive or on scored pairs, with the trainer and the losses of
sentence-transformers. Needs the extra train."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import validate, waiting
from ..files import importing, open_to_umask, sync_files, sync_folder
from ..sentence_transformers import S2SentPooling, SentenceTransformer, load
from . import history, processes, resuming
from .callbacks import Dev, Display, callbacks_of, show
from .contrastive import CachedGatheredNegatives, GatheredNegatives
from .examples import Examples, Scored
from .recipe import DEFAULT, LOSSES, PRIORS, Recipe
from .recipe import check as check_numbers
from .scores import SPEARMAN, unit_scores

with importing(None, "train"):
    import accelerate  # noqa: F401  the trainer imports it late, and its error names another extra
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.base.model_card import BaseModelCardCallback
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        CoSENTLoss,
        CosineSimilarityLoss,
        MultipleNegativesRankingLoss,
    )
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers
    from sentence_transformers.util import batch_to_device
    from transformers import TrainerCallback

LAST = resuming.OF_MODEL
_SCORE = "dev_spearman_cosine"
_Dev = tuple[list[str], list[str], list[float]]  # sentences, their partners, scores


class _Trainer(SentenceTransformerTrainer):
    display: Display

    def evaluate(self, *given: Any, **named: Any) -> Any:
        with self.display.scoring():
            return super().evaluate(*given, **named)

    def get_batch_sampler(self, dataset: Any, *given: Any, **named: Any) -> Any:
        if self.args.batch_sampler == BatchSamplers.NO_DUPLICATES:  # as which the model's card knows it
            return FullEpochs(dataset, *given, **named)
        return super().get_batch_sampler(dataset, *given, **named)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:  # type: ignore[override]
        # The base method requires trust_remote_code in older releases.
        self.model.load_state_dict(load(checkpoint_path, device="cpu").state_dict())


class _CardOfAll(TrainerCallback):
    """The model's card has what was logged before a training went on, too. The library writes down there what it is called back
    for, but starts with nothing: the checkpoint's log is told to it again. Added behind the library's own callback.

    Args:
        evaluator: of the dev part.
        epochs: of the recipe; a training whose patience was used up goes on with fewer.
    """

    def __init__(self, trainer: _Trainer, evaluator: EmbeddingSimilarityEvaluator | None, epochs: int) -> None:
        super().__init__()
        found = trainer.callback_handler.callbacks
        self._told = next(each for each in found if isinstance(each, BaseModelCardCallback))
        self._evaluator, self._epochs = evaluator, epochs

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        model, all_epochs = others["model"], copy.copy(args)
        all_epochs.num_train_epochs = self._epochs
        self._told.on_train_begin(all_epochs, state, control, model=model)
        for logs in state.log_history:
            then = dataclasses.replace(state, epoch=logs["epoch"], global_step=logs["step"])
            if self._evaluator is not None and f"eval_{_SCORE}" in logs:
                prefix = f"eval_{self._evaluator.name}_"
                scores = {name.removeprefix("eval_"): logs[name] for name in logs if name.startswith(prefix)}
                self._evaluator.primary_metric = _SCORE  # which it else knows once it is called
                self._evaluator.store_metrics_in_model_card_data(model, scores, logs["epoch"], logs["step"])
                self._told.on_evaluate(args, then, control, model=model, metrics=logs)
            else:
                self._told.on_log(args, then, control, model=model, logs=logs)


class FullEpochs(NoDuplicatesBatchSampler):
    """No batch has a text twice, and each epoch as many batches as its length says, by which the trainer counts epochs where it
    goes on from a checkpoint, and the scheduler steps. Where too many rows share a text, the base class has fewer: those of the
    epoch are then repeated."""

    def __iter__(self) -> Iterator[list[int]]:
        found = []
        for batch in super().__iter__():
            found.append(batch)
            yield batch
        for number in range(len(self) - len(found) if found else 0):
            yield found[number % len(found)]


def fine_tune(
    model: SentenceTransformer,
    examples: Examples | Scored,
    output: str | os.PathLike[str],
    recipe: Recipe = DEFAULT,
    *,
    dev: _Dev | None = None,
    resume: bool = False,
) -> float | None:
    """Train ``model`` in place, on in-batch negatives and the examples' own or on scored pairs, and save it in ``output``.
    Until then a folder in ``output`` holds the checkpoints, one per epoch and, within an epoch, one every
    ``recipe.save_minutes``. With ``dev`` (sentences, their partners, scores) the best epoch's weights are kept, and 100 times
    their Spearman correlation is returned.

    On several GPUs, start it with torchrun or accelerate; the first process writes. ``resume`` continues from the newest whole
    checkpoint in ``output``, or from the beginning where there is none, with the same result as an uninterrupted training. It
    refuses checkpoints of another training, and a finished model. It prints where it goes on, and what is not whole.

    Raises:
        ValueError: a number of the recipe is out of range; patience is set without ``dev``; there are fewer than two examples, or
            no batch without repeated texts; a mini-batch is given beside a batch norm; only some examples have a negative;
            anchors are their own positives and the encoder has no dropout; one process sees several GPUs; the checkpoints to
            resume from were made with other settings, or the model is finished; another process is writing to ``output``; the
            training diverged.
    """
    _check(model, examples, recipe, dev)
    with resuming.own(Path(output), LAST, _settings(model, examples, recipe, dev), resume) as start:
        return _train(model, examples, Path(output), recipe, dev, start)


def check(
    model: SentenceTransformer,
    examples: Examples | Scored,
    output: str | os.PathLike[str],
    recipe: Recipe = DEFAULT,
    *,
    dev: _Dev | None = None,
    resume: bool = False,
) -> None:
    """The errors of ``fine_tune`` that can be told at once, for callers that have other work to do before it."""
    _check(model, examples, recipe, dev)
    if resume:
        resuming.check_settings(Path(output), _settings(model, examples, recipe, dev))


def _train(
    model: SentenceTransformer,
    examples: Examples | Scored,
    output: Path,
    recipe: Recipe,
    dev: _Dev | None,
    start: resuming.Start,
) -> float | None:
    checkpoints = output / resuming.CHECKPOINTS
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints),
        **processes.arguments_of(recipe, len(examples.rows), start.epochs),
        learning_rate=recipe.learning_rate,
        learning_rate_mapping=_learning_rates(model, recipe),
        batch_sampler=BatchSamplers.BATCH_SAMPLER if isinstance(examples, Scored) else BatchSamplers.NO_DUPLICATES,
        eval_strategy="no" if dev is None else "epoch",
        save_total_limit=2,
        load_best_model_at_end=dev is not None,
        metric_for_best_model=None if dev is None else f"eval_{_SCORE}",
        greater_is_better=None if dev is None else True,
        use_cpu=model.device.type == "cpu",
    )
    processes.check_one_gpu(arguments)
    evaluator = None if dev is None else EmbeddingSimilarityEvaluator(*dev, name="dev", write_csv=False)
    with waiting.told("preparing the training", processes.is_first()):
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(_columns(examples)),
            loss=_loss(model, examples, recipe),
            evaluator=evaluator,
            callbacks=callbacks_of(recipe),
        )
    trainer.add_callback(_CardOfAll(trainer, evaluator, recipe.epochs))
    scored = None if dev is None else Dev(2 * len(dev[2]), model[-1], partial(_rows, model))
    trainer.display = show(trainer, f"eval_{_SCORE}", 100, scored)
    if len(next(iter(trainer.get_train_dataloader()), ())) == 0:
        share = "" if processes.count() == 1 else f" for each of {processes.count()} processes"
        raise ValueError(
            f"examples: expected {arguments.per_device_train_batch_size} at once{share} without a text that repeats, got "
            f"{len(examples.rows)} of which too many share a text"
        )
    with processes.joined(model, partial(_embed_a_few, model)), trainer.display:
        trainer.train(resume_from_checkpoint=start.checkpoint)
    trainer.accelerator.wait_for_everyone()  # _save deletes the checkpoints that the others may still read
    validate.finite_state("model", model)
    if trainer.is_world_process_zero():
        what = None if dev is None else SPEARMAN
        _save(model.eval(), output, history.of_trainer(trainer.state.log_history, f"eval_{_SCORE}", 100), what)
    best = trainer.state.best_metric
    return None if dev is None or best is None else 100 * best


def _embed_a_few(model: SentenceTransformer) -> torch.Tensor:
    read = getattr(model, "preprocess", None) or model.tokenize  # the name in earlier releases
    return model(batch_to_device(read(["a text", "another"]), model.device))["sentence_embedding"]


def _rows(model: SentenceTransformer, output: Any) -> int:
    """How many texts are embedded with a batch of the first process. Later releases share them among all of an evaluation."""
    shared = getattr(model, "_distributed_inference", None) is not None
    return len(output["sentence_embedding"]) * (processes.count() if shared else 1)


def _columns(examples: Examples | Scored) -> dict[str, list[Any]]:
    if not isinstance(examples, Scored):
        return {name: [row[i] for row in examples.rows] for i, name in enumerate(examples.columns)}
    # On a scale from 0 to 1, which the cosine loss needs; the order is all that CoSENT reads.
    scores = unit_scores(torch.tensor(examples.scores, dtype=torch.float64)).tolist()
    return {"sentence1": [a for a, _ in examples.rows], "sentence2": [b for _, b in examples.rows], "score": scores}


def _loss(model: SentenceTransformer, examples: Examples | Scored, recipe: Recipe) -> nn.Module:
    if not isinstance(examples, Scored):
        several, scale, mini_batch = processes.count() > 1, 1 / recipe.temperature, recipe.mini_batch
        if mini_batch is None:
            return (GatheredNegatives if several else MultipleNegativesRankingLoss)(model, scale=scale)
        cached = CachedGatheredNegatives if several else CachedMultipleNegativesRankingLoss
        return cached(model, scale=scale, mini_batch_size=mini_batch)
    return CosineSimilarityLoss(model) if examples.loss == "cosine" else CoSENTLoss(model, scale=1 / recipe.temperature)


def _check(model: SentenceTransformer, examples: Examples | Scored, recipe: Recipe, dev: Any) -> None:
    check_numbers(recipe)
    validate.positive_number("temperature", recipe.temperature)
    validate.batch_for_norm("batch_size", recipe.batch_size, model)
    if len(examples.rows) < 2:
        raise ValueError(
            f"examples: expected two or more, since each is the others' negative, got {len(examples.rows)}"
        )
    if any(not text for row in examples.rows for text in row):
        raise ValueError("examples: expected every row to have all negatives, got empty ones")
    if isinstance(examples, Scored):
        validate.option("loss", examples.loss, LOSSES)
        unit_scores(torch.tensor(examples.scores, dtype=torch.float64))  # for its error
    elif not examples.supervised and not any(m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout)):
        raise ValueError("examples: expected positives other than their anchors, since the encoder's dropout is 0")
    if recipe.mini_batch is not None:
        _check_mini_batch(recipe.mini_batch, model, examples)
    if recipe.patience is not None and dev is None:
        raise ValueError("patience: expected dev, whose score it waits for")
    if dev is not None and len(set(dev[2])) < 2:
        raise ValueError("dev: expected pairs with different scores")


def _check_mini_batch(mini_batch: int, model: SentenceTransformer, examples: Examples | Scored) -> None:
    validate.positive_int("mini_batch", mini_batch)
    if isinstance(examples, Scored):
        raise ValueError(f"mini_batch: expected None with scored pairs, which are no negatives, got {mini_batch}")
    if any(isinstance(part, nn.BatchNorm1d) for part in model.modules()):
        raise ValueError(
            f"mini_batch: expected None beside the gate's batch norm, got {mini_batch}: each mini-batch would be normalised by "
            "its own statistics, and counted as a batch of the running ones; leave out the norm (--no-norm, gate_norm=None)"
        )


def _settings(model: SentenceTransformer, examples: Examples | Scored, recipe: Recipe, dev: Any) -> dict[str, Any]:
    """What identifies a training, apart from its initial weights."""

    pooling = {
        key: getattr(module, key) for module in model if isinstance(module, S2SentPooling) for key in module.config_keys
    }
    found = {
        **recipe.computed(),
        **pooling,
        "max_seq_length": model.max_seq_length,
        "processes": processes.count(),
        "examples": resuming.digest(examples),
        "dev": resuming.digest(dev),
        "parameters": resuming.digest([[name, *p.shape] for name, p in model.named_parameters()]),
    }
    return json.loads(json.dumps(found))


def _learning_rates(model: SentenceTransformer, recipe: Recipe) -> dict[str, float]:
    rates = {r"\.selector\.": recipe.selector_learning_rate}
    if any(name.rpartition(".")[2] in PRIORS for name, _ in model.named_parameters()):
        rates[rf"\.({'|'.join(PRIORS)})$"] = recipe.prior_learning_rate
    return rates


def _save(model: SentenceTransformer, folder: Path, lines: Sequence[history.Line], what: str | None) -> None:
    """Save the model, and its history, so that an incomplete one is never mistaken for a model, then delete the checkpoints."""
    with resuming.unsaved(folder) as temporary:
        whole = temporary / "model"
        model.save(str(whole))
        made = next((module.provenance for module in model if isinstance(module, S2SentPooling)), None)
        history.write(whole, lines, what, history.title_of(made))
        open_to_umask(whole)
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(LAST), dirs_exist_ok=True)
        sync_files(folder / path.relative_to(whole) for path in whole.rglob("*") if path.name != LAST)
        os.replace(whole / LAST, folder / LAST)
        sync_folder(folder)
    resuming.remove(folder)

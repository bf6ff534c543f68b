"""Contrastive fine-tuning of an encoder with its selector, by the trainer and the loss of sentence-transformers. Needs the extra
train."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from .examples import Examples
from .sentence_transformers import SentenceTransformer, load

try:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers
    from transformers import EarlyStoppingCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise ImportError(f"{error}: pip install 's2sent_kernels[train]'") from error

CHECKPOINTS = "checkpoints"  # in the output folder
_SCORE = "dev_spearman_cosine"


class Recipe(NamedTuple):
    epochs: int = 3
    batch_size: int = 64
    learning_rate: float = 3e-5  # of the encoder
    selector_learning_rate: float = 1e-3  # it starts from nothing
    temperature: float = 0.05
    warmup: float = 0.1  # of all steps
    accumulation: int = 1  # batches a step
    precision: str = "float32"  # or "bfloat16", "float16": autocast
    patience: int | None = None  # epochs without a better score after which it stops
    seed: int = 0


class _Trainer(SentenceTransformerTrainer):
    def _load_from_checkpoint(self, checkpoint_path: str) -> None:  # type: ignore[override]
        # Older releases ask for trust_remote_code here.
        self.model.load_state_dict(load(checkpoint_path, device="cpu").state_dict())


def fine_tune(
    model: SentenceTransformer,
    examples: Examples,
    output: str | os.PathLike[str],
    recipe: Recipe = Recipe(),  # noqa: B008
    *,
    dev: tuple[list[str], list[str], list[float]] | None = None,
    resume: bool = False,
) -> float | None:
    """Trains ``model`` in place on in-batch negatives, and those of the examples; saves it in ``output``, its checkpoints, one an
    epoch, in a folder below. With ``dev`` (sentences, their partners, scores) the best epoch's weights are kept, and 100 times
    their Spearman correlation is returned.

    Several GPUs: start the process by torchrun or accelerate. ``resume`` goes on from the last checkpoint in ``output``.

    Raises:
        ValueError: there are fewer examples than two, or no batch without repeated texts; only some have a negative; the recipe
            asks for patience without ``dev``; or there is no checkpoint to resume.
    """
    if len(examples.rows) < 2:
        raise ValueError(
            f"examples: expected two or more, since each is the others' negative, got {len(examples.rows)}"
        )
    if any(not text for row in examples.rows for text in row):
        raise ValueError("examples: expected every row to have all negatives, got empty ones")
    if recipe.patience is not None and dev is None:
        raise ValueError("patience: expected dev, whose score it waits for")
    checkpoints = Path(output) / CHECKPOINTS
    last = get_last_checkpoint(str(checkpoints)) if resume and checkpoints.is_dir() else None
    if resume and last is None:
        raise ValueError(f"resume: expected a checkpoint in {checkpoints}, there is none")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=min(recipe.batch_size, len(examples.rows)),
        per_device_eval_batch_size=recipe.batch_size,
        dataloader_drop_last=True,  # batch statistics of one sentence are none
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        learning_rate_mapping={r"\.selector\.": recipe.selector_learning_rate},
        warmup_steps=recipe.warmup,
        bf16=recipe.precision == "bfloat16",
        fp16=recipe.precision == "float16",
        # Of a text that is its own positive the sampler would see a duplicate.
        batch_sampler=BatchSamplers.NO_DUPLICATES if examples.supervised else BatchSamplers.BATCH_SAMPLER,
        eval_strategy="no" if dev is None else "epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=dev is not None,
        metric_for_best_model=None if dev is None else f"eval_{_SCORE}",
        greater_is_better=None if dev is None else True,
        logging_steps=max(1, math.ceil(len(examples.rows) / recipe.batch_size / 10)),
        seed=recipe.seed,
        report_to="none",
        use_cpu=model.device.type == "cpu",
    )
    evaluator = None if dev is None else EmbeddingSimilarityEvaluator(*dev, name="dev", write_csv=False)
    callbacks: list[Any] = [] if recipe.patience is None else [EarlyStoppingCallback(recipe.patience)]
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(
            {name: [row[i] for row in examples.rows] for i, name in enumerate(examples.columns)}
        ),
        loss=MultipleNegativesRankingLoss(model, scale=1 / recipe.temperature),
        evaluator=evaluator,
        callbacks=callbacks,
    )
    if len(next(iter(trainer.get_train_dataloader()), ())) == 0:
        raise ValueError(f"examples: expected {recipe.batch_size} at once without a text that repeats, there are none")
    trainer.train(resume_from_checkpoint=last)
    model.eval()
    if trainer.is_world_process_zero():
        model.save(str(output))
    best = trainer.state.best_metric
    return None if dev is None or best is None else 100 * best

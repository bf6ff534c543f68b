"""What the trainers of transformers and of sentence-transformers have in common: the processes that torchrun started."""

from __future__ import annotations

import os
from typing import Any

from ..files import on_terminal
from .recipe import Recipe


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def arguments_of(recipe: Recipe, rows: int) -> dict[str, Any]:
    """The arguments that both trainers take from a recipe, for a number of examples.

    Raises:
        ValueError: a process would have fewer than two examples.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    share = rows // processes
    if processes > 1 and share < 2:
        raise ValueError(f"data: expected two rows or more for each of {processes} processes, got {rows}")
    return {
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": min(recipe.batch_size, share),  # no more, or there would be no full batch
        "per_device_eval_batch_size": recipe.batch_size,
        "dataloader_drop_last": True,  # a batch of one text has no batch statistics
        "gradient_accumulation_steps": recipe.accumulation,
        "warmup_steps": recipe.warmup,
        "bf16": recipe.precision == "bfloat16",
        "fp16": recipe.precision == "float16",
        "save_strategy": "epoch",
        "logging_nan_inf_filter": False,  # True would replace a NaN loss in the log by earlier ones
        "seed": recipe.seed,
        "report_to": "none",
        "disable_tqdm": not on_terminal(),  # elsewhere the trainers print a line for each record of their log
    }


def check_one_gpu(arguments: Any) -> None:
    """ValueError where this process would train on several: nn.DataParallel would replicate the encoder without the hooks on its
    blocks."""
    if arguments.n_gpu > 1:
        raise ValueError(
            f"device: expected one GPU a process, got {arguments.n_gpu}: start with torchrun, or set CUDA_VISIBLE_DEVICES"
        )

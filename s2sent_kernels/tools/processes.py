"""What the trainers of transformers and of sentence-transformers have in common: the processes that torchrun started."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from ..files import on_terminal
from ..synchronised import Joinable, sync_statistics
from .encoders import in_eval_mode
from .recipe import Recipe

# Steps at most: callbacks.py makes checkpoints where a loss is logged, and steps may last a few seconds.
LOG_EVERY = 100


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def of_first(value: bool, device: torch.device) -> bool:
    """The first process's ``value``, in all of them, which call this together: where each would follow its own clock, some would
    wait for the others for ever."""
    if count() < 2:
        return value
    word = torch.tensor([int(value)], device=device)
    torch.distributed.broadcast(word, 0)
    return bool(word.item())


def arguments_of(recipe: Recipe, rows: int, epochs: int | None = None) -> dict[str, Any]:
    """The arguments that both trainers take from a recipe, for a number of examples. ``epochs``: no more than so many.

    Raises:
        ValueError: a process would have fewer than two examples.
    """
    processes = count()
    share = rows // processes
    if processes > 1 and share < 2:
        raise ValueError(f"data: expected two rows or more for each of {processes} processes, got {rows}")
    batch = min(recipe.batch_size, share)  # no more, or there would be no full one
    steps = share / batch / recipe.accumulation  # an epoch's
    return {
        "num_train_epochs": recipe.epochs if epochs is None else epochs,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": recipe.batch_size,
        "dataloader_drop_last": True,  # a batch of one text has no batch statistics
        "gradient_accumulation_steps": recipe.accumulation,
        "warmup_steps": recipe.warmup,
        "bf16": recipe.precision == "bfloat16",
        "fp16": recipe.precision == "float16",
        "logging_steps": max(1, min(math.ceil(steps / 10), LOG_EVERY)),
        "save_strategy": "epoch",
        "restore_callback_states_from_checkpoint": True,  # what patience has counted
        "ddp_find_unused_parameters": False,  # they are frozen: see ``joined``
        "logging_nan_inf_filter": False,  # True would replace a NaN loss in the log by earlier ones
        "seed": recipe.seed,
        "report_to": recipe.report_to or "none",
        "disable_tqdm": not on_terminal(),  # elsewhere the trainers print a line for each record of their log
    }


def check_one_gpu(arguments: Any) -> None:
    """ValueError where this process would train on several: nn.DataParallel would replicate the encoder without the hooks on its
    blocks."""
    if arguments.n_gpu > 1:
        raise ValueError(
            f"device: expected one GPU a process, got {arguments.n_gpu}: start with torchrun, or set CUDA_VISIBLE_DEVICES"
        )


@contextlib.contextmanager
def joined(model: nn.Module, output: Callable[[], Tensor]) -> Iterator[None]:
    """Several processes train ``model`` in here as one with all of their batches would: batch statistics are those of all.
    Parameters that have no part in ``output``, a sentence's embedding or logits, are frozen meanwhile, since
    DistributedDataParallel waits for the gradient of every other: poolers, blocks above the highest that is fused."""
    if count() < 2:
        yield
        return
    frozen = _without_gradient(model, output)
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [(part, part.processes) for part in model.modules() if isinstance(part, Joinable)]
    sync_statistics(model)
    try:
        yield
    finally:
        for part, processes in before:
            part.processes = processes
        for parameter in frozen:
            parameter.requires_grad_(True)


def _without_gradient(model: nn.Module, output: Callable[[], Tensor]) -> list[nn.Parameter]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with in_eval_mode(model), torch.enable_grad():
        found = torch.autograd.grad(output().sum(), wanted, allow_unused=True)
    return [parameter for parameter, gradient in zip(wanted, found, strict=True) if gradient is None]


def seed_dropout(seed: int) -> None:
    """In each process another sequence of random numbers, the first process's as it would be alone."""
    if not is_first():
        torch.manual_seed(seed + int(os.environ["RANK"]))

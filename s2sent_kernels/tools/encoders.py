"""Texts to batches of tokens on an encoder's device, and the encoder's mode while it is run on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import families
from ..files import require


class TokenBatch(NamedTuple):
    rows: list[int]  # the texts' positions in the sequence they were taken from
    inputs: dict[str, Tensor]  # the encoder's arguments, on its device


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch ``module`` to eval mode, and restore its mode afterwards."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def longest_first(texts: Sequence[str]) -> list[int]:
    """The rows of ``texts`` by descending length: batches need little padding, and one that is too large for the device fails at
    once."""
    return sorted(range(len(texts)), key=lambda row: (-len(texts[row]), row))


def in_batches(rows: Sequence[int], batch_size: int) -> list[list[int]]:
    return [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def token_batches(
    encoder: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    batches: Sequence[Sequence[int]],
    *,
    max_length: int,
    skip: int = 0,
    progress: bool = False,
) -> Iterator[TokenBatch]:
    """Tokenise ``texts`` batch by batch, as the caller asks for the next one.

    Args:
        batches: the rows of ``texts`` in each batch.
        max_length: texts are truncated to as many tokens, or to fewer where tokenizer or encoder support fewer.
        skip: how many batches to leave out at the beginning; the progress bar counts them.
        progress: show a progress bar on stderr.
    """
    limit = families.max_length(encoder, tokenizer, max_length)
    device = next(encoder.parameters()).device
    numbered: Any = enumerate(_bar(batches) if progress else batches)
    for number, rows in numbered:
        if number < skip:
            continue
        tokens = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        yield TokenBatch(list(rows), {name: tensor.to(device) for name, tensor in tokens.items()})


def _bar(batches: Sequence[Any]) -> Any:
    return require("tqdm.auto", "tqdm", "evaluate").tqdm(batches, desc="encode", unit="batch")

"""The tokens of an encoder's input: how many there are, and which of them count in a pooling."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """(B, L) of the token ids or the embeddings among an encoder's inputs, or None without."""
    for name, dimensions in (("input_ids", 2), ("inputs_embeds", 3)):
        tensor = inputs.get(name)
        if isinstance(tensor, Tensor) and tensor.dim() == dimensions:
            return tensor.shape[0], tensor.shape[1]
    return None


def length_of_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """L of a call of an encoder, or of a module that takes a dictionary of features as sentence-transformers' do."""
    first = args[0] if args else None
    if isinstance(first, Mapping):
        kwargs = {**first, **kwargs}
    elif isinstance(first, Tensor):
        kwargs = {**kwargs, "input_ids": first}
    found = shape(kwargs)
    return None if found is None else found[1]


def mask_of(inputs: Mapping[str, Any], given: Any = None) -> Tensor | None:
    """The mask [B, L] of the tokens that count: the one that is given, or the encoder's own; None where all do.

    An encoder may be given more than that, as a mask of pairs of tokens [B, 1, L, L], a mask for each kind of attention, or one
    that begins with the tokens of a cache. Which tokens are padding such a mask does not say in one way, so nothing is guessed.

    Raises:
        ValueError, TypeError: ``given`` is no such mask; or none is given and the encoder's is another.
    """
    expected = shape(inputs)
    if given is not None:
        if not isinstance(given, Tensor):
            raise TypeError(f"pooling_mask: expected a tensor or None, got {type(given).__name__}")
        if not _fits(given, expected):
            raise ValueError(f"pooling_mask: expected shape {_worded(expected)}, got {list(given.shape)}")
        warn_of_padding(given)
        return given
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    if isinstance(mask, Tensor) and _fits(mask, expected):
        warn_of_padding(mask)
        return mask
    wanted = _worded(expected)
    got = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"attention_mask: expected shape {wanted} to pool by, got {got}: pass pooling_mask beside it, {wanted} and nonzero at "
        "the tokens that count"
    )


def warn_of_padding(mask: Tensor) -> None:
    """A warning, once, of a batch in which no token counts: its embeddings are 0. A CUDA tensor's values are not waited for."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or not mask.numel() or mask.any():
        return
    warnings.warn(
        "no token of this batch counts, by its attention mask: its embeddings are 0", stacklevel=1
    )  # one place, so that it is said once


def _fits(mask: Tensor, expected: tuple[int, int] | None) -> bool:
    return mask.dim() == 2 and (expected is None or tuple(mask.shape) == expected)


def _worded(expected: tuple[int, int] | None) -> str:
    # Only in errors: a string of a size makes it a constant of what is traced.
    return "[B, L]" if expected is None else f"[B, L] = {list(expected)}"

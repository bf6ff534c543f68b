"""Tensors and words as the compiled kernels read them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...formula import dct
from ...formula.call import (
    ACTIVATIONS,
    KERNEL_DTYPES,
    POOLINGS,
    Activation,
    Batch,
    GateParameters,
    Layout,
    Pooling,
    Profile,
    Reading,
)


@functools.cache
def pooling_number(pooling: Pooling | None) -> int:
    return 0 if pooling is None else 1 + _place("pooling", pooling, POOLINGS)


def activation_number(activation: Activation) -> int:
    return _place("activation", activation, ACTIVATIONS)


def _place(name: str, word: str, words: tuple[str, ...]) -> int:
    if word not in words:
        raise ValueError(f"{name}: expected one of {words}, got {word!r}")
    return words.index(word)


def dense(tensor: Tensor) -> Tensor:
    """``tensor`` with its features side by side; its other strides are free."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def as_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def readable(tensor: Tensor) -> Tensor:
    """``tensor`` in a dtype that the kernels read, and contiguous."""
    return (tensor if tensor.dtype in KERNEL_DTYPES else tensor.to(torch.float32)).contiguous()


def gradients_of(tensors: Sequence[Tensor], parameters: GateParameters) -> GateParameters:
    """The kernels leave an empty tensor where there is no gradient."""
    grads = GateParameters._make(
        [None if parameter is None else grad for grad, parameter in zip(tensors, parameters, strict=True)]
    )
    return grads._replace(running_mean=None, running_var=None)


def float_parameters(parameters: GateParameters) -> GateParameters:
    return GateParameters._make([as_float(tensor) for tensor in parameters])


# The kernels read these; any other mask is compared with 0 beforehand.
_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32)


def tokens_of(batch: Batch | Layout) -> tuple[Tensor | None, Tensor | None]:
    """The mask as the kernels read it, and ``cu_seqlens``; both contiguous."""
    mask, cu_seqlens = batch.attention_mask, batch.cu_seqlens
    if mask is not None:
        mask = (mask if mask.dtype in _MASK_DTYPES else mask != 0).contiguous()
    return mask, None if cu_seqlens is None else cu_seqlens.contiguous()


@functools.cache
def block_factors(
    num_blocks: int, frequencies: int, profile: Profile, device: torch.device
) -> tuple[Tensor, tuple[int, ...]]:
    """alpha [M, N], and every part's frequency along the tokens."""
    pairs = dct.frequency_pairs(num_blocks, frequencies, profile)
    alpha = dct.block_basis(num_blocks, frequencies, profile).to(torch.float32).contiguous()
    return alpha.to(device), tuple(y for _, y in pairs)


_LENGTHS = 128  # whose tables are kept: there may be thousands, of a megabyte each
_captured: dict[tuple[int, int, torch.device], Tensor] = {}


def grid_factors(size: int, frequencies: int, device: torch.device) -> Tensor:
    """beta [M, L] of profile ``official``. Where a CUDA graph is captured, the table stays for ever: each replay reads it."""
    table = _grid_factors(size, frequencies, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[size, frequencies, device] = table
    return table


@functools.lru_cache(maxsize=_LENGTHS)
def _grid_factors(size: int, frequencies: int, device: torch.device) -> Tensor:
    return dct.grid_token_basis(size, frequencies, torch.device("cpu")).to(torch.float32).contiguous().to(device)


def factors(num_blocks: int, reading: Reading, layout: Layout) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
    """alpha, the parts' frequencies along the tokens, and beta where it is a table."""
    alpha, y = block_factors(num_blocks, reading.frequencies, reading.profile, layout.device)
    if reading.profile != "official":
        return alpha, y, None
    return alpha, y, grid_factors(layout.shape[1], reading.frequencies, layout.device)

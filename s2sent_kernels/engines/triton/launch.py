"""What every launcher does before it launches: lay out the hidden states, pass the mask."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from ...formula.call import Batch, GateParameters, Layout
from .limits import triton_interprets

_LOAD_BYTES = 16  # one 128-bit load

# The compiler may turn a * b + c * d into either of two fused multiply-adds, and may decide differently for the masked,
# packed and single-block variants of a kernel, so that a sentence's bits would depend on the variant. Kernels that promise
# bits are compiled without this fusion and call tl.fma where they want it.
FUSE_MULTIPLY_ADD = False


@functools.cache
def launches_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the previous one has ended (programmatic dependent launch, from sm_90 on). Its
    prologue then hides most of the launch latency. The interpreter does not support it."""
    if triton_interprets():
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. ``triton.cdiv`` serves kernels too, and takes microseconds on the host."""
    return -(-a // b)


def vector_of(features: int, dtype: torch.dtype) -> int:
    """Elements of the widest load that rows of ``features`` elements allow: a power of two, at most 16 bytes."""
    return min(features & -features, _LOAD_BYTES // dtype.itemsize)


def dense(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """``tensor`` made contiguous, and cast to ``dtype`` if given. Only hidden states and masks reach kernels with strides."""
    if tensor is None:
        return None
    return (tensor if dtype is None or tensor.dtype == dtype else tensor.to(dtype)).contiguous()


def contiguous(parameters: GateParameters) -> GateParameters:
    for tensor in parameters:
        if tensor is not None and not tensor.is_contiguous():
            return parameters.each(Tensor.contiguous)
    return parameters


class Mask(NamedTuple):
    """Which tokens are real, as the kernels read it."""

    attention_mask: Tensor | None  # [B, L], nonzero is real
    cu_seqlens: Tensor | None  # [B + 1], contiguous
    stride_b: int  # of attention_mask
    stride_l: int

    @staticmethod
    def of(batch: Batch | Layout) -> Mask:
        mask = batch.attention_mask
        if mask is None:
            return Mask(None, dense(batch.cu_seqlens), 0, 0)
        return Mask(mask.view(torch.uint8) if mask.dtype == torch.bool else mask, None, *mask.stride())


class HiddenStates(NamedTuple):
    """N hidden states with common strides, in rows that 128-bit loads can read.

    A kernel's load width, and so its order of summation, must follow from D, M and the dtype alone. A tensor whose strides
    or address do not allow the width that D and M allow, or whose strides differ from the others', is therefore cloned.
    """

    tensors: tuple[Tensor, ...]
    hidden_size: int  # D
    num_tokens: int  # L, or T
    stride_b: int  # in units of ``vector`` elements
    stride_l: int
    vector: int  # elements of a load

    @staticmethod
    def of(hidden_states: Sequence[Tensor], packed: bool, parts: int) -> HiddenStates:
        first = hidden_states[0]
        shape = first.shape
        hidden_size, num_tokens = shape[-1], shape[-2]
        vector = vector_of(hidden_size // parts, first.dtype)
        tensors = tuple(hidden_states)
        stride_b = 0 if packed or shape[0] <= 1 else num_tokens * hidden_size  # as _row_strides would find them
        stride_l = 0 if num_tokens <= 1 else hidden_size
        for u in tensors:
            if not u.is_contiguous() or u.data_ptr() % _LOAD_BYTES:
                tensors = _alike(tensors, vector)
                strides = _row_strides(tensors[0])
                stride_b, stride_l = (0, strides[0]) if packed else strides
                break
        return HiddenStates(tensors, hidden_size, num_tokens, stride_b // vector, stride_l // vector, vector)

    def for_parts(self, parts: int, packed: bool) -> HiddenStates:
        """The same tensors for a kernel whose rows are cut into ``parts``."""
        if self.vector == vector_of(self.hidden_size // parts, self.tensors[0].dtype):
            return self
        return HiddenStates.of(self.tensors, packed, parts)


def _row_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of all but the last dimension, with 0 for a dimension of size 1, whose stride is arbitrary."""
    return tuple([0 if n <= 1 else stride for n, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)])


def _alike(tensors: tuple[Tensor, ...], vector: int) -> tuple[Tensor, ...]:
    """The tensors with common strides: the first one's if these allow full loads, else contiguous. Clones the others."""
    first = tensors[0]
    strides = _row_strides(first)
    if first.stride(-1) == 1 and not any(stride % vector for stride in strides):
        fitting = tuple(u if _fits(u, strides) else _clone(u) for u in tensors)
        if all(_row_strides(u) == strides for u in fitting):
            return fitting
    strides = _row_strides(torch.empty(first.shape, device="meta"))
    return tuple(u if _fits(u, strides) else _clone(u) for u in tensors)


def _fits(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    return _row_strides(tensor) == strides and tensor.stride(-1) == 1 and tensor.data_ptr() % _LOAD_BYTES == 0


def _clone(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)

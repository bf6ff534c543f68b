"""What every launcher does before it launches: lay out the hidden states, pass the mask, guard the device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from ...formula.call import Batch, Layout
from .limits import triton_interprets

_LOAD_BYTES = 16  # one 128-bit load

# The compiler may turn a * b + c * d into either of two fused multiply-adds, and may decide differently for the masked,
# packed and single-block variants of a kernel, so that a sentence's bits would depend on the variant. Kernels that promise
# bits are compiled without this fusion and call tl.fma where they want it.
FUSE_MULTIPLY_ADD = False


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one; Triton launches on that device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def launches_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the previous one has ended (programmatic dependent launch, from sm_90 on). Its
    prologue then hides most of the launch latency. The interpreter does not support it."""
    if triton_interprets():
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def early(overlap: bool) -> dict[str, bool]:
    """The launch option for programmatic dependent launch, absent where the backend does not know it."""
    return {"launch_pdl": True} if overlap else {}


def vector_of(features: int, dtype: torch.dtype) -> int:
    """Elements of the widest load that rows of ``features`` elements allow: a power of two, at most 16 bytes."""
    return min(features & -features, _LOAD_BYTES // dtype.itemsize)


def dense(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """``tensor`` made contiguous, and cast to ``dtype`` if given. Only hidden states and masks reach kernels with strides."""
    if tensor is None:
        return None
    return (tensor if dtype is None else tensor.to(dtype)).contiguous()


class Mask(NamedTuple):
    """Which tokens are real, as the kernels read it."""

    attention_mask: Tensor | None  # [B, L], nonzero is real
    cu_seqlens: Tensor | None  # [B + 1], contiguous

    @staticmethod
    def of(batch: Batch | Layout) -> Mask:
        mask = batch.attention_mask
        return Mask(
            mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask, dense(batch.cu_seqlens)
        )

    def arguments(self) -> dict[str, object]:
        mask = self.attention_mask
        return {
            "p_mask": mask,
            "p_cu_seqlens": self.cu_seqlens,
            "stride_mask_b": 0 if mask is None else mask.stride(0),
            "stride_mask_l": 0 if mask is None else mask.stride(1),
        }


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
        hidden_size = first.shape[-1]
        vector = vector_of(hidden_size // parts, first.dtype)
        tensors = tuple(hidden_states)
        if not all(u.is_contiguous() and u.data_ptr() % _LOAD_BYTES == 0 for u in tensors):
            tensors = _alike(tensors, vector)
        strides = _row_strides(tensors[0])
        stride_b, stride_l = (0, strides[0]) if packed else strides
        num_tokens = first.shape[0] if packed else first.shape[1]
        return HiddenStates(tensors, hidden_size, num_tokens, stride_b // vector, stride_l // vector, vector)

    def arguments(self) -> dict[str, object]:
        return {
            "p_hidden": self.tensors,
            "num_tokens": self.num_tokens,
            "stride_b": self.stride_b,
            "stride_l": self.stride_l,
            "D": self.hidden_size,
            "VEC": self.vector,
        }


def _row_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of all but the last dimension, with 0 for a dimension of size 1, whose stride is arbitrary."""
    return tuple(0 if n <= 1 else stride for n, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True))


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

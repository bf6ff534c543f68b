"""What every launcher does before it launches: lay the hidden states out for the kernels, pass masks, guard the device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.runtime import driver

from ..backend import triton_interprets

_LOAD_BYTES = 16  # one 128-bit load

# Left to itself the compiler turns a * b + c * d into either of two fused multiply-adds, and not always into the same one for
# the masked, packed and single-block variants of a kernel: a sentence's bits would depend on which of them it met. The
# kernels that promise bits fuse where they say tl.fma and nowhere else.
FUSE_MULTIPLY_ADD = False


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """The tensor's device as the current one; Triton launches on that device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def launches_overlap(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one ahead of it has ended (programmatic dependent launch, from sm_90 on):
    it sets itself up and waits, which hides most of a launch. Unknown to the interpreter."""
    if triton_interprets():
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def early(overlap: bool) -> dict[str, bool]:
    """The option that launches a kernel ahead of time, for backends that know it."""
    return {"launch_pdl": True} if overlap else {}


def mask_arguments(attention_mask: Tensor | None) -> tuple[Tensor | None, int, int]:
    """The mask as the kernels read it (nonzero is real), and its strides."""
    if attention_mask is None:
        return None, 0, 0
    mask = attention_mask.view(torch.uint8) if attention_mask.dtype == torch.bool else attention_mask
    return mask, mask.stride(0), mask.stride(1)


def vector_of(features: int, dtype: torch.dtype) -> int:
    """Elements of the widest load that a row of so many features allows: a power of two, 16 bytes at the most."""
    return min(features & -features, _LOAD_BYTES // dtype.itemsize)


def dense(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Contiguous, as the kernels index what is no hidden state and no mask; in ``dtype`` where given."""
    if tensor is None:
        return None
    return (tensor if dtype is None else tensor.to(dtype)).contiguous()


@dataclass(frozen=True)
class HiddenStates:
    """N hidden states with common strides, rows that 128-bit loads can take, and the strides in units of ``vector``.

    Which loads a kernel uses, and so the order of its sums, must follow from D, M and the dtype alone. A tensor whose strides
    or address do not allow the loads that D and M allow, or differ from the others', is therefore cloned.
    """

    tensors: tuple[Tensor, ...]
    size: int  # D
    length: int  # L, or T
    stride_b: int
    stride_l: int
    vector: int  # elements of a load

    @staticmethod
    def of(hidden_states: Sequence[Tensor], packed: bool, frequencies: int) -> HiddenStates:
        first = hidden_states[0]
        size = first.shape[-1]
        vector = vector_of(size // frequencies, first.dtype)
        tensors = tuple(hidden_states)
        if not all(u.is_contiguous() and u.data_ptr() % _LOAD_BYTES == 0 for u in tensors):
            tensors = _alike(tensors, vector)
        strides = _row_strides(tensors[0])
        stride_b, stride_l = (0, strides[0]) if packed else strides
        length = first.shape[0] if packed else first.shape[1]
        return HiddenStates(tensors, size, length, stride_b // vector, stride_l // vector, vector)


def _row_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of all but the last dimension; 0 where there is but one row, whose stride says nothing."""
    return tuple(0 if n <= 1 else stride for n, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True))


def _alike(tensors: tuple[Tensor, ...], vector: int) -> tuple[Tensor, ...]:
    """The tensors with the first one's strides where these suit, contiguous otherwise; what does not fit is cloned."""
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

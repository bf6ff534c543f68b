"""What a caller may pass, and the error that says otherwise: argument, what was expected, what came.

``arguments`` looks at Python types and option names and is called by the public functions; ``batch`` looks at tensors
and is called wherever they are about to be read: in the ops (also in their fake versions) and on the plain PyTorch path.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms

from . import dct
from .reference import ACTIVATIONS, GateParameters
from .tokens import POOLINGS

DEBUG_VARIABLE = "S2SENT_DEBUG"
_REQUIRED = ("down_weight", "down_bias", "up_weight", "up_bias")
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def positive_number(name: str, value: Any) -> None:
    number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def finite_state(name: str, module: torch.nn.Module) -> None:
    """What training ends with: a ValueError where it diverged, since such a module is of no use to anybody."""
    for key, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: training diverged, {key} is not finite any more: a lower learning rate may help")


def shaped(name: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
    if tensor is not None and list(tensor.shape) != list(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")


def buffer(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """A tensor that an op writes into."""
    shaped(name, tensor, shape)
    for what, expected in (("dtype", dtype), ("device", device)):
        if getattr(tensor, what) != expected:
            raise ValueError(f"{name}: expected {what} {expected}, got {getattr(tensor, what)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")


def option(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {tuple(allowed)}, got {value!r}")


def components(num_blocks: int, hidden_size: int, frequencies: int, profile: str) -> None:
    """N, D, M and the profile fit one another."""
    option("profile", profile, dct.PROFILES)
    positive_int("frequencies", frequencies)
    dct.frequency_pairs(num_blocks, frequencies, profile)
    if hidden_size % frequencies:
        raise ValueError(
            f"frequencies: the hidden size D must be divisible by M, got D = {hidden_size} and M = {frequencies}"
        )


def arguments(
    hidden_states: Any,
    attention_mask: Any,
    cu_seqlens: Any,
    pooling: Any = None,
    profile: Any = "paper",
    activation: Any = "tanh",
) -> None:
    """Types and option names, before anything looks at a tensor's contents."""
    if isinstance(hidden_states, Tensor) or not isinstance(hidden_states, Sequence):
        raise TypeError(f"hidden_states: expected a sequence of N tensors, got {type(hidden_states).__name__}")
    for index, value in enumerate(hidden_states):
        if not isinstance(value, Tensor):
            raise TypeError(f"hidden_states[{index}]: expected a tensor, got {type(value).__name__}")
    for name, value in (("attention_mask", attention_mask), ("cu_seqlens", cu_seqlens)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {type(value).__name__}")
    option("profile", profile, dct.PROFILES)
    option("activation", activation, ACTIVATIONS)
    if pooling is not None:
        option("pooling", pooling, POOLINGS)
    forward_mode(hidden_states)


def forward_mode(tensors: Sequence[Tensor | None]) -> None:
    """Refuse forward-mode derivatives: an op without a formula for them would silently give zeros."""
    if torch.autograd.forward_ad._current_level < 0:
        return
    functorch = torch._C._functorch
    if eager_transforms.JVP_NESTING and functorch.peek_interpreter_stack() is None:
        # Inside an op that torch.func.jvp called the tangents are out of sight.
        raise NotImplementedError("s2sent: forward-mode derivatives are not implemented")
    for tensor in tensors:
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError("s2sent: forward-mode derivatives are not implemented")


def batch(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int = 1,
    profile: str = "paper",
) -> None:
    """Shapes, dtypes and devices of a batch of hidden states: [B, L, D] each, or [T, D] with ``cu_seqlens`` [B + 1].

    Raises:
        ValueError: shapes, dtypes or devices are wrong or disagree; names the argument, what was expected, what came.
        TypeError: a tensor's dtype is of the wrong kind.
    """
    if len(hidden_states) == 0:
        raise ValueError("hidden_states: expected at least one tensor, got none")
    first = hidden_states[0]
    packed = cu_seqlens is not None
    if packed and attention_mask is not None:
        raise ValueError("attention_mask: expected None beside cu_seqlens (packed tokens are all real), got both")
    if packed and profile == "official":
        raise ValueError("cu_seqlens: profile 'official' pools the padded plane and has no packed form")
    if first.dim() != (2 if packed else 3):
        wanted = "[T, D]" if packed else "[B, L, D]"
        hint = "" if packed or first.dim() != 2 else " (packed tokens need cu_seqlens)"
        raise ValueError(f"hidden_states[0]: expected shape {wanted}{hint}, got {list(first.shape)}")
    if first.dtype not in FLOATING:
        raise TypeError(f"hidden_states[0]: expected a floating dtype, got {first.dtype}")
    shape, dtype, device = first.shape, first.dtype, first.device
    for index, other in enumerate(hidden_states):
        if other.shape != shape or other.dtype != dtype or other.device != device:
            _disagreement(index, other, first)
    positive_int("the hidden size (last dimension of hidden_states)", first.shape[-1])
    components(len(hidden_states), first.shape[-1], frequencies, profile)
    if attention_mask is not None:
        _mask(attention_mask, first)
    if cu_seqlens is not None:
        _cu_seqlens(cu_seqlens, first)


def _disagreement(index: int, other: Tensor, first: Tensor) -> None:
    for what in ("shape", "dtype", "device"):
        expected, came = getattr(first, what), getattr(other, what)
        if what == "shape":
            expected, came = list(expected), list(came)
        if came != expected:
            raise ValueError(f"hidden_states[{index}]: expected {what} {expected} as hidden_states[0], got {came}")


def _mask(mask: Tensor, first: Tensor) -> None:
    if mask.shape != first.shape[:2]:
        raise ValueError(f"attention_mask: expected shape [B, L] = {list(first.shape[:2])}, got {list(mask.shape)}")
    if mask.dtype.is_complex:
        raise TypeError(f"attention_mask: expected bool, integer or float 0/1, got {mask.dtype}")
    if mask.device != first.device:
        raise ValueError(f"attention_mask: expected device {first.device} as hidden_states[0], got {mask.device}")


def _cu_seqlens(cu_seqlens: Tensor, first: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape [B + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.device != first.device:
        raise ValueError(f"cu_seqlens: expected device {first.device} as hidden_states[0], got {cu_seqlens.device}")


def cu_seqlens_values(cu_seqlens: Tensor | None, num_tokens: int) -> None:
    """What stands in ``cu_seqlens``: starts at 0, never decreases, ends at T. Reading a CUDA tensor waits for the GPU, so
    there it is done only under S2SENT_DEBUG=1."""
    if cu_seqlens is None or (cu_seqlens.device.type != "cpu" and os.environ.get(DEBUG_VARIABLE) != "1"):
        return
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {values[0]}")
    for index in range(1, len(values)):
        if values[index] < values[index - 1]:
            raise ValueError(
                f"cu_seqlens: expected not to decrease, got {values[index - 1]} then {values[index]} at {index}"
            )
    if values[-1] != num_tokens:
        raise ValueError(f"cu_seqlens: expected to end at T = {num_tokens}, got {values[-1]}")


def squeezed(squeezed: Any) -> None:
    if not isinstance(squeezed, Tensor):
        raise TypeError(f"squeezed: expected a tensor, got {type(squeezed).__name__}")
    if squeezed.dim() != 2:
        raise ValueError(f"squeezed: expected shape [B, D], got {list(squeezed.shape)}")
    if squeezed.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"squeezed: expected torch.float32 or torch.float64, got {squeezed.dtype}")


def gates(gates: Tensor, hidden_states: Sequence[Tensor], cu_seqlens: Tensor | None) -> None:
    first = hidden_states[0]
    batch_size = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = [batch_size, len(hidden_states), first.shape[-1]]
    if list(gates.shape) != expected:
        raise ValueError(f"gates: expected shape [B, N, D] = {expected}, got {list(gates.shape)}")
    if gates.dtype not in FLOATING:
        raise TypeError(f"gates: expected a floating dtype, got {gates.dtype}")
    if gates.device != first.device:
        raise ValueError(f"gates: expected device {first.device} as hidden_states[0], got {gates.device}")


def parameter_types(parameters: Any) -> None:
    """A GateParameters of tensors: what an op's schema would otherwise refuse in words of its own."""
    if not isinstance(parameters, GateParameters):
        raise TypeError(f"parameters: expected GateParameters, got {type(parameters).__name__}")
    for name, tensor in zip(GateParameters._fields, parameters, strict=True):
        if not isinstance(tensor, Tensor) and (tensor is not None or name in _REQUIRED):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def gate_parameters(parameters: GateParameters, num_blocks: int, hidden_size: int, device: torch.device) -> None:
    """Types, shapes and devices of the gate's tensors; H is read off ``down_weight``."""
    parameter_types(parameters)
    if parameters.down_weight.dim() != 2:
        raise ValueError(f"down_weight: expected shape [H, D], got {list(parameters.down_weight.shape)}")
    width, both = parameters.down_weight.shape[0], num_blocks * hidden_size
    expected = {
        "down_weight": [width, hidden_size], "down_bias": [width], "up_weight": [both, width], "up_bias": [both],
        "norm_weight": [both], "norm_bias": [both], "running_mean": [both], "running_var": [both],
        "block_prior": [num_blocks],
    }  # fmt: skip
    norm = ["norm_weight", "norm_bias", "running_mean", "running_var"]
    present = [name for name in norm if getattr(parameters, name) is not None]
    if present and present != norm:
        missing = next(name for name in norm if name not in present)
        raise ValueError(f"{missing}: expected all four tensors of the norm or none, got {', '.join(present)}")
    for name, shape in expected.items():
        tensor = getattr(parameters, name)
        if tensor is None:
            continue
        if list(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device} as the hidden states, got {tensor.device}")

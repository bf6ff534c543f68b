"""What a caller may pass. Every error names the argument, what was expected, and what was passed.

What is checked where, once in a call:

    where                       what                                                                by
    functional, S2SentSelector  Python types, tensors without strides; a word that is no string     ``types``, ``word``
    functional, engine chosen   forward mode of the tensors, unless plain PyTorch computes          ``forward_mode``
                                tensors inside torch.func's transforms, likewise                    ``transforms``
    an op, also its fake        words and numbers; shapes, dtypes and devices of tensors; N, D, M   ``batch``, ``gate``
      (and functional, where plain PyTorch computes and no op does)
    an op alone                 forward mode: plain PyTorch has it, also for the gate's parameters  ``forward_mode``
    an op, with values at hand  what ``cu_seqlens`` and a mask of numbers hold                      ``token_values``
    a backward op               words, the batch's layout, the shapes of the gradients it receives  ``layout``, ...
    BlockwisePool               at the first block what the op ``squeeze_block`` checks; later      ``tensors``, ...
                                only that a block is like the first
    S2SentSelector              its options when it is made; N and D of a call                      ``components``, ``option``
    the gate                    in training two sentences or more, before they are counted              ``batch_statistics``
    a selector's plan           nothing: a call that is not as expected takes the way above
    an engine                   its limits, before the choice falls on it                           ``refuses``
    csrc/bindings               memory safety: sizes, strides and ranges that kernels rely on

An op judges words although functional's callers pass right ones: it is public itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .derivatives import forward_mode as forward_mode
from .derivatives import no_transform as no_transform
from .derivatives import transforms as transforms
from .formula import dct
from .formula.call import (
    ACTIVATIONS,
    DTYPES,
    POOLINGS,
    PROFILES,
    Batch,
    GateParameters,
    Gating,
    HiddenGradients,
    Layout,
    Profile,
    Reading,
)
from .scalars import at_least_zero as at_least_zero
from .scalars import device as device
from .scalars import dtype as dtype
from .scalars import finite_number as finite_number
from .scalars import flag as flag
from .scalars import number as number
from .scalars import option as option
from .scalars import positive_int as positive_int
from .scalars import positive_number as positive_number
from .scalars import share as share
from .scalars import word as word
from .scalars import working_device as working_device

DEBUG_VARIABLE = "S2SENT_DEBUG"
_REQUIRED = GateParameters.required()


def batch_for_norm(name: str, size: int, module: torch.nn.Module) -> None:
    """Before training: a ValueError where ``module`` has a batch norm and batches are of one example."""
    if size == 1 and any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in module.modules()):
        raise ValueError(
            f"{name}: expected 2 or more, since the gate's batch norm has no statistics of one example, got 1"
        )


def batch_statistics(num_sentences: int) -> None:
    """A ValueError where a batch norm that uses the batch's own statistics gets one sentence. An empty batch changes nothing."""
    if num_sentences == 1:
        raise ValueError(
            "gate_norm: expected 2 or more sentences in a batch, since in training the batch norm has no statistics of one, got "
            "1. Leave out such a last batch (dataloader_drop_last=True of a trainer, drop_last=True of a DataLoader), or train "
            "with gate_norm=None, or with the running statistics: selector.norm.eval() after train()"
        )


def finite_state(name: str, module: torch.nn.Module) -> None:
    """After training: a ValueError where it diverged, because such a module is of no use."""
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


def components(num_blocks: int, hidden_size: int, frequencies: int, profile: str) -> None:
    """N, D, M and the profile fit one another."""
    option("profile", profile, PROFILES)
    positive_int("frequencies", frequencies)
    dct.frequency_pairs(num_blocks, frequencies, profile)
    if hidden_size % frequencies:
        raise ValueError(
            f"frequencies: the hidden size D must be divisible by M, got D = {hidden_size} and M = {frequencies}"
        )


def tensor(name: str, value: Any, what: str = "a tensor") -> None:
    """A tensor with strides. Of others most of what is read here, shapes first, raises without a name."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")
    if value.is_nested or value.is_quantized or value.layout is not torch.strided:
        kind = "a nested" if value.is_nested else "a quantised" if value.is_quantized else f"a {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind} tensor")


def token_types(attention_mask: Any, cu_seqlens: Any) -> None:
    for name, value in (("attention_mask", attention_mask), ("cu_seqlens", cu_seqlens)):
        if value is not None:
            tensor(name, value, "a tensor or None")


def types(hidden_states: Any, attention_mask: Any, cu_seqlens: Any, expected_blocks: int | None = None) -> Batch:
    """The batch, where its parts are of the right Python types and, if given, its hidden states as many as expected."""
    if isinstance(hidden_states, Tensor):
        raise TypeError(
            "hidden_states: expected a sequence of N tensors, got a Tensor: of one that is stacked pass hidden_states.unbind()"
        )
    if not isinstance(hidden_states, Sequence):
        raise TypeError(f"hidden_states: expected a sequence of N tensors, got {type(hidden_states).__name__}")
    for index, value in enumerate(hidden_states):
        tensor(f"hidden_states[{index}]", value)
    token_types(attention_mask, cu_seqlens)
    if expected_blocks is not None and len(hidden_states) != expected_blocks:
        one_more = ": an encoder's own begin with its embeddings, pass hidden_states[1:]"
        raise ValueError(
            f"hidden_states: expected {expected_blocks} tensors, one for each block, got {len(hidden_states)}"
            f"{one_more if len(hidden_states) == expected_blocks + 1 else ''}"
        )
    if len(hidden_states) == 0:
        raise ValueError("hidden_states: expected at least one tensor, got none")
    return Batch(hidden_states, attention_mask, cu_seqlens)


def batch(batch: Batch, reading: Reading) -> None:
    """Words, and shapes, dtypes and devices of the hidden states: [B, L, D] each, or [T, D] with ``cu_seqlens`` [B + 1].

    Raises:
        ValueError: shapes, dtypes or devices are wrong or disagree; names the argument, what was expected and what was passed.
        TypeError: a tensor's dtype is of the wrong kind.
    """
    words(reading)
    tensors(batch, reading.profile)
    components(batch.num_blocks, batch.hidden_size, reading.frequencies, reading.profile)


def words(reading: Reading) -> None:
    option("profile", reading.profile, PROFILES)
    if reading.pooling is not None:
        option("pooling", reading.pooling, POOLINGS)


def tensors(batch: Batch, profile: Profile) -> None:
    """``batch`` without what depends on N and M: also for a single block of several."""
    if batch.num_blocks == 0:
        raise ValueError("hidden_states: expected at least one tensor, got none")
    first = batch.hidden_states[0]
    if batch.packed and batch.attention_mask is not None:
        raise ValueError("attention_mask: expected None beside cu_seqlens (packed tokens are all real), got both")
    if batch.packed and profile == "official":
        raise ValueError("cu_seqlens: profile 'official' pools the padded plane and has no packed form")
    if first.dim() != (2 if batch.packed else 3):
        wanted = "[T, D]" if batch.packed else "[B, L, D]"
        hint = "" if batch.packed or first.dim() != 2 else " (packed tokens need cu_seqlens)"
        raise ValueError(f"hidden_states[0]: expected shape {wanted}{hint}, got {list(first.shape)}")
    if first.dtype not in DTYPES:
        raise TypeError(f"hidden_states[0]: expected a floating dtype, got {first.dtype}")
    shape, dtype, device = first.shape, first.dtype, first.device
    for index, other in enumerate(batch.hidden_states):
        if other.shape != shape or other.dtype != dtype or other.device != device:
            _disagreement(index, other, first)
    positive_int("the hidden size (last dimension of hidden_states)", batch.hidden_size)
    tokens(batch)


def tokens(batch: Batch | Layout) -> None:
    """Mask or ``cu_seqlens``, where the hidden states are right."""
    if batch.attention_mask is not None:
        _mask(batch.attention_mask, batch.shape, batch.device)
    if batch.cu_seqlens is not None:
        _cu_seqlens(batch.cu_seqlens, batch.device)


def layout(layout: Layout, num_blocks: int, reading: Reading) -> None:
    """A batch without its hidden states, of which a backward op is told the shape alone."""
    words(reading)
    if layout.packed and layout.attention_mask is not None:
        raise ValueError("attention_mask: expected None beside cu_seqlens (packed tokens are all real), got both")
    if layout.packed and reading.profile == "official":
        raise ValueError("cu_seqlens: profile 'official' pools the padded plane and has no packed form")
    shape = list(layout.shape)
    if len(shape) != (2 if layout.packed else 3) or any(size < 0 for size in shape):  # min() would become a guard
        raise ValueError(f"shape: expected {'[T, D]' if layout.packed else '[B, L, D]'}, got {shape}")
    if layout.dtype not in DTYPES:
        raise TypeError(f"dtype: expected a floating dtype, got {layout.dtype}")
    positive_int("the hidden size (last dimension of shape)", shape[-1])
    if num_blocks == 0:
        raise ValueError("needed: expected an entry for each hidden state, got none")
    tokens(layout._replace(shape=tuple(shape)))  # which a mask's shape can equal, unlike a list
    components(num_blocks, shape[-1], reading.frequencies, reading.profile)


def _disagreement(index: int, other: Tensor, first: Tensor) -> None:
    for what in ("shape", "dtype", "device"):
        expected, found = getattr(first, what), getattr(other, what)
        if what == "shape":
            expected, found = list(expected), list(found)
        if found != expected:
            raise ValueError(f"hidden_states[{index}]: expected {what} {expected} as hidden_states[0], got {found}")


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is on a device, which may be "cuda" without a number where a backward op is told one."""
    found = tensor.device
    return found.type == device.type and (found.index == device.index or device.index is None)


def _mask(mask: Tensor, shape: Sequence[int], device: torch.device) -> None:
    if mask.shape != shape[:2]:
        raise ValueError(f"attention_mask: expected shape [B, L] = {list(shape[:2])}, got {list(mask.shape)}")
    if mask.dtype.is_complex:
        raise TypeError(f"attention_mask: expected bool, integer or float 0/1, got {mask.dtype}")
    if mask.device != device and not _is_on(mask, device):
        raise ValueError(f"attention_mask: expected device {device} as hidden_states[0], got {mask.device}")


def _cu_seqlens(cu_seqlens: Tensor, device: torch.device) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape [B + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.device != device and not _is_on(cu_seqlens, device):
        raise ValueError(f"cu_seqlens: expected device {device} as hidden_states[0], got {cu_seqlens.device}")


def token_values(batch: Batch | Layout) -> None:
    """What the tensors hold that say which tokens are real, as far as it can be read: a compiler judges nothing, and the ops do
    when they run. Reading a CUDA tensor waits for the GPU, so there only masks of floats are judged, which are rarely anything
    else than what attention adds to its scores; under S2SENT_DEBUG=1 all are."""
    if torch.compiler.is_compiling():
        return
    mask, cu_seqlens = batch.attention_mask, batch.cu_seqlens
    try:
        if mask is not None and mask.dtype.is_signed and _is_read(mask, mask.is_floating_point()):
            _mask_values(mask)
        if cu_seqlens is not None and _is_read(cu_seqlens, False):
            _cu_seqlens_values(cu_seqlens, batch.shape[0])
    except RuntimeError:  # a tensor that has a shape alone, as a fake one's and inside torch.func.vmap
        return


def _is_read(tensor: Tensor, waited_for: bool) -> bool:
    if tensor.device.type == "cpu":
        return True
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return waited_for or os.environ.get(DEBUG_VARIABLE) == "1"


def _mask_values(mask: Tensor) -> None:
    """Refuse the mask that attention adds to its scores, 0 at real tokens and a negative number at padding: where nonzero means
    real, it would say the opposite."""
    if (mask < 0).any():
        raise ValueError(
            "attention_mask: expected nonzero at real tokens and 0 at padding, got negative numbers, as in a mask that attention "
            "adds to its scores: pass (attention_mask == 0)"
        )


def _cu_seqlens_values(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Starts at 0, never decreases, ends at T."""
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
    tensor("squeezed", squeezed)
    if squeezed.dim() != 2:
        raise ValueError(f"squeezed: expected shape [B, D], got {list(squeezed.shape)}")
    if squeezed.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"squeezed: expected torch.float32 or torch.float64, got {squeezed.dtype}")


def gates(gates: Tensor, batch: Batch) -> None:
    expected = [batch.num_sentences, batch.num_blocks, batch.hidden_size]
    if list(gates.shape) != expected:
        raise ValueError(f"gates: expected shape [B, N, D] = {expected}, got {list(gates.shape)}")
    if gates.dtype not in DTYPES:
        raise TypeError(f"gates: expected a floating dtype, got {gates.dtype}")
    if gates.device != batch.device:
        raise ValueError(f"gates: expected device {batch.device} as hidden_states[0], got {gates.device}")


def gate(parameters: GateParameters, gating: Gating, num_blocks: int, like: Tensor) -> None:
    """Words, numbers and the gate's tensors, for f or hidden states ``like``, which lie on their device and have their D."""
    option("activation", gating.activation, ACTIVATIONS)
    option("profile", gating.profile, PROFILES)
    (positive_number if gating.training else at_least_zero)("eps", gating.eps)  # as torch's batch norm
    if gating.profile == "official":
        for name in ("block_prior", "gate_scale"):
            if getattr(parameters, name) is not None:
                raise ValueError(f"{name}: profile 'official' has none")
    gate_parameters(parameters, num_blocks, like.shape[-1], like.device)


def select(inputs: Batch, reading: Reading, parameters: GateParameters, gating: Gating) -> None:
    """The whole selector, in the ops that compute it."""
    batch(inputs, reading)
    gate(parameters, gating, inputs.num_blocks, inputs.hidden_states[0])
    forward_mode((*inputs.hidden_states, *parameters))


def hidden_gradients(grads: HiddenGradients, layout: Layout, num_blocks: int) -> None:
    """A HiddenGradients, by the names that the op's schema gives its tensors."""
    rows, size = layout.num_sentences, layout.hidden_size
    received("grad_squeezed", grads.squeezed, (rows, size), layout.device)
    received("grad_pooled", grads.pooled, (rows, num_blocks, size), layout.device)
    received("grad_fused", grads.fused, layout.shape, layout.device)
    received("gates", grads.gates, (rows, num_blocks, size), layout.device)


def received(name: str, tensor: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """What a backward op is passed beside the arguments of its forward op."""
    shaped(name, tensor, shape)
    if tensor is not None and tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if tensor is not None and tensor.device != device and not _is_on(tensor, device):
        raise ValueError(f"{name}: expected device {device} as the other tensors, got {tensor.device}")


def parameter_types(parameters: Any) -> None:
    """A GateParameters of tensors: an op's schema would refuse anything else without naming the argument."""
    if not isinstance(parameters, GateParameters):
        raise TypeError(f"parameters: expected GateParameters, got {type(parameters).__name__}")
    for name, value in zip(GateParameters._fields, parameters, strict=True):
        if value is not None or name in _REQUIRED:
            tensor(name, value)


def gate_parameters(parameters: GateParameters, num_blocks: int, hidden_size: int, device: torch.device) -> None:
    """Shapes, dtypes and devices of the gate's tensors; H is read off ``down_weight``."""
    if parameters.down_weight.dim() != 2:
        raise ValueError(f"down_weight: expected shape [H, D], got {list(parameters.down_weight.shape)}")
    expected = GateParameters.shapes(num_blocks, hidden_size, parameters.bottleneck)
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
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device} as the hidden states, got {tensor.device}")

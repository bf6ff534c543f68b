"""Derivatives and transforms that the ops do not have, and plain PyTorch has: each is refused in words of this package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._functorch import eager_transforms

_TRANSFORMED = (
    "s2sent: torch.func.grad, vmap, jvp and what is built on them are implemented by backend='reference' alone; "
    "torch.autograd.grad differentiates every backend"
)


def forward_mode(tensors: Sequence[Tensor | None]) -> None:
    """Refuse forward-mode derivatives: an op without a formula for them would silently give zeros."""
    if torch.autograd.forward_ad._current_level < 0:
        return
    functorch = torch._C._functorch
    if eager_transforms.JVP_NESTING and functorch.peek_interpreter_stack() is None:
        # Inside an op called under torch.func.jvp the tangents cannot be seen.
        raise NotImplementedError("s2sent: forward-mode derivatives are not implemented")
    for tensor in tensors:
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError("s2sent: forward-mode derivatives are not implemented")


def transforms(tensors: Iterable[Tensor | None], mapped: bool = False) -> None:
    """Refuse tensors that torch.func transforms, of which no op knows: torch's error names neither op nor remedy. ``mapped``: not
    under vmap alone, where torch can call the op once for each slice."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is None:
        return
    for tensor in tensors:
        if tensor is None:
            continue
        if functorch.is_gradtrackingtensor(tensor) or (functorch.is_batchedtensor(tensor) and not mapped):
            raise NotImplementedError(_TRANSFORMED)


def no_transform() -> None:
    """Refuse torch.func's transforms of any tensor: inside of one torch runs no autograd function of the older form."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(_TRANSFORMED)

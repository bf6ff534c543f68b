"""A selector in several processes: batch statistics, and parameters that FSDP2 has sharded.

In training the gate normalises by the sentences of all processes, as one process with the whole batch would.
torch's own norms are local, and so is a selector until ``sync_statistics`` marks it: a collective in one process alone would
wait for ever. The norm stays an nn.BatchNorm1d, so that in eval mode nothing changes and the fused kernels run.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .plan import count_batch


class Processes(NamedTuple):
    """Those whose batches are counted together."""

    group: Any  # a torch.distributed.ProcessGroup; None: all processes

    @property
    def are_several(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1


class Joinable(nn.Module):
    """A module whose batch statistics can be those of several processes: S2SentSelector."""

    processes: Processes | None = None


def sync_statistics(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Let every S2SentSelector in ``module`` take its gate's batch statistics over all processes of a group. In training each of
    them must then call it as often as the others, with any number of sentences, none included. Gradients are those of the sum
    of the processes' losses, as DistributedDataParallel expects.

    The gate is plain PyTorch there, on any device that ``process_group`` serves: gloo or NCCL. Copies and pickles of a
    selector are local until they are marked themselves.

    Args:
        module: a selector, or a module with selectors somewhere in it; changed in place.
        process_group: None is the default group, also one that is initialised later.

    Returns:
        ``module``.

    Raises:
        ValueError: there is no selector in ``module``.
    """
    selectors = [part for part in module.modules() if isinstance(part, Joinable)]
    if not selectors:
        raise ValueError(f"module: expected a selector somewhere in it, got {type(module).__name__} without")
    for selector in selectors:
        selector.processes = Processes(process_group)
    return module


def gathers(module: nn.Module, method: str) -> bool:
    """Whether FSDP2 gathers the parameters of ``module`` around a method from now on, as it does around ``forward``: it has
    sharded the module as a unit of its own, and nobody has registered the method yet. The caller then calls it again."""
    if torch.compiler.is_compiling():
        return False
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded before it is imported
    if fsdp is None or method in module.__dict__ or not isinstance(module, fsdp.FSDPModule):
        return False
    fsdp.register_fsdp_forward_method(module, method)
    return True


def refuse_shard(name: str, part: nn.Module) -> None:
    """ValueError where a part's weight is one process's share: outside of the forward of the module that FSDP2 has sharded."""
    if torch.compiler.is_compiling():
        return
    tensor = sys.modules.get("torch.distributed.tensor")
    # Whoever shards a part's computation (tensor parallelism) converts what goes in and out by hooks on the part.
    if tensor is not None and isinstance(getattr(part, "weight", None), tensor.DTensor) and not part._forward_pre_hooks:
        raise ValueError(
            f"{name}: expected parameters that FSDP2 has gathered, got a shard of them: call the selector within the forward of "
            "the module that was given to fully_shard, or give it the selector, too"
        )


def batch_norm(norm: nn.BatchNorm1d, values: Tensor, processes: Processes) -> Tensor:
    """``norm`` of [B, C] in training mode by the mean and the variance of all processes' rows, [B, C] in the dtype of ``values``.
    Updates the running statistics as nn.BatchNorm1d does, by the same amount in every process."""
    rows = values.new_tensor([values.shape[0]])
    sums = _Sum.apply(torch.cat([values.sum(dim=0), rows]), processes.group)
    count = sums[-1].detach()
    if values.shape[0] < 2 and count < 2:  # read on the host only where it may be
        raise ValueError(
            f"expected two sentences or more over all processes in training with batch norm, got {int(count)}"
        )
    mean = sums[:-1] / count
    centred = values - mean
    variance = _Sum.apply(centred.square().sum(dim=0), processes.group) / count
    if norm.running_mean is not None and norm.running_var is not None:
        momentum = count_batch(norm)
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
            norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), momentum)
    normed = centred * (variance + norm.eps).rsqrt()
    if norm.weight is None:
        return normed
    return normed * norm.weight.to(values.dtype) + norm.bias.to(values.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the processes. Each of them has a part in every process's result, so the gradient is a sum, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient.contiguous(), ctx.group), None

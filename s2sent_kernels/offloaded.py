"""Modules whose parameters accelerate keeps elsewhere (``device_map``, ``cpu_offload``): in the host's memory or on a disk.

Accelerate loads them for a call of ``forward``, and leaves tensors on the device "meta" meanwhile.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def own_parameters(module: nn.Module) -> AbstractContextManager[Any]:
    """A context in which the parameters that are ``module``'s own, not its parts', are where it computes."""
    if "_hf_hook" not in module.__dict__ or torch.compiler.is_compiling():
        return nullcontext()
    return sys.modules["accelerate.utils"].align_module_device(module)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its first parameter is, or will be during a call."""
    first = next(module.parameters()).device
    if first.type != "meta":
        return first
    hooks = (part.__dict__.get("_hf_hook") for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(device) for device in devices if device is not None), first)

"""The selector of profile ``paper`` as a user would write it in PyTorch: the formulas in the hidden states' own dtype throughout.
Only the DCT's factors are computed in float64, and then rounded to that dtype. The yardstick of accuracy.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from s2sent_kernels import GateParameters
from s2sent_kernels.formula import dct

EPS = 1e-6  # of the batch norm


class Eager:
    """What does not depend on the hidden states' values. ``real`` is bool [B, L], with a real token in every sentence; M is
    ``frequencies``."""

    def __init__(self, real: Tensor, num_blocks: int, frequencies: int, dtype: torch.dtype) -> None:
        rank, self.length = real.cumsum(1) - 1, real.sum(1, keepdim=True)
        beta = dct.token_basis(rank, self.length.expand_as(rank), num_blocks, frequencies) * real[..., None]
        self.beta = beta.to(dtype)  # [B, L, M]
        self.alpha = dct.block_basis(num_blocks, frequencies, device=real.device).to(dtype)  # [M, N]
        self.real = real[..., None]
        self.frequencies = frequencies

    def squeeze(self, hidden_states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """f [B, D] and the mean p [B, N, D]"""
        f, p = torch.zeros((), device=self.beta.device), []
        for n, u in enumerate(hidden_states):
            u = u * self.real
            parts = u.unflatten(-1, (self.frequencies, -1))  # [B, L, M, D / M]
            f = f + ((parts * self.beta[..., None]).sum(1) * self.alpha[:, n, None]).flatten(1)
            p.append(u.sum(1) / self.length)
        return f, torch.stack(p, 1)

    def gate(self, f: Tensor, parameters: GateParameters, num_blocks: int) -> Tensor:
        """g [B, N, D]"""
        w = parameters
        s = torch.tanh(F.linear(f, w.down_weight, w.down_bias))
        z = F.linear(s, w.up_weight, w.up_bias)
        z = F.batch_norm(z, w.running_mean, w.running_var, w.norm_weight, w.norm_bias, False, 0.0, EPS)
        logits = torch.sigmoid(z).unflatten(1, (num_blocks, -1))
        if w.gate_scale is not None:
            logits = logits * w.gate_scale
        if w.block_prior is not None:
            logits = logits + w.block_prior[:, None]
        return logits.softmax(1)

    def fuse(self, hidden_states: list[Tensor], g: Tensor) -> Tensor:
        """v [B, L, D]"""
        v = torch.zeros((), device=g.device)
        for n, u in enumerate(hidden_states):
            v = v + g[:, n, None] * (u * self.real)
        return v

"""The selector's two profiles in plain PyTorch, as competitors: the reference's formulas, written for speed.

The reference is written to be read: it computes its bases for every block. Here they are buffers, as in the published module, and
the token factor of profile ``paper``, which depends on the mask, is computed once a call. So the competitors are at least as fast
as the reference, and can be captured as CUDA graphs: they copy nothing from the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from s2sent_kernels import S2SentSelector
from s2sent_kernels.formula import dct


def masked_mean(hidden_state: Tensor, mask: Tensor) -> Tensor:
    """The usual pooling, [B, L, D] and [B, L] to [B, D], by the operators that Pooling of sentence-transformers 6.2 calls."""
    dtype = hidden_state.dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    weight = mask.unsqueeze(-1).to(dtype)
    total = (hidden_state * weight).sum(dim=1, dtype=wide)
    count = torch.clamp(weight.sum(dim=1, dtype=wide), min=1e-9)
    return (total / count).to(dtype)


class Formula(nn.Module):
    """The pooled and the token path of ``selector`` on batches of L = ``tokens`` with a mask, in plain PyTorch. The selector's
    backend must be "reference", since it computes the gate."""

    def __init__(self, selector: S2SentSelector, tokens: int) -> None:
        super().__init__()
        if selector.backend != "reference":
            raise ValueError(f"selector: expected backend 'reference', got {selector.backend!r}")
        self.selector = selector
        device = selector.down.weight.device
        blocks, parts, profile = selector.num_blocks, selector.frequencies, selector.profile
        alpha = dct.block_basis(blocks, parts, profile, device).float()  # [M, N]
        self.register_buffer("alpha", alpha.T.repeat_interleave(selector.hidden_size // parts, 1))  # [N, D]
        if profile == "official":
            self.register_buffer("grid", dct.grid_token_basis(tokens, parts, device).float().T[None])  # [1, L, M]
        else:
            y = [pair[1] for pair in dct.frequency_pairs(blocks, parts)]
            self.register_buffer("y", torch.tensor(y, device=device))
            norm = [dct.GRID * (math.sqrt(2.0) if frequency else 1.0) / math.sqrt(blocks) for frequency in y]
            self.register_buffer("norm", torch.tensor(norm, device=device))

    def _beta(self, rank: Tensor, length: Tensor) -> Tensor:  # [B, L], [B, 1] -> [B, L, M] or [1, L, M]
        if self.selector.profile == "official":
            return self.grid
        period = length.clamp(min=1)[..., None]
        half_steps = (self.y * (2 * rank[..., None] + 1)) % (4 * period)
        wave = torch.cos(half_steps.float() * (math.pi / 2) / period.float())
        return (wave * self.norm / period.float()).masked_fill(self.y >= length[..., None], 0.0)

    def _per_part(self, values: Tensor, beta: Tensor) -> Tensor:
        return (values.unflatten(-1, (self.selector.frequencies, -1)) * beta[..., None]).flatten(-2)

    def _select(self, hidden_states: list[Tensor], mask: Tensor, pool: bool) -> tuple[Tensor, list[Tensor], Tensor]:
        """g [B, N, D], p_n [B, D] if ``pool``, and where padding is [B, L, 1]."""
        real = mask != 0
        running = real.cumsum(1)
        length = running[:, -1:]
        beta = self._beta(running - 1, length)
        weight = (1.0 / length.clamp(min=1).float()).expand_as(real).masked_fill(~real, 0.0)[..., None]
        padding = ~real[..., None]
        squeezed, pooled = torch.zeros((), device=mask.device), []
        for n, hidden_state in enumerate(hidden_states):
            values = hidden_state.float()
            real_values = values.masked_fill(padding, 0.0)
            seen = values if self.selector.profile == "official" else real_values
            squeezed = squeezed + self._per_part(seen, beta).sum(1) * self.alpha[n]
            if pool:
                pooled.append((real_values * weight).sum(1))
        return self.selector.gate(squeezed), pooled, padding

    def pooled(self, hidden_states: list[Tensor], mask: Tensor) -> Tensor:
        gates, pooled, _ = self._select(hidden_states, mask, True)
        return (gates * torch.stack(pooled, 1)).sum(1).to(hidden_states[0].dtype)

    def token(self, hidden_states: list[Tensor], mask: Tensor) -> Tensor:
        gates, _, padding = self._select(hidden_states, mask, False)
        fused = torch.zeros((), device=mask.device)
        for n, hidden_state in enumerate(hidden_states):
            fused = fused + gates[:, n, None] * hidden_state.float().masked_fill(padding, 0.0)
        return fused.to(hidden_states[0].dtype)

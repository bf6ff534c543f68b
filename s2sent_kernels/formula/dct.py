"""The 2-D DCT of frequency selection: which components exist, and their separable block and token bases.

A component is a frequency pair (x, y): x counts half waves along the N Transformer blocks, y along the tokens of a
sentence. Both profiles are separable, so a squeeze needs no N x L plane of weights, only

    alpha [M, N]            the block factor of every component
    beta  [B or 1, M, L]    its token factor

Source: arXiv 2508.18164, Figure 2 (profile ``paper``) and the authors' published code (profile ``official``); the order of
the frequency pairs is FcaNet's (arXiv 2012.11879).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .call import PROFILES, Profile

# FcaNet's order of the pairs (x along blocks, y along tokens).
_X = (0, 0, 1, 1, 0, 2, 2, 1, 2, 0, 3, 4, 0, 1, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4)
_Y = (0, 1, 0, 1, 2, 0, 1, 2, 2, 3, 0, 0, 4, 3, 1, 5, 4, 3, 2, 1, 0, 6, 5, 4, 3, 2, 1, 0, 6, 5, 4, 3)
FREQUENCY_TABLE = tuple(zip(_X, _Y, strict=True))

# The published code pools the plane onto GRID x GRID cells before its DCT. Profile ``paper`` has no grid but keeps its factor
# of 6, so that f has the magnitude for which the published learning rates and initialisations were chosen.
GRID = 6
OFFICIAL_FREQUENCIES = (1, 2, 4, 8, 16)


@functools.cache
def frequency_pairs(num_blocks: int, frequencies: int, profile: Profile = "paper") -> tuple[tuple[int, int], ...]:
    """The first ``frequencies`` pairs (x, y) that exist on ``num_blocks`` blocks.

    In profile ``paper`` a pair needs x < N, since a DCT over N blocks has N frequencies; in profile ``official`` the DCT
    runs over a 6 x 6 grid and every pair of the table's beginning exists.

    Raises:
        ValueError: ``profile`` is unknown, or the profile has no such number of components on that many blocks.
    """
    if profile == "official":
        if frequencies not in OFFICIAL_FREQUENCIES:
            raise ValueError(f"frequencies: profile 'official' has M in {OFFICIAL_FREQUENCIES}, got M = {frequencies}")
        return FREQUENCY_TABLE[:frequencies]
    if profile != "paper":
        raise ValueError(f"profile: expected one of {PROFILES}, got {profile!r}")
    pairs = tuple(pair for pair in FREQUENCY_TABLE if pair[0] < num_blocks)
    if not 1 <= frequencies <= len(pairs):
        raise ValueError(
            f"frequencies: N = {num_blocks} blocks have 1 to {len(pairs)} DCT components, got M = {frequencies}"
        )
    return pairs[:frequencies]


def cosine(frequency: Tensor, index: Tensor, period: Tensor | int) -> Tensor:
    """c(k, i, P) = cos(pi k (i + 1/2) / P) * (sqrt 2 if k > 0 else 1) / sqrt P, the orthonormal DCT-II, in float64.

    All three broadcast. The angle is reduced in integers, pi k (2i + 1) / 2P = pi j / 2P with j taken modulo 4P, which
    keeps every digit at any length.
    """
    half_steps = (frequency * (2 * index + 1)) % (4 * period)
    period64 = period.double() if isinstance(period, Tensor) else float(period)
    wave = torch.cos(half_steps.double() * (math.pi / 2) / period64)
    norm = 1.0 + (math.sqrt(2.0) - 1.0) * (frequency > 0).double()
    return wave * norm / (period64.sqrt() if isinstance(period64, Tensor) else math.sqrt(period64))


def _grid_weights(size: int, device: torch.device) -> Tensor:
    """[GRID, size]: the weights with which adaptive average pooling gathers ``size`` positions into GRID cells."""
    cell = torch.arange(GRID, device=device)
    start = (cell * size) // GRID
    end = ((cell + 1) * size + GRID - 1) // GRID
    index = torch.arange(size, device=device)
    inside = (index >= start[:, None]) & (index < end[:, None])
    return inside.double() / (end - start)[:, None].clamp(min=1).double()


def _grid_basis(frequency: Tensor, size: int) -> Tensor:
    """[M, size]: the DCT over GRID cells, carried back through adaptive average pooling to ``size`` positions."""
    cells = torch.arange(GRID, device=frequency.device)
    return cosine(frequency[:, None], cells, GRID) @ _grid_weights(size, frequency.device)


def block_basis(
    num_blocks: int, frequencies: int, profile: Profile = "paper", device: torch.device | None = None
) -> Tensor:
    """alpha [M, N] in float64: the block factor of each component."""
    x = torch.tensor([pair[0] for pair in frequency_pairs(num_blocks, frequencies, profile)], device=device)
    if profile == "official":
        return _grid_basis(x, num_blocks)
    return cosine(x[:, None], torch.arange(num_blocks, device=device), num_blocks)


def token_basis(rank: Tensor, length: Tensor, num_blocks: int, frequencies: int) -> Tensor:
    """beta [..., M] in float64 of profile ``paper``: 6 / sqrt(N l) * c(y_m, rank, l), and 0 where y_m >= l.

    Args:
        rank: integers [...], a token's place among its sentence's real tokens, from 0.
        length: integers [...], the number of real tokens of that sentence; where it is 0 the result is 0.
        num_blocks: N.
        frequencies: M.
    """
    y = torch.tensor([pair[1] for pair in frequency_pairs(num_blocks, frequencies)], device=rank.device)
    period = length.clamp(min=1)[..., None]
    scale = GRID / (num_blocks * period.double()).sqrt()
    exists = y < length[..., None]
    return torch.where(exists, scale * cosine(y, rank[..., None], period), 0.0)


def grid_token_basis(tokens: int, frequencies: int, device: torch.device | None = None) -> Tensor:
    """beta [M, L] in float64 of profile ``official``: all L positions, padding included, through a grid of 6 cells."""
    y = torch.tensor([pair[1] for pair in frequency_pairs(GRID, frequencies, "official")], device=device)
    return _grid_basis(y, tokens)

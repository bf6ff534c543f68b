"""W1 f by feature tiles: the end of squeeze's programs, and the same for blocks that were squeezed one at a time.

    t[b,i,h] = sum_{d in tile i} W1[h,d] f[b,d]         W1 f is its sum over the tiles, which the gate adds up

A program of squeeze ends with its tile's f in registers, and needs only its slice of W1. The gate would have to read all of
W1 in every program.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .direct import direct
from .launch import FUSE_MULTIPLY_ADD, dense, vector_of


@triton.jit
def down_weight_rows(
    p_down_weight, FIRST: tl.constexpr, o_d, m_d, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr
):
    """W1[FIRST : FIRST + BLOCK_H, o_d], [BLOCK_H, BLOCK_D]."""
    o_h = FIRST + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    m_w = (o_h < H)[:, None] & m_d[None, :]
    return tl.load(p_down_weight + o_h[:, None] * D + o_d[None, :], mask=m_w, other=0.0)


@triton.jit
def store_bottleneck(p_bottleneck, FIRST: tl.constexpr, w, f, m_d, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """t[h] = sum_d W1[h,d] f[d] over one feature tile, for the rows ``w`` of W1. f, m_d: [BLOCK_D]."""
    o_h = FIRST + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    product = tl.where(m_d[None, :], w.to(tl.float32) * f[None, :], 0.0)  # [BLOCK_H, BLOCK_D]
    tl.store(p_bottleneck + o_h, tl.sum(product, axis=1), mask=o_h < H)


@triton.jit
def sum_groups_kernel(
    p_groups,  # [B, GROUPS, D] float32
    p_squeezed,  # [B, D] float32
    p_down_weight,  # [H, D] or None
    p_bottleneck,  # [B, M * TILES, H] float32, with p_down_weight
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The end of squeeze's programs, for blocks that were squeezed one at a time: f, and t of one feature tile."""
    PART: tl.constexpr = D // M
    TILES: tl.constexpr = (PART + BLOCK_D - 1) // BLOCK_D
    index = tl.program_id(0).to(tl.int64)
    i_tile = (index % (M * TILES)).to(tl.int32)
    i_b = index // (M * TILES)
    o_part = (i_tile % TILES) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_d = o_part < PART
    o_d = i_tile // TILES * PART + o_part
    f = tl.zeros([BLOCK_D], tl.float32)
    for group in tl.static_range(GROUPS):
        f += tl.load(p_groups + (i_b * GROUPS + group) * D + o_d, mask=m_d, other=0.0)
    tl.store(p_squeezed + i_b * D + o_d, f, mask=m_d)
    if p_down_weight is not None:
        for h in tl.static_range(0, H, BLOCK_H):
            w = down_weight_rows(p_down_weight, h, o_d, m_d, H, D, BLOCK_H)
            store_bottleneck(p_bottleneck + index * H, h, w, f, m_d, H, BLOCK_H)


# ---------------------------------------------------------------- launchers

launch_sum_groups = direct(sum_groups_kernel)


class Squeezed(NamedTuple):
    """What squeeze hands to the gate."""

    f: Tensor  # [B, D] float32
    pooled: Tensor | None  # p [B, N, D] float32, with a pooling
    bottleneck: Tensor | None  # t [B, feature tiles, H] float32, if the gate's W1 was given


def bottleneck_like(squeezed: Tensor, down_weight: Tensor, frequencies: int, vector: int) -> Tensor:
    tiles = config.num_tiles(squeezed.shape[1], frequencies, vector)
    return squeezed.new_empty(squeezed.shape[0], tiles, down_weight.shape[0])


def sum_groups(squeezed_groups: Tensor) -> Tensor:
    """f [B, D] from its partial sums [B, G, D]."""
    return sum_groups_for_gate(squeezed_groups, 1, torch.float32, None).f


def sum_groups_for_gate(
    squeezed_groups: Tensor, frequencies: int, dtype: torch.dtype, down_weight: Tensor | None
) -> Squeezed:
    """f, and W1's products with it, from the partial sums [B, G, D] of hidden states of ``dtype``."""
    num_sentences, groups, hidden_size = squeezed_groups.shape
    vector = vector_of(hidden_size // frequencies, dtype)
    squeezed = squeezed_groups.new_empty(num_sentences, hidden_size)
    bottleneck = None if down_weight is None else bottleneck_like(squeezed, down_weight, frequencies, vector)
    if num_sentences == 0:
        return Squeezed(squeezed, None, bottleneck)
    tile = config.squeeze(hidden_size // frequencies, vector, groups)
    launch_sum_groups(
        num_sentences * config.num_tiles(hidden_size, frequencies, vector),
        p_groups=squeezed_groups,
        p_squeezed=squeezed,
        p_down_weight=dense(down_weight),
        p_bottleneck=bottleneck,
        GROUPS=groups,
        D=hidden_size,
        M=frequencies,
        H=0 if down_weight is None else down_weight.shape[0],
        BLOCK_D=tile.block_d,
        BLOCK_H=config.bottleneck_rows(groups),
        num_warps=groups,  # as squeeze has: the tree that sums a tile's features is laid out over them
        enable_fp_fusion=FUSE_MULTIPLY_ADD,
    )
    return Squeezed(squeezed, None, bottleneck)

"""fuse: v from the gates and the hidden states, one read and one write; and the gates' gradient.

v[b,l,d] = sum_n g[b,n,d] u_n[b,l,d], blocks ascending, 0 at padding
dg[b,n,d] = sum_l dv[b,l,d] u_n[b,l,d] over real tokens, in the order of summation of squeeze
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import block_pointer, real_span, sentence_at, sum_rows
from .launch import FUSE_MULTIPLY_ADD, HiddenStates, dense, device_of, mask_arguments

_RUNTIME = ["size", "stride_b", "stride_l", "stride_mask_b", "stride_mask_l", "num_sentences"]
_UNALIGNED = ["p_mask", "p_cu_seqlens"]


@triton.jit
def weighted_sum(p_hidden, p_gates, o_u, o_d, m_row, m_d, i_b, N: tl.constexpr, D: tl.constexpr):
    """v of one sentence's rows of a token tile. o_u: [TOKENS, BLOCK_D] offsets; m_row: [TOKENS], its real rows."""
    m_u = m_row[:, None] & m_d[None, :]  # [TOKENS, BLOCK_D]
    v = tl.zeros(m_u.shape, tl.float32)
    for n in tl.static_range(N):
        g = tl.load(p_gates + (i_b * N + n) * D + o_d, mask=m_d, other=0.0)  # [BLOCK_D]
        u = tl.load(p_hidden[n] + o_u, mask=m_u, other=0.0, eviction_policy="evict_first")  # [TOKENS, BLOCK_D]
        v = tl.fma(tl.broadcast_to(g[None, :], v.shape), u.to(tl.float32), v)
    return tl.where(m_u, v, 0.0)  # a gate that is NaN must not reach padding


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_UNALIGNED)
def fuse_kernel(
    p_hidden,  # N pointers to [B, L, D] or [T, D]
    p_gates,  # [B, N, D] float32
    p_mask,  # [B, L] or None
    p_cu_seqlens,  # [B + 1] or None
    p_fused,  # like a hidden state, contiguous
    size,  # L, or T for packed batches
    stride_b,  # of a hidden state, in units of VEC elements
    stride_l,
    stride_mask_b,
    stride_mask_l,
    num_sentences,
    N: tl.constexpr,
    D: tl.constexpr,
    VEC: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCAN: tl.constexpr,
):
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    index = tl.program_id(0).to(tl.int64)
    stride_b = stride_b.to(tl.int64) * VEC  # in units of a load, so that the compiler knows what divides them
    stride_l = stride_l.to(tl.int64) * VEC
    i_row = index // TILES
    o_d = (index % TILES).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_d = o_d < D
    if p_cu_seqlens is not None:
        # A tile of packed tokens touches one sentence or several: each writes its own rows.
        start = (i_row * TOKENS).to(tl.int32)
        o_t = start + tl.arange(0, TOKENS)  # [TOKENS] row of the packed batch
        o_u = o_t.to(tl.int64)[:, None] * stride_l + o_d[None, :]
        o_v = o_t.to(tl.int64)[:, None] * D + o_d[None, :]
        sentence = sentence_at(p_cu_seqlens, num_sentences, start, SCAN)
        begin = tl.load(p_cu_seqlens + sentence)
        while (sentence < num_sentences) & (begin < start + TOKENS):
            stop = tl.load(p_cu_seqlens + sentence + 1)
            m_row = (o_t >= begin) & (o_t < stop) & (o_t < size)
            v = weighted_sum(p_hidden, p_gates, o_u, o_d, m_row, m_d, sentence.to(tl.int64), N, D)
            tl.store(p_fused + o_v, v.to(p_fused.dtype.element_ty), mask=m_row[:, None] & m_d[None, :])
            begin = stop
            sentence += 1
    else:
        tiles_l = (size + TOKENS - 1) // TOKENS
        i_b = i_row // tiles_l
        o_l = (i_row % tiles_l).to(tl.int32) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
        m_l = o_l < size
        real = m_l
        if p_mask is not None:
            p_mask_row = p_mask + i_b * stride_mask_b
            real = tl.load(p_mask_row + o_l.to(tl.int64) * stride_mask_l, mask=m_l, other=0) != 0
        o_u = i_b * stride_b + o_l.to(tl.int64)[:, None] * stride_l + o_d[None, :]
        v = weighted_sum(p_hidden, p_gates, o_u, o_d, real, m_d, i_b, N, D)
        o_v = (i_b * size + o_l.to(tl.int64))[:, None] * D + o_d[None, :]
        tl.store(p_fused + o_v, v.to(p_fused.dtype.element_ty), mask=m_l[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=[*_RUNTIME, "stride_dv_b", "stride_dv_l"], do_not_specialize_on_alignment=_UNALIGNED)
def fuse_backward_kernel(
    p_hidden,  # N pointers to [B, L, D] or [T, D]
    p_dv,  # like a hidden state
    p_mask,
    p_cu_seqlens,
    p_dgates,  # [B, N, D] float32
    size,
    stride_b,  # of a hidden state, in units of VEC elements
    stride_l,
    stride_dv_b,
    stride_dv_l,
    stride_mask_b,
    stride_mask_l,
    N: tl.constexpr,
    D: tl.constexpr,
    VEC: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCAN: tl.constexpr,
):
    """A program takes one group of blocks of one sentence for one tile of features. Groups of a tile run side by side, so
    that dv comes from L2 for all but one of them."""
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    GROUPS: tl.constexpr = (N + GROUP - 1) // GROUP
    BLOCKS_HERE: tl.constexpr = min(GROUP, N)
    index = tl.program_id(0).to(tl.int64)
    stride_b = stride_b.to(tl.int64) * VEC  # in units of a load, so that the compiler knows what divides them
    stride_l = stride_l.to(tl.int64) * VEC
    stride_dv_b = stride_dv_b.to(tl.int64) * VEC
    stride_dv_l = stride_dv_l.to(tl.int64) * VEC
    i_group = (index % GROUPS).to(tl.int32)
    o_d = (index // GROUPS % TILES).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    i_b = index // (GROUPS * TILES)
    m_d = o_d < D
    o_row = i_b * stride_b
    o_dv_row = i_b * stride_dv_b
    p_mask_row = p_mask
    if p_cu_seqlens is not None:
        begin = tl.load(p_cu_seqlens + i_b)
        end = tl.load(p_cu_seqlens + i_b + 1) - begin
        o_row = begin.to(tl.int64) * stride_l
        o_dv_row = begin.to(tl.int64) * stride_dv_l
        first = end * 0
    elif p_mask is not None:
        p_mask_row = p_mask + i_b * stride_mask_b
        first, end, _ = real_span(p_mask_row, stride_mask_l, size, SCAN)
    else:
        first = size * 0
        end = size
    TOKENS: tl.constexpr = ROWS * SLOTS
    nothing = tl.zeros([SLOTS, BLOCK_D], tl.float32)
    sums = (nothing,) * BLOCKS_HERE
    for start in range(first, end, TOKENS):
        o_l = start + tl.arange(0, TOKENS)  # [TOKENS]
        real = o_l < end
        if p_mask is not None:
            real = tl.load(p_mask_row + o_l.to(tl.int64) * stride_mask_l, mask=real, other=0) != 0
        m_u = real[:, None] & m_d[None, :]  # [TOKENS, BLOCK_D]
        o_dv = o_dv_row + o_l.to(tl.int64)[:, None] * stride_dv_l + o_d[None, :]
        o_u = o_row + o_l.to(tl.int64)[:, None] * stride_l + o_d[None, :]
        dv = tl.load(p_dv + o_dv, mask=m_u, other=0.0).to(tl.float32)
        new_sums = ()
        for j in tl.static_range(BLOCKS_HERE):
            n = i_group * GROUP + j
            m_n = m_u if N % GROUP == 0 or N < GROUP else m_u & (n < N)
            u = tl.load(block_pointer(p_hidden, n, N) + o_u, mask=m_n, other=0.0, eviction_policy="evict_first")
            new_sums = new_sums + (sums[j] + sum_rows(dv * u.to(tl.float32), ROWS, SLOTS),)
        sums = new_sums
    for j in tl.static_range(BLOCKS_HERE):
        n = i_group * GROUP + j
        tl.store(p_dgates + (i_b * N + n) * D + o_d, tl.sum(sums[j], axis=0), mask=m_d & (n < N))


# ---------------------------------------------------------------- launchers


def fuse(
    hidden_states: Sequence[Tensor], gates: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """v like a hidden state."""
    first, packed = hidden_states[0], cu_seqlens is not None
    fused = first.new_empty(first.shape)
    if fused.numel() == 0:
        return fused
    hidden = HiddenStates.of(hidden_states, packed, 1)
    mask, stride_mask_b, stride_mask_l = mask_arguments(attention_mask)
    tile = config.fuse(hidden.size, len(hidden_states), hidden.vector)
    rows = triton.cdiv(hidden.length, tile.tokens) * (1 if packed else first.shape[0])
    with device_of(fused):
        fuse_kernel[(rows * triton.cdiv(hidden.size, tile.block_d),)](
            hidden.tensors, dense(gates, torch.float32), mask, dense(cu_seqlens), fused, hidden.length,
            hidden.stride_b, hidden.stride_l, stride_mask_b, stride_mask_l,
            0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
            N=len(hidden_states), D=hidden.size, VEC=hidden.vector, TOKENS=tile.tokens, BLOCK_D=tile.block_d,
            SCAN=config.SCAN, num_warps=tile.num_warps,
            enable_fp_fusion=FUSE_MULTIPLY_ADD,
        )  # fmt: skip
    return fused


def fuse_backward(
    grad_fused: Tensor, hidden_states: Sequence[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """dg [B, N, D] float32: one read of the hidden states and of dv."""
    first, packed, num_blocks = hidden_states[0], cu_seqlens is not None, len(hidden_states)
    hidden = HiddenStates.of(hidden_states, packed, 1)
    grad = HiddenStates.of([grad_fused], packed, 1)
    rows = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dgates = first.new_empty(rows, num_blocks, hidden.size, dtype=torch.float32)
    if rows == 0:
        return dgates
    mask, stride_mask_b, stride_mask_l = mask_arguments(attention_mask)
    tile = config.fuse_backward(hidden.size, hidden.vector)
    programs = rows * triton.cdiv(hidden.size, tile.block_d) * triton.cdiv(num_blocks, config.BLOCK_GROUP)
    with device_of(dgates):
        fuse_backward_kernel[(programs,)](
            hidden.tensors, grad.tensors[0], mask, dense(cu_seqlens), dgates, hidden.length, hidden.stride_b,
            hidden.stride_l, grad.stride_b, grad.stride_l, stride_mask_b, stride_mask_l,
            N=num_blocks, D=hidden.size, VEC=hidden.vector, GROUP=config.BLOCK_GROUP, ROWS=tile.rows,
            SLOTS=tile.slots, BLOCK_D=tile.block_d, SCAN=config.SCAN, num_warps=tile.num_warps,
            enable_fp_fusion=FUSE_MULTIPLY_ADD,
        )  # fmt: skip
    return dgates

"""squeeze's backward: the one write of every hidden state's gradient, for the token and for the pooled path.

    du_n[b,l,d] = g[b,n,d] dv[b,l,d] + w[b,l] dp[b,n,d] + alpha[m,n] beta[b,m,l] df[b,d]

It reads no hidden state. A program takes a tile of tokens and of features that lie in one part, for all blocks.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import compute_dtype
from . import config
from .common import (
    block_factor,
    frequency_of,
    pooling_weight,
    real_before,
    real_span,
    sentence_at,
    token_factor,
    token_scale,
)
from .launch import FUSE_MULTIPLY_ADD, HiddenStates, dense, device_of, mask_arguments, vector_of

_RUNTIME = ["size", "stride_b", "stride_l", "stride_mask_b", "stride_mask_l", "num_sentences"]
_UNALIGNED = ["p_mask", "p_cu_seqlens"]


@triton.jit
def write_gradients(
    p_grads,
    p_df,
    p_dp,
    p_dv,
    p_gates,
    o_grad,
    o_dv,
    o_d,
    m_row,
    m_real,
    m_d,
    i_b,
    part,
    rank,
    position,
    first,
    end,
    length,
    size,
    N: tl.constexpr,
    D: tl.constexpr,
    X_LOW: tl.constexpr,
    X_HIGH: tl.constexpr,
    Y_LOW: tl.constexpr,
    Y_HIGH: tl.constexpr,
    ALPHA: tl.constexpr,
    SCALE: tl.constexpr,
    OFFICIAL: tl.constexpr,
    POOLING: tl.constexpr,
    NEEDED: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One sentence's rows of a token tile, all blocks. o_grad, o_dv: [TOKENS, 1] offsets of the rows; m_row: the rows that
    are this sentence's to write, m_real: those of them that are real; rank, position: [TOKENS]."""
    m_store = m_row[:, None] & m_d[None, :]  # [TOKENS, BLOCK_D]
    m_load = m_real[:, None] & m_d[None, :]
    if p_dv is not None:
        dv = tl.load(p_dv + o_dv + o_d[None, :], mask=m_load, other=0.0).to(tl.float32)  # [TOKENS, BLOCK_D]
    if p_df is not None:
        x = frequency_of(part, X_LOW, X_HIGH)
        y = frequency_of(part, Y_LOW, Y_HIGH)
        beta = token_factor(y, rank, position, tl.maximum(length, 1), size, token_scale(y, length, SCALE), OFFICIAL)
        df = tl.load(p_df + i_b * D + o_d, mask=m_d, other=0.0)  # [BLOCK_D]
    if p_dp is not None:
        w = pooling_weight(position, first, end, tl.maximum(length, 1), POOLING)  # [TOKENS]
    # To the compiler a load may read what a store before it wrote, and waits behind it: several blocks' loads at a time.
    for n0 in tl.static_range(0, N, AHEAD):
        gates = ()
        grads_pooled = ()
        for n in tl.static_range(n0, min(n0 + AHEAD, N)):
            o_n = (i_b * N + n) * D + o_d  # [BLOCK_D]
            if p_dv is not None:
                gates = gates + (tl.load(p_gates + o_n, mask=m_d, other=0.0),)
            if p_dp is not None:
                grads_pooled = grads_pooled + (tl.load(p_dp + o_n, mask=m_d, other=0.0),)
        for n in tl.static_range(n0, min(n0 + AHEAD, N)):
            if (NEEDED >> n) & 1:
                du = tl.zeros(m_store.shape, tl.float32)
                if p_dv is not None:
                    du = gates[n - n0][None, :] * dv
                if p_dp is not None:
                    share = w[:, None] * grads_pooled[n - n0][None, :]
                    du += share if POOLING == "mean" else tl.where((w > 0.0)[:, None], share, 0.0)
                if OFFICIAL:  # every position was squeezed, but real ones alone pooled and fused
                    du = tl.where(m_real[:, None], du, 0.0)
                if p_df is not None:
                    share = block_factor(x, tl.full((), n, tl.int32), N, n, N, ALPHA) * df
                    du = tl.fma(tl.broadcast_to(beta[:, None], du.shape), tl.broadcast_to(share[None, :], du.shape), du)
                if not OFFICIAL:
                    du = tl.where(m_real[:, None], du, 0.0)  # chosen, since NaN times the padding's zero is NaN
                tl.store(p_grads[n] + o_grad + o_d[None, :], du.to(p_grads[n].dtype.element_ty), mask=m_store)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_UNALIGNED)
def squeeze_backward_kernel(
    p_grads,  # N pointers to [B, L, D] or [T, D], contiguous; written where NEEDED has the block's bit
    p_df,  # [B, D] float32 or None
    p_dp,  # [B, N, D] float32 or None
    p_dv,  # like a hidden state, or None
    p_gates,  # [B, N, D] float32, with p_dv
    p_mask,
    p_cu_seqlens,
    size,  # L, or T for packed batches
    stride_b,  # of dv, in units of VEC elements
    stride_l,
    stride_mask_b,
    stride_mask_l,
    num_sentences,
    N: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    VEC: tl.constexpr,
    X_LOW: tl.constexpr,
    X_HIGH: tl.constexpr,
    Y_LOW: tl.constexpr,
    Y_HIGH: tl.constexpr,
    ALPHA: tl.constexpr,
    SCALE: tl.constexpr,
    OFFICIAL: tl.constexpr,
    POOLING: tl.constexpr,
    NEEDED: tl.constexpr,
    AHEAD: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCAN: tl.constexpr,
):
    PART: tl.constexpr = D // M
    TILES: tl.constexpr = (PART + BLOCK_D - 1) // BLOCK_D
    index = tl.program_id(0).to(tl.int64)
    stride_b = stride_b.to(tl.int64) * VEC  # in units of a load, so that the compiler knows what divides them
    stride_l = stride_l.to(tl.int64) * VEC
    i_tile = (index % (M * TILES)).to(tl.int32)
    i_row = index // (M * TILES)
    part = i_tile // TILES
    o_part = (i_tile % TILES) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_d = o_part < PART
    o_d = part * PART + o_part
    if p_cu_seqlens is not None:
        # A tile of packed tokens touches one sentence or several: each writes its own rows.
        start = (i_row * TOKENS).to(tl.int32)
        o_t = start + tl.arange(0, TOKENS)  # [TOKENS] row of the packed batch
        o_grad = o_t.to(tl.int64)[:, None] * D
        o_dv = o_t.to(tl.int64)[:, None] * stride_l
        sentence = sentence_at(p_cu_seqlens, num_sentences, start, SCAN)
        begin = tl.load(p_cu_seqlens + sentence)
        while (sentence < num_sentences) & (begin < start + TOKENS):
            stop = tl.load(p_cu_seqlens + sentence + 1)
            m_row = (o_t >= begin) & (o_t < stop) & (o_t < size)
            position = o_t - begin
            length = stop - begin
            write_gradients(
                p_grads, p_df, p_dp, p_dv, p_gates, o_grad, o_dv, o_d, m_row, m_row, m_d, sentence.to(tl.int64), part,
                position, position, length * 0, length, length, size, N, D, X_LOW, X_HIGH, Y_LOW, Y_HIGH, ALPHA, SCALE, OFFICIAL,
                POOLING, NEEDED, AHEAD,
            )  # fmt: skip
            begin = stop
            sentence += 1
    else:
        tiles_l = (size + TOKENS - 1) // TOKENS
        i_b = i_row // tiles_l
        start = (i_row % tiles_l).to(tl.int32) * TOKENS
        o_l = start + tl.arange(0, TOKENS)  # [TOKENS]
        m_row = o_l < size
        o_grad = (i_b * size + o_l.to(tl.int64))[:, None] * D
        o_dv = i_b * stride_b + o_l.to(tl.int64)[:, None] * stride_l
        real = m_row
        rank = o_l
        first = start * 0
        end = size + start * 0
        length = end
        if p_mask is not None:
            p_mask_row = p_mask + i_b * stride_mask_b
            first, end, length = real_span(p_mask_row, stride_mask_l, size, SCAN)
            real = tl.load(p_mask_row + o_l.to(tl.int64) * stride_mask_l, mask=m_row, other=0) != 0
            rank = o_l - first
            if end - first != length:  # holes
                rank = real_before(p_mask_row, stride_mask_l, start, SCAN) + tl.cumsum(real.to(tl.int32), axis=0) - 1
        write_gradients(
            p_grads, p_df, p_dp, p_dv, p_gates, o_grad, o_dv, o_d, m_row, real, m_d, i_b, part, rank, o_l, first, end,
            length, size, N, D, X_LOW, X_HIGH, Y_LOW, Y_HIGH, ALPHA, SCALE, OFFICIAL, POOLING, NEEDED, AHEAD,
        )  # fmt: skip


# ---------------------------------------------------------------- launcher


def squeeze_backward(
    grad_squeezed: Tensor | None,
    grad_pooled: Tensor | None,
    grad_fused: Tensor | None,
    gates: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    needed: Sequence[bool],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
) -> list[Tensor | None]:
    """du_n for each needed block, written once; reads no hidden state."""
    packed, size, num_blocks = cu_seqlens is not None, shape[-1], len(needed)
    grads = [torch.empty(shape, dtype=dtype, device=device) if need else None for need in needed]
    written = next(grad for grad in grads if grad is not None)
    if written.numel() == 0:
        return grads
    fused = None if grad_fused is None else HiddenStates.of([grad_fused], packed, frequencies)
    mask, stride_mask_b, stride_mask_l = mask_arguments(attention_mask)
    chosen = config.squeeze_backward(size // frequencies, num_blocks, vector_of(size // frequencies, dtype))
    tiles = frequencies * triton.cdiv(size // frequencies, chosen.block_d)
    rows = triton.cdiv(shape[0], chosen.tokens) if packed else shape[0] * triton.cdiv(shape[1], chosen.tokens)
    float32 = compute_dtype(dtype)
    with device_of(written):
        squeeze_backward_kernel[(rows * tiles,)](
            tuple(written if grad is None else grad for grad in grads),
            dense(grad_squeezed, float32),
            dense(grad_pooled, float32),
            None if fused is None else fused.tensors[0],
            None if fused is None else dense(gates, float32),
            mask, dense(cu_seqlens), shape[0] if packed else shape[1],
            0 if fused is None else fused.stride_b, 0 if fused is None else fused.stride_l,
            stride_mask_b, stride_mask_l, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
            N=num_blocks, D=size, M=frequencies, VEC=1 if fused is None else fused.vector,
            **config.dct_constants(num_blocks, frequencies, profile),
            OFFICIAL=profile == "official", POOLING=pooling,
            NEEDED=sum(1 << n for n, need in enumerate(needed) if need),
            AHEAD=config.BACKWARD_AHEAD, TOKENS=chosen.tokens, BLOCK_D=chosen.block_d, SCAN=config.SCAN,
            num_warps=chosen.num_warps, enable_fp_fusion=FUSE_MULTIPLY_ADD,
        )  # fmt: skip
    return grads

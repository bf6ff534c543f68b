"""squeeze's backward: the one write of every hidden state's gradient, for the token and for the pooled path.

    du_n[b,l,d] = g[b,n,d] dv[b,l,d] + w[b,l] dp[b,n,d] + alpha[m,n] beta[b,m,l] df[b,d]

It reads no hidden state. A program writes a tile of tokens and of features that lie in one part, for all blocks.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formula.call import HiddenGradients, Layout, Reading, compute_dtype
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
from .direct import direct
from .launch import FUSE_MULTIPLY_ADD, HiddenStates, Mask, cdiv, dense, vector_of

_RUNTIME = ["num_tokens", "stride_b", "stride_l", "stride_mask_b", "stride_mask_l", "num_sentences"]
# Their alignment must not select another variant, which could sum in another order.
_UNALIGNED = ["p_mask", "p_cu_seqlens"]


@triton.jit
def write_gradients(
    p_grads,
    readers,  # (p_df, p_dp, p_dv, p_gates), as squeeze_backward_kernel has them
    offsets,  # (o_grad, o_dv) [TOKENS, 1] of the rows, o_d [BLOCK_D]
    masks,  # m_row [TOKENS]: the rows of this sentence; m_real [TOKENS]: the real ones; m_d [BLOCK_D]
    i_b,
    part,
    tokens,  # (rank, position) [TOKENS]
    span,  # (first, end, length): the sentence's real tokens lie in [first, end), ``length`` of them
    num_tokens,
    N: tl.constexpr,
    D: tl.constexpr,
    DCT: tl.constexpr,
    POOLING: tl.constexpr,
    NEEDED: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One sentence's rows of a token tile, all blocks."""
    ALPHA: tl.constexpr = DCT.alpha
    OFFICIAL: tl.constexpr = DCT.official
    p_df, p_dp, p_dv, p_gates = readers
    o_grad, o_dv, o_d = offsets
    m_row, m_real, m_d = masks
    rank, position = tokens
    first, end, length = span
    m_store = m_row[:, None] & m_d[None, :]  # [TOKENS, BLOCK_D]
    m_load = m_real[:, None] & m_d[None, :]
    if p_dv is not None:
        dv = tl.load(p_dv + o_dv + o_d[None, :], mask=m_load, other=0.0).to(tl.float32)  # [TOKENS, BLOCK_D]
    if p_df is not None:
        x = frequency_of(part, DCT.x_low, DCT.x_high)
        y = frequency_of(part, DCT.y_low, DCT.y_high)
        counted = tl.maximum(length, 1)
        scale = token_scale(y, length, DCT.scale)
        beta = token_factor(y, rank, position, counted, num_tokens, scale, OFFICIAL)  # [TOKENS]
        df = tl.load(p_df + i_b * D + o_d, mask=m_d, other=0.0)  # [BLOCK_D]
    if p_dp is not None:
        w = pooling_weight(position, first, end, tl.maximum(length, 1), POOLING)  # [TOKENS]
    # The compiler must assume that loads alias earlier stores, so the loads of AHEAD blocks are issued before their stores.
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
                if OFFICIAL:  # every position is squeezed, but only real ones are pooled and fused
                    du = tl.where(m_real[:, None], du, 0.0)
                if p_df is not None:
                    share = block_factor(x, tl.full((), n, tl.int32), N, n, N, ALPHA) * df
                    du = tl.fma(tl.broadcast_to(beta[:, None], du.shape), tl.broadcast_to(share[None, :], du.shape), du)
                if not OFFICIAL:
                    du = tl.where(m_real[:, None], du, 0.0)  # selected: NaN times padding's zero would be NaN
                tl.store(p_grads[n] + o_grad + o_d[None, :], du.to(p_grads[n].dtype.element_ty), mask=m_store)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_UNALIGNED)
def squeeze_backward_kernel(
    p_grads,  # N pointers to [B, L, D] or [T, D], contiguous; written where NEEDED has the block's bit
    p_df,  # [B, D] float32 or None
    p_dp,  # [B, N, D] float32 or None
    p_dv,  # like a hidden state, or None
    p_gates,  # [B, N, D] float32, with p_dv
    p_mask,  # [B, L] or None
    p_cu_seqlens,  # [B + 1] or None
    num_tokens,  # L, or T for packed batches
    stride_b,  # of dv, in units of VEC elements
    stride_l,
    stride_mask_b,
    stride_mask_l,
    num_sentences,
    N: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    VEC: tl.constexpr,
    DCT: tl.constexpr,
    POOLING: tl.constexpr,
    NEEDED: tl.constexpr,  # bit n: write block n's gradient
    AHEAD: tl.constexpr,  # blocks whose rows are loaded before they are stored
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    readers = (p_df, p_dp, p_dv, p_gates)
    if p_cu_seqlens is not None:
        # A tile of packed tokens may hold rows of several sentences, which are written one sentence after another.
        start = (i_row * TOKENS).to(tl.int32)
        o_t = start + tl.arange(0, TOKENS)  # [TOKENS] row of the packed batch
        o_grad = o_t.to(tl.int64)[:, None] * D
        o_dv = o_t.to(tl.int64)[:, None] * stride_l
        sentence = sentence_at(p_cu_seqlens, num_sentences, start)
        begin = tl.load(p_cu_seqlens + sentence)
        while (sentence < num_sentences) & (begin < start + TOKENS):
            stop = tl.load(p_cu_seqlens + sentence + 1)
            m_row = (o_t >= begin) & (o_t < stop) & (o_t < num_tokens)
            position = o_t - begin
            length = stop - begin
            offsets = (o_grad, o_dv, o_d)
            masks = (m_row, m_row, m_d)
            span = (length * 0, length, length)
            i_b = sentence.to(tl.int64)
            tokens = (position, position)
            write_gradients(
                p_grads, readers, offsets, masks, i_b, part, tokens, span, num_tokens, N, D, DCT, POOLING, NEEDED, AHEAD
            )
            begin = stop
            sentence += 1
    else:
        tiles_l = (num_tokens + TOKENS - 1) // TOKENS
        i_b = i_row // tiles_l
        start = (i_row % tiles_l).to(tl.int32) * TOKENS
        o_l = start + tl.arange(0, TOKENS)  # [TOKENS]
        m_row = o_l < num_tokens
        o_grad = (i_b * num_tokens + o_l.to(tl.int64))[:, None] * D
        o_dv = i_b * stride_b + o_l.to(tl.int64)[:, None] * stride_l
        real = m_row
        rank = o_l
        first = start * 0
        end = num_tokens + start * 0
        length = end
        if p_mask is not None:
            p_mask_row = p_mask + i_b * stride_mask_b
            first, end, length = real_span(p_mask_row, stride_mask_l, num_tokens)
            real = tl.load(p_mask_row + o_l.to(tl.int64) * stride_mask_l, mask=m_row, other=0) != 0
            rank = o_l - first
            if end - first != length:  # holes
                rank = real_before(p_mask_row, stride_mask_l, start) + tl.cumsum(real.to(tl.int32), axis=0) - 1
        offsets = (o_grad, o_dv, o_d)
        masks = (m_row, real, m_d)
        span = (first, end, length)
        tokens = (rank, o_l)
        write_gradients(
            p_grads, readers, offsets, masks, i_b, part, tokens, span, num_tokens, N, D, DCT, POOLING, NEEDED, AHEAD
        )


# ---------------------------------------------------------------- launcher

launch_squeeze_backward = direct(squeeze_backward_kernel, tuples=("p_grads",))


def squeeze_backward(
    grads: HiddenGradients, layout: Layout, needed: Sequence[bool], reading: Reading
) -> list[Tensor | None]:
    """du_n for each needed block, written once; reads no hidden state."""
    shape, dtype, hidden_size, num_blocks = layout.shape, layout.dtype, layout.hidden_size, len(needed)
    some = torch.empty(*shape, dtype=dtype, device=layout.device)
    first = needed.index(True)
    written = [(some if n == first else torch.empty_like(some)) if need else None for n, need in enumerate(needed)]
    if some.numel() == 0:
        return written
    fused = None if grads.fused is None else HiddenStates.of([grads.fused], layout.packed, reading.frequencies)
    part = hidden_size // reading.frequencies
    tile = config.squeeze_backward(part, num_blocks, vector_of(part, dtype))
    num_tokens = shape[0] if layout.packed else shape[1]
    rows = cdiv(num_tokens, tile.tokens) * (1 if layout.packed else layout.num_sentences)
    float32 = compute_dtype(dtype)
    mask = Mask.of(layout)
    launch_squeeze_backward(
        rows * reading.frequencies * cdiv(part, tile.block_d),
        p_mask=mask.attention_mask,
        p_cu_seqlens=mask.cu_seqlens,
        stride_mask_b=mask.stride_b,
        stride_mask_l=mask.stride_l,
        p_grads=tuple(some if grad is None else grad for grad in written),
        p_df=dense(grads.squeezed, float32),
        p_dp=dense(grads.pooled, float32),
        p_dv=None if fused is None else fused.tensors[0],
        p_gates=None if fused is None else dense(grads.gates, float32),
        num_tokens=num_tokens,
        stride_b=0 if fused is None else fused.stride_b,
        stride_l=0 if fused is None else fused.stride_l,
        num_sentences=layout.num_sentences if layout.packed else 0,
        N=num_blocks,
        D=hidden_size,
        M=reading.frequencies,
        VEC=1 if fused is None else fused.vector,
        DCT=config.dct_constants(num_blocks, reading.frequencies, reading.profile),
        POOLING=reading.pooling,
        NEEDED=sum(1 << n for n, need in enumerate(needed) if need),
        AHEAD=config.BACKWARD_AHEAD,
        TOKENS=tile.tokens,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        enable_fp_fusion=FUSE_MULTIPLY_ADD,
    )
    return written

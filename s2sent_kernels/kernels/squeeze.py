"""squeeze: f and, in the same read, the pooled p; and the one write of every hidden state's gradient.

    f[b,d] = sum_n sum_l alpha[m(d),n] beta[b,m(d),l] u_n[b,l,d]        p[b,n,d] = sum_l w[b,l] u_n[b,l,d]
    du_n[b,l,d] = g[b,n,d] dv[b,l,d] + w[b,l] dp[b,n,d] + alpha[m,n] beta[b,m,l] df[b,d]

Order of summation, on which every bit of f and p depends: a sentence's tokens, from its first real one on, come in chunks of
CHUNK; a chunk's tokens are dealt to SLOTS running sums in turn, tile after tile of ROWS x SLOTS tokens; the chunks are added
slot by slot, ascending; at the end the slots are summed as a tree; then the blocks of a group of GROUP ascending, weighted by
alpha; then the groups ascending (by whoever reads f). SLOTS is how many tokens a program's threads hold side by side, so
that nothing crosses threads before the end; CHUNK bounds how many terms one running sum takes, and with it its rounding.

A program takes one group of one sentence for one tile of features that lie in one part, so that alpha and beta belong to the
program and not to the feature.
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
    block_pointer,
    frequency_of,
    pooling_weight,
    quarter_cosine,
    real_before,
    real_span,
    root_norm,
    sentence_at,
    sum_rows,
    token_factor,
)
from .launch import FUSE_MULTIPLY_ADD, HiddenStates, dense, device_of, mask_arguments, vector_of

_RUNTIME = ["size", "stride_b", "stride_l", "stride_mask_b", "stride_mask_l", "num_sentences", "first_block"]
_UNALIGNED = ["p_mask", "p_cu_seqlens"]  # whose alignment must not choose another kernel, and with it another order


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_UNALIGNED)
def squeeze_kernel(
    p_hidden,  # NUM pointers to [B, L, D] or [T, D]
    p_mask,  # [B, L] or None
    p_cu_seqlens,  # [B + 1] or None
    p_squeezed,  # [B, G, D] float32, partial sums of f
    p_pooled,  # [B, N, D] float32 or None
    size,  # L
    stride_b,  # of a hidden state, in units of VEC elements
    stride_l,
    stride_mask_b,
    stride_mask_l,
    first_block,  # the block that p_hidden[0] is
    N: tl.constexpr,
    NUM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    VEC: tl.constexpr,
    X_LOW: tl.constexpr,
    X_HIGH: tl.constexpr,
    Y_LOW: tl.constexpr,
    Y_HIGH: tl.constexpr,
    OFFICIAL: tl.constexpr,
    POOLING: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCAN: tl.constexpr,
):
    PART: tl.constexpr = D // M
    TILES: tl.constexpr = (PART + BLOCK_D - 1) // BLOCK_D  # feature tiles of a part
    GROUPS: tl.constexpr = (N + GROUP - 1) // GROUP
    GROUPS_HERE: tl.constexpr = (NUM + GROUP - 1) // GROUP
    BLOCKS_HERE: tl.constexpr = min(GROUP, NUM)

    index = tl.program_id(0).to(tl.int64)
    stride_b = stride_b.to(tl.int64) * VEC  # in units of a load, so that the compiler knows what divides them
    stride_l = stride_l.to(tl.int64) * VEC
    i_tile = (index % (M * TILES)).to(tl.int32)
    i_group = (index // (M * TILES) % GROUPS_HERE).to(tl.int32)
    i_b = index // (M * TILES * GROUPS_HERE)
    part = i_tile // TILES
    o_part = (i_tile % TILES) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D] feature inside the part
    m_d = o_part < PART
    o_d = part * PART + o_part  # [BLOCK_D] feature

    # The sentence: rows [begin, stop) of the hidden states, its real ones in [first, end).
    o_row = i_b * stride_b
    p_mask_row = p_mask
    if p_cu_seqlens is not None:
        begin = tl.load(p_cu_seqlens + i_b)
        length = tl.load(p_cu_seqlens + i_b + 1) - begin
        o_row = begin.to(tl.int64) * stride_l
        first = length * 0
        end = length
    elif p_mask is not None:
        p_mask_row = p_mask + i_b * stride_mask_b
        first, end, length = real_span(p_mask_row, stride_mask_l, size, SCAN)
    else:
        first = size * 0
        end = size
        length = size
    holes = end - first != length
    start_at = first
    stop_at = end
    if OFFICIAL:  # the published code squeezes padding too
        start_at = size * 0
        stop_at = size

    x = frequency_of(part, X_LOW, X_HIGH)
    y = frequency_of(part, Y_LOW, Y_HIGH)
    TOKENS: tl.constexpr = ROWS * SLOTS
    nothing = tl.zeros([SLOTS, BLOCK_D], tl.float32)
    total_sums = (nothing,) * BLOCKS_HERE  # of beta u, for each block of the group
    total_pools = (nothing,) * BLOCKS_HERE  # of w u
    seen = length * 0
    for chunk in range(start_at, stop_at, CHUNK):
        sums = (nothing,) * BLOCKS_HERE
        pools = (nothing,) * BLOCKS_HERE
        for start in range(chunk, tl.minimum(chunk + CHUNK, stop_at), TOKENS):
            o_l = start + tl.arange(0, TOKENS)  # [TOKENS]
            m_l = o_l < stop_at
            real = m_l
            rank = o_l - first
            if p_mask is not None:
                if OFFICIAL:
                    real = tl.load(p_mask_row + o_l.to(tl.int64) * stride_mask_l, mask=m_l, other=0) != 0
                elif holes:
                    real = tl.load(p_mask_row + o_l.to(tl.int64) * stride_mask_l, mask=m_l, other=0) != 0
                    rank = seen + tl.cumsum(real.to(tl.int32), axis=0) - 1
                    seen += tl.sum(real.to(tl.int32), axis=0)
            beta = token_factor(y, rank, o_l, length, size, N, OFFICIAL)  # [TOKENS]
            m_read = m_l if OFFICIAL else real
            m_u = m_read[:, None] & m_d[None, :]  # [TOKENS, BLOCK_D]
            o_u = o_row + o_l.to(tl.int64)[:, None] * stride_l + o_d[None, :]
            new_sums = ()
            new_pools = ()
            for j in tl.static_range(BLOCKS_HERE):
                n = i_group * GROUP + j  # within p_hidden
                p_u = block_pointer(p_hidden, n, NUM)
                m_n = m_u if NUM % GROUP == 0 or NUM < GROUP else m_u & (n < NUM)
                u = tl.load(p_u + o_u, mask=m_n, other=0.0, eviction_policy="evict_first").to(tl.float32)
                new_sums = new_sums + (sums[j] + sum_rows(u * beta[:, None], ROWS, SLOTS),)
                if POOLING is not None:
                    if OFFICIAL:
                        u = tl.where(real[:, None], u, 0.0)
                    if (
                        POOLING != "mean"
                    ):  # one token: chosen, not multiplied by 0 and 1, which would spread its neighbours' NaN
                        u = tl.where((pooling_weight(o_l, first, end, length, POOLING) > 0.0)[:, None], u, 0.0)
                    new_pools = new_pools + (pools[j] + sum_rows(u, ROWS, SLOTS),)
                else:
                    new_pools = new_pools + (nothing,)
            sums = new_sums
            pools = new_pools
        new_sums = ()
        new_pools = ()
        for j in tl.static_range(BLOCKS_HERE):
            new_sums = new_sums + (total_sums[j] + sums[j],)
            new_pools = new_pools + (total_pools[j] + pools[j],)
        total_sums = new_sums
        total_pools = new_pools

    group = (first_block + i_group * GROUP) // GROUP
    p_f = p_squeezed + (i_b * GROUPS + group) * D + o_d
    squeezed = tl.zeros([BLOCK_D], tl.float32)
    if NUM < N and first_block % GROUP != 0:  # fed block by block: go on where the block before left off
        squeezed = tl.load(p_f, mask=m_d, other=0.0)
    for j in tl.static_range(BLOCKS_HERE):
        n = first_block + i_group * GROUP + j
        alpha = tl.where(n < N, block_factor(x, n, N, OFFICIAL), 0.0)
        squeezed = tl.fma(tl.sum(total_sums[j], axis=0), alpha, squeezed)
        if POOLING is not None:
            scale = 1.0
            if POOLING == "mean":
                scale = tl.div_rn(1.0, tl.maximum(length, 1).to(tl.float32))
            p_p = p_pooled + (i_b * N + n) * D + o_d
            tl.store(p_p, tl.sum(total_pools[j], axis=0) * scale, mask=m_d & (n < N))
    tl.store(p_f, squeezed, mask=m_d)


@triton.jit
def sum_groups_kernel(p_groups, p_squeezed, total, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """f [B, D] from its partial sums [B, G, D], ascending. ``total`` = B * D."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offset < total
    row, column = offset // D, offset % D
    squeezed = tl.zeros([BLOCK], tl.float32)
    for group in tl.static_range(G):
        squeezed += tl.load(p_groups + (row * G + group) * D + column, mask=mask, other=0.0)
    tl.store(p_squeezed + offset, squeezed, mask=mask)


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
    OFFICIAL: tl.constexpr,
    POOLING: tl.constexpr,
    NEEDED: tl.constexpr,
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
        beta = token_factor(y, rank, position, tl.maximum(length, 1), size, N, OFFICIAL)  # [TOKENS]
        df = tl.load(p_df + i_b * D + o_d, mask=m_d, other=0.0)  # [BLOCK_D]
        # alpha_n for n = 0, 1, ... by cos((n + 1) a + b) = 2 cos(a) cos(n a + b) - cos((n - 1) a + b), in float64
        blocks = tl.full((), N, tl.int32)
        norm = root_norm(x, blocks)
        step = 2.0 * quarter_cosine(2 * x, blocks, tl.float64)
        wave = quarter_cosine(x, blocks, tl.float64)  # block 0
        wave_before = wave  # block -1 is its mirror image
    if p_dp is not None:
        w = pooling_weight(position, first, end, tl.maximum(length, 1), POOLING)  # [TOKENS]
    for n in tl.static_range(N):
        if (NEEDED >> n) & 1:
            du = tl.zeros(m_store.shape, tl.float32)
            o_n = (i_b * N + n) * D + o_d  # [BLOCK_D]
            if p_dv is not None:
                g = tl.load(p_gates + o_n, mask=m_d, other=0.0)
                du += g[None, :] * dv
            if p_dp is not None:
                dp = tl.load(p_dp + o_n, mask=m_d, other=0.0)
                du += tl.where((w > 0.0)[:, None], w[:, None] * dp[None, :], 0.0)
            du = tl.where(m_real[:, None], du, 0.0)
            if p_df is not None:
                alpha = (wave * norm).to(tl.float32)
                if OFFICIAL:
                    alpha = block_factor(x, tl.full((), n, tl.int32), N, OFFICIAL)
                share = beta[:, None] * (alpha * df)[None, :]
                if OFFICIAL:
                    du += share  # every position was squeezed
                else:
                    du += tl.where(m_real[:, None], share, 0.0)
            tl.store(p_grads[n] + o_grad + o_d[None, :], du.to(p_grads[n].dtype.element_ty), mask=m_store)
        if p_df is not None:
            wave_after = step * wave - wave_before
            wave_before = wave
            wave = wave_after


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
    OFFICIAL: tl.constexpr,
    POOLING: tl.constexpr,
    NEEDED: tl.constexpr,
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
                position, position, length * 0, length, length, size, N, D, X_LOW, X_HIGH, Y_LOW, Y_HIGH, OFFICIAL,
                POOLING, NEEDED,
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
            before = real_before(p_mask_row, stride_mask_l, start, SCAN)
            rank = before + tl.cumsum(real.to(tl.int32), axis=0) - 1
        write_gradients(
            p_grads, p_df, p_dp, p_dv, p_gates, o_grad, o_dv, o_d, m_row, real, m_d, i_b, part, rank, o_l, first, end,
            length, size, N, D, X_LOW, X_HIGH, Y_LOW, Y_HIGH, OFFICIAL, POOLING, NEEDED,
        )  # fmt: skip


# ---------------------------------------------------------------- launchers


def squeeze_into(
    hidden: HiddenStates,
    first_block: int,
    num_blocks: int,
    squeezed_groups: Tensor,
    pooled: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
) -> None:
    """Squeeze blocks ``first_block``, ... (all N of them, or a single one) into f's groups and p."""
    rows = squeezed_groups.shape[0]
    if rows == 0:
        return
    mask, stride_mask_b, stride_mask_l = mask_arguments(attention_mask)
    chosen = config.squeeze(hidden.size // frequencies, hidden.vector)
    tiles = frequencies * triton.cdiv(hidden.size // frequencies, chosen.block_d)
    groups_here = triton.cdiv(len(hidden.tensors), config.BLOCK_GROUP)
    with device_of(squeezed_groups):
        squeeze_kernel[(rows * groups_here * tiles,)](
            hidden.tensors, mask, dense(cu_seqlens), squeezed_groups, pooled, hidden.length, hidden.stride_b,
            hidden.stride_l, stride_mask_b, stride_mask_l, first_block,
            N=num_blocks, NUM=len(hidden.tensors), D=hidden.size, M=frequencies, VEC=hidden.vector,
            **config.frequency_words(num_blocks, frequencies, profile),
            OFFICIAL=profile == "official", POOLING=pooling, GROUP=config.BLOCK_GROUP, ROWS=chosen.rows,
            SLOTS=chosen.slots, CHUNK=config.CHUNK, BLOCK_D=chosen.block_d, SCAN=config.SCAN, num_warps=chosen.num_warps,
            enable_fp_fusion=FUSE_MULTIPLY_ADD,
        )  # fmt: skip


def squeeze_groups(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
) -> tuple[Tensor, Tensor | None]:
    """f's partial sums [B, G, D], and p [B, N, D] with pooling: one launch."""
    first, num_blocks = hidden_states[0], len(hidden_states)
    hidden = HiddenStates.of(hidden_states, cu_seqlens is not None, frequencies)
    rows = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    groups = triton.cdiv(num_blocks, config.BLOCK_GROUP)
    squeezed = first.new_empty(rows, groups, hidden.size, dtype=torch.float32)
    pooled = None if pooling is None else first.new_empty(rows, num_blocks, hidden.size, dtype=torch.float32)
    squeeze_into(hidden, 0, num_blocks, squeezed, pooled, attention_mask, cu_seqlens, frequencies, profile, pooling)
    return squeezed, pooled


def sum_groups(squeezed_groups: Tensor) -> Tensor:
    """f [B, D] from its partial sums [B, G, D]."""
    rows, groups, size = squeezed_groups.shape
    if groups == 1 or rows == 0:
        return squeezed_groups.sum(dim=1) if rows == 0 else squeezed_groups[:, 0]
    squeezed = squeezed_groups.new_empty(rows, size)
    total, block = squeezed.numel(), config.SUM_GROUPS_BLOCK
    with device_of(squeezed):
        sum_groups_kernel[(triton.cdiv(total, block),)](squeezed_groups, squeezed, total, groups, size, block)
    return squeezed


def squeeze(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
) -> tuple[Tensor, Tensor | None]:
    """f [B, D], and p [B, N, D] with pooling."""
    groups, pooled = squeeze_groups(hidden_states, attention_mask, cu_seqlens, frequencies, profile, pooling)
    return sum_groups(groups), pooled


def squeeze_block(
    hidden_state: Tensor,
    block: int,
    num_blocks: int,
    squeezed_groups: Tensor,
    pooled: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
) -> None:
    """One block into f's partial sums [B, G, D] and its row of p [B, N, D]; blocks come in ascending order."""
    hidden = HiddenStates.of([hidden_state], cu_seqlens is not None, frequencies)
    squeeze_into(
        hidden, block, num_blocks, squeezed_groups, pooled, attention_mask, cu_seqlens, frequencies, profile, pooling
    )


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
            **config.frequency_words(num_blocks, frequencies, profile),
            OFFICIAL=profile == "official", POOLING=pooling,
            NEEDED=sum(1 << n for n, need in enumerate(needed) if need),
            TOKENS=chosen.tokens, BLOCK_D=chosen.block_d, SCAN=config.SCAN, num_warps=chosen.num_warps,
            enable_fp_fusion=FUSE_MULTIPLY_ADD,
        )  # fmt: skip
    return grads

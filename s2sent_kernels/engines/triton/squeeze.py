"""squeeze: f and, in the same read, the pooled p and the bottleneck's products.

    f[b,d] = sum_n sum_l alpha[m(d),n] beta[b,m(d),l] u_n[b,l,d]        p[b,n,d] = sum_l w[b,l] u_n[b,l,d]
    t[b,i,h] = sum_{d in tile i} W1[h,d] f[b,d]                         the gate's W1 f, by feature tiles

A program takes one sentence and one tile of features that lie in one part, so that alpha and beta belong to the program and
not to the feature. The blocks are dealt to its warps: GROUPS warps sum PER neighbouring blocks each, side by side as the rows
of one tile. Copies into shared memory run ahead of the sums (``num_stages``), so that loads are in flight all the time. Its
features' f is complete at the end, so it multiplies it with its slice of W1 as well: the gate would have to read all of W1
in every one of its programs.

Order of summation, on which every bit depends: a sentence's tokens, from its first real one on, come in chunks of CHUNK; a
chunk's tokens are dealt to SLOTS running sums in turn; at the chunk's end the slots are summed as a tree; then the chunks
ascending; then the blocks of a group ascending, weighted by alpha; then the groups ascending; for t the features of a tile
as a tree. SLOTS is how many tokens of a block a warp holds side by side; CHUNK bounds how many terms one running sum takes,
and with it its rounding.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .bottleneck import Squeezed, bottleneck_like, down_weight_rows, store_bottleneck
from .common import (
    across_groups,
    allow_next_launch,
    block_factor,
    frequency_of,
    pooling_weight,
    real_span,
    row_pointers,
    sum_slots,
    token_factor,
    token_scale,
)
from .launch import FUSE_MULTIPLY_ADD, HiddenStates, dense, device_of, launches_overlap, mask_arguments

_RUNTIME = ["size", "stride_b", "stride_l", "stride_mask_b", "stride_mask_l", "first_block"]
_UNALIGNED = ["p_mask", "p_cu_seqlens"]  # whose alignment must not choose another kernel, and with it another order


@triton.jit
def sum_chunk(
    p_hidden, p_mask_row, o_row, o_d, m_d, start_at, stop_at, seen, first, end, length, size, stride_l, stride_mask_l, y,
    scale, NUM: tl.constexpr, OFFICIAL: tl.constexpr, POOLING: tl.constexpr, GROUPS: tl.constexpr, PER: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr, READ_MASK: tl.constexpr,
):  # fmt: skip
    """Running sums over tokens [start_at, stop_at): of beta u and of w u, PER tensors [GROUPS * SLOTS, BLOCK_D] of each;
    and how many real tokens were ``seen`` so far. READ_MASK: look at each token's mask; else every token is real."""
    o_r = tl.arange(0, GROUPS * SLOTS)  # [GROUPS * SLOTS] row of a tile: (GROUPS, SLOTS)
    i_g = o_r // SLOTS
    o_slot = tl.arange(0, SLOTS)  # [SLOTS]
    nothing = tl.zeros([GROUPS * SLOTS, o_d.shape[0]], tl.float32)
    sums = (nothing,) * PER
    pools = (nothing,) * PER
    for start in tl.range(start_at, stop_at, ROWS * SLOTS, num_stages=STAGES):
        for i in tl.static_range(ROWS):
            o_l = start + i * SLOTS + o_r % SLOTS  # [GROUPS * SLOTS]
            m_l = o_l < stop_at
            real = m_l
            rank = o_l - first
            if READ_MASK:
                o_t = start + i * SLOTS + o_slot  # the same tokens, each once
                token = tl.load(p_mask_row + o_t.to(tl.int64) * stride_mask_l, mask=o_t < stop_at, other=0) != 0
                token = token.to(tl.int32)
                rank = across_groups(seen + tl.cumsum(token, axis=0) - 1, GROUPS)
                seen += tl.sum(token, axis=0)
                real = across_groups(token, GROUPS) != 0
            m_read = m_l if OFFICIAL else real
            o_u = o_row + o_l.to(tl.int64)[:, None] * stride_l + o_d[None, :]  # [GROUPS * SLOTS, BLOCK_D]
            beta = token_factor(y, rank, o_l, tl.maximum(length, 1), size, scale, OFFICIAL)  # [GROUPS * SLOTS]
            new_sums = ()
            new_pools = ()
            for j in tl.static_range(PER):
                m_u = m_read[:, None] & m_d[None, :]
                if GROUPS * PER > NUM:
                    m_u = m_u & (i_g * PER + j < NUM)[:, None]
                p_u = row_pointers(p_hidden, j, i_g, NUM, GROUPS, PER)
                u = tl.load(p_u[:, None] + o_u, mask=m_u, other=0.0, eviction_policy="evict_first").to(tl.float32)
                new_sums = new_sums + (tl.fma(u, tl.broadcast_to(beta[:, None], u.shape), sums[j]),)
                if POOLING is not None:
                    if OFFICIAL:
                        u = tl.where(real[:, None], u, 0.0)
                    if POOLING != "mean":
                        # One token: chosen, not multiplied by 0 and 1, which would spread its neighbours' NaN.
                        u = tl.where((pooling_weight(o_l, first, end, length, POOLING) > 0.0)[:, None], u, 0.0)
                    new_pools = new_pools + (pools[j] + u,)
                else:
                    new_pools = new_pools + (nothing,)
            sums = new_sums
            pools = new_pools
    return sums, pools, seen


@triton.jit
def sum_tokens(
    p_hidden, p_mask, p_mask_row, o_row, o_d, m_d, start_at, stop_at, seen, first, end, length, size, stride_l,
    stride_mask_l, y, scale, NUM: tl.constexpr, OFFICIAL: tl.constexpr, POOLING: tl.constexpr, GROUPS: tl.constexpr,
    PER: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over tokens [start_at, stop_at): S = sum of beta u and P = sum of w u before the mean's division, PER tensors
    [GROUPS, BLOCK_D] of each, and ``seen``.

    Each token's mask is looked at only where the sentence has holes, and in profile ``official``, where pooling alone knows
    it."""
    if p_mask is not None and (OFFICIAL or end - first != length):
        slots, pool_slots, seen = sum_chunk(
            p_hidden, p_mask_row, o_row, o_d, m_d, start_at, stop_at, seen, first, end, length, size, stride_l,
            stride_mask_l, y, scale, NUM, OFFICIAL, POOLING, GROUPS, PER, ROWS, SLOTS, 1, True,
        )  # fmt: skip
    else:
        slots, pool_slots, seen = sum_chunk(
            p_hidden, p_mask_row, o_row, o_d, m_d, start_at, stop_at, seen, first, end, length, size, stride_l,
            stride_mask_l, y, scale, NUM, OFFICIAL, POOLING, GROUPS, PER, ROWS, SLOTS, STAGES, False,
        )  # fmt: skip
    sums = ()
    pools = ()
    for j in tl.static_range(PER):
        sums = sums + (sum_slots(slots[j], GROUPS, SLOTS),)
        pools = pools + (sum_slots(pool_slots[j], GROUPS, SLOTS),)
    return sums, pools, seen


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_UNALIGNED)
def squeeze_kernel(
    p_hidden,  # NUM pointers to [B, L, D] or [T, D]
    p_mask,  # [B, L] or None
    p_cu_seqlens,  # [B + 1] or None
    p_squeezed,  # [B, D] float32 f, or None where blocks come one at a time
    p_groups,  # [B, GROUPS of N, D] float32: then the partial sums of f; else None
    p_pooled,  # [B, N, D] float32 or None
    p_chunks,  # [B, N, D] float32, where a sentence may have several chunks: sums of the chunks so far; else None
    p_down_weight,  # [H, D] or None
    p_bottleneck,  # [B, TILES of D, H] float32, with p_down_weight
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
    H: tl.constexpr,
    VEC: tl.constexpr,
    X_LOW: tl.constexpr,
    X_HIGH: tl.constexpr,
    Y_LOW: tl.constexpr,
    Y_HIGH: tl.constexpr,
    ALPHA: tl.constexpr,
    SCALE: tl.constexpr,
    OFFICIAL: tl.constexpr,
    POOLING: tl.constexpr,
    GROUPS: tl.constexpr,  # of the NUM blocks here
    PER: tl.constexpr,
    PER_OF_N: tl.constexpr,
    GROUPS_OF_N: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SCAN: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    PART: tl.constexpr = D // M
    TILES: tl.constexpr = (PART + BLOCK_D - 1) // BLOCK_D  # feature tiles of a part
    if OVERLAP:
        allow_next_launch()

    index = tl.program_id(0).to(tl.int64)
    stride_b = stride_b.to(tl.int64) * VEC  # in units of a load, so that the compiler knows what divides them
    stride_l = stride_l.to(tl.int64) * VEC
    i_tile = (index % (M * TILES)).to(tl.int32)
    i_b = index // (M * TILES)
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
    start_at = first
    stop_at = end
    if OFFICIAL:  # the published code squeezes padding too
        start_at = size * 0
        stop_at = size

    y = frequency_of(part, Y_LOW, Y_HIGH)
    scale = token_scale(y, length, SCALE)
    i_g = tl.arange(0, GROUPS)[:, None]  # [GROUPS, 1]
    seen = length * 0
    if p_chunks is None:
        sums, pools, seen = sum_tokens(
            p_hidden, p_mask, p_mask_row, o_row, o_d, m_d, start_at, stop_at, seen, first, end, length, size, stride_l,
            stride_mask_l, y, scale, NUM, OFFICIAL, POOLING, GROUPS, PER, ROWS, SLOTS, STAGES,
        )  # fmt: skip
    else:
        # The sums of the chunks so far would take half the registers: they wait in memory. At least one chunk, so that an empty
        # sentence's sums are written too.
        for chunk in range(start_at, tl.maximum(stop_at, start_at + 1), CHUNK):
            sums, pools, seen = sum_tokens(
                p_hidden, p_mask, p_mask_row, o_row, o_d, m_d, chunk, tl.minimum(chunk + CHUNK, stop_at), seen, first, end,
                length, size, stride_l, stride_mask_l, y, scale, NUM, OFFICIAL, POOLING, GROUPS, PER, ROWS, SLOTS, STAGES,
            )  # fmt: skip
            for j in tl.static_range(PER):
                n = first_block + i_g * PER + j
                m_n = (n < N) & m_d[None, :]  # [GROUPS, BLOCK_D]
                o_n = (i_b * N + n) * D + o_d[None, :]
                before = m_n & (chunk > start_at)
                tl.store(p_chunks + o_n, tl.load(p_chunks + o_n, mask=before, other=0.0) + sums[j], mask=m_n)
                if POOLING is not None:
                    tl.store(p_pooled + o_n, tl.load(p_pooled + o_n, mask=before, other=0.0) + pools[j], mask=m_n)
            tl.debug_barrier()  # read back by whichever thread
        sums = ()
        pools = ()
        for j in tl.static_range(PER):
            n = first_block + i_g * PER + j
            m_n = (n < N) & m_d[None, :]
            o_n = (i_b * N + n) * D + o_d[None, :]
            sums = sums + (tl.load(p_chunks + o_n, mask=m_n, other=0.0),)
            pools = pools + (tl.load(p_pooled + o_n, mask=m_n, other=0.0) if POOLING is not None else sums[j],)
        tl.debug_barrier()  # p is overwritten below

    if p_down_weight is not None and H <= BLOCK_H:  # asked for ahead of what stands between here and its use
        w = down_weight_rows(p_down_weight, 0, o_d, m_d, H, D, BLOCK_H)
    x = frequency_of(part, X_LOW, X_HIGH)
    f_groups = tl.zeros([GROUPS, BLOCK_D], tl.float32)
    if p_groups is not None:  # one block of N: its group goes on where the block before left off
        p_group = p_groups + (i_b * GROUPS_OF_N + first_block // PER_OF_N) * D + o_d[None, :]
        f_groups = tl.load(p_group, mask=m_d[None, :] & (first_block % PER_OF_N != 0), other=0.0)
    for j in tl.static_range(PER):
        n = first_block + i_g * PER + j  # [GROUPS, 1]
        alpha = block_factor(x, n, PER if NUM == N else 1, j if NUM == N else 0, N, ALPHA)
        f_groups = tl.fma(sums[j], tl.broadcast_to(alpha, f_groups.shape), f_groups)
        if POOLING is not None:
            scale = 1.0
            if POOLING == "mean":
                scale = tl.div_rn(1.0, tl.maximum(length, 1).to(tl.float32))
            tl.store(p_pooled + (i_b * N + n) * D + o_d[None, :], pools[j] * scale, mask=(n < N) & m_d[None, :])
    if p_groups is not None:
        tl.store(p_group, f_groups, mask=m_d[None, :])
    else:
        f = tl.zeros([BLOCK_D], tl.float32)
        for group in tl.static_range(GROUPS):
            f += tl.sum(tl.where(i_g == group, f_groups, 0.0), axis=0)  # ascending, however the groups lie in the warps
        tl.store(p_squeezed + i_b * D + o_d, f, mask=m_d)
        if p_down_weight is not None:
            p_tile = p_bottleneck + (i_b * (M * TILES) + i_tile) * H
            for h in tl.static_range(0, H, BLOCK_H):
                if H > BLOCK_H:
                    w = down_weight_rows(p_down_weight, h, o_d, m_d, H, D, BLOCK_H)
                store_bottleneck(p_tile, h, w, f, m_d, H, BLOCK_H)


# ---------------------------------------------------------------- launchers


def _squeeze_into(
    hidden: HiddenStates,
    first_block: int,
    num_blocks: int,
    rows: int,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
    squeezed: Tensor | None,
    groups: Tensor | None,
    pooled: Tensor | None,
    down_weight: Tensor | None,
    bottleneck: Tensor | None,
) -> None:
    """Squeeze blocks ``first_block``, ... (all N of them, or a single one of them into ``groups``)."""
    if rows == 0:
        return
    mask, stride_mask_b, stride_mask_l = mask_arguments(attention_mask)
    blocks_here = len(hidden.tensors)
    here, whole = config.deal(blocks_here), config.deal(num_blocks)
    tile = config.squeeze(hidden.size // frequencies, hidden.vector, here.groups)
    device = hidden.tensors[0].device
    width = 0 if down_weight is None else down_weight.shape[0]
    chunks = None
    if hidden.length > config.CHUNK:
        chunks = torch.empty(rows, num_blocks, hidden.size, dtype=torch.float32, device=device)
    with device_of(hidden.tensors[0]):
        squeeze_kernel[(rows * config.num_tiles(hidden.size, frequencies, hidden.vector),)](
            hidden.tensors, mask, dense(cu_seqlens), squeezed, groups, pooled, chunks, down_weight, bottleneck,
            hidden.length, hidden.stride_b, hidden.stride_l, stride_mask_b, stride_mask_l, first_block,
            N=num_blocks, NUM=blocks_here, D=hidden.size, M=frequencies, H=width, VEC=hidden.vector,
            **config.dct_constants(num_blocks, frequencies, profile),
            OFFICIAL=profile == "official", POOLING=pooling, GROUPS=here.groups, PER=here.per_group,
            PER_OF_N=whole.per_group, GROUPS_OF_N=whole.groups, ROWS=tile.rows, SLOTS=tile.slots, CHUNK=config.CHUNK,
            BLOCK_D=tile.block_d, BLOCK_H=config.bottleneck_rows(here.groups), SCAN=config.SCAN, STAGES=tile.stages,
            OVERLAP=down_weight is not None and launches_overlap(device), num_warps=here.groups,
            enable_fp_fusion=FUSE_MULTIPLY_ADD,
        )  # fmt: skip


def squeeze_for_gate(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
    down_weight: Tensor | None,
) -> Squeezed:
    """f, p and, for a ``down_weight`` [H, D], its products with f: one launch."""
    first, num_blocks = hidden_states[0], len(hidden_states)
    hidden = HiddenStates.of(hidden_states, cu_seqlens is not None, frequencies)
    rows = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    squeezed = first.new_empty(rows, hidden.size, dtype=torch.float32)
    pooled = None if pooling is None else first.new_empty(rows, num_blocks, hidden.size, dtype=torch.float32)
    bottleneck = None
    if down_weight is not None:
        bottleneck = bottleneck_like(squeezed, down_weight, frequencies, hidden.vector)
    _squeeze_into(
        hidden, 0, num_blocks, rows, attention_mask, cu_seqlens, frequencies, profile, pooling, squeezed, None, pooled,
        dense(down_weight), bottleneck,
    )  # fmt: skip
    return Squeezed(squeezed, pooled, bottleneck)


def squeeze(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    frequencies: int,
    profile: str,
    pooling: str | None,
) -> tuple[Tensor, Tensor | None]:
    """f [B, D], and p [B, N, D] with pooling."""
    done = squeeze_for_gate(hidden_states, attention_mask, cu_seqlens, frequencies, profile, pooling, None)
    return done.f, done.pooled


def num_groups(num_blocks: int) -> int:
    """Rows of ``squeezed_groups`` that ``squeeze_block`` sums N blocks into."""
    return config.deal(num_blocks).groups


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
    _squeeze_into(
        hidden, block, num_blocks, squeezed_groups.shape[0], attention_mask, cu_seqlens, frequencies, profile, pooling,
        None, squeezed_groups, pooled, None, None,
    )  # fmt: skip

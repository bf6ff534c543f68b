"""squeeze's sums over a sentence's tokens. The formulas and the order of summation are in ``squeeze``."""

import triton
import triton.language as tl

from .common import across_groups, add_runs, end_run, pooling_weight, row_pointers, run_ends, sum_slots, token_factor


@triton.jit
def running_sums(
    p_hidden,  # tuple of pointers
    p_mask_row,  # or None
    where,  # (o_row, o_d, m_d): the sentence's first row; features [BLOCK_D]
    window,  # (begin, stop, seen): the tokens to sum, and the number of real ones before ``begin``
    span,  # (first, end, length): the sentence's real tokens lie in [first, end), ``length`` of them
    num_tokens,
    strides,  # (of a hidden state's tokens, of the mask's)
    wave,  # (y, scale) of the part
    DEAL: tl.constexpr,
    OFFICIAL: tl.constexpr,
    POOLING: tl.constexpr,
    TILE: tl.constexpr,
    READ_MASK: tl.constexpr,  # else every token is real
):
    """Running sums of beta u and of w u over the window's tokens, ``per_group`` tensors [GROUPS * SLOTS, BLOCK_D] of each;
    and the number of real tokens before its end, if the mask is read."""
    NUM: tl.constexpr = DEAL.num_blocks
    GROUPS: tl.constexpr = DEAL.groups
    PER: tl.constexpr = DEAL.per_group
    ROWS: tl.constexpr = TILE.rows
    SLOTS: tl.constexpr = TILE.slots
    STAGES: tl.constexpr = 1 if READ_MASK else TILE.stages
    IN_RUNS: tl.constexpr = p_hidden[0].dtype.element_ty == tl.float32
    o_row, o_d, m_d = where
    begin, stop, seen = window
    first, end, length = span
    stride_l, stride_mask_l = strides
    y, scale = wave
    o_r = tl.arange(0, GROUPS * SLOTS)  # [GROUPS * SLOTS] row of a tile: (GROUPS, SLOTS)
    i_g = o_r // SLOTS
    o_slot = tl.arange(0, SLOTS)  # [SLOTS]
    nothing = tl.zeros([GROUPS * SLOTS, o_d.shape[0]], tl.float32)
    sums = (nothing,) * PER
    pools = (nothing,) * PER
    totals = sums  # of the runs that have ended, with IN_RUNS
    pool_totals = pools
    for start in tl.range(begin, stop, ROWS * SLOTS, num_stages=STAGES):
        for i in tl.static_range(ROWS):
            o_l = start + i * SLOTS + o_r % SLOTS  # [GROUPS * SLOTS]
            m_l = o_l < stop
            real = m_l
            rank = o_l - first
            if READ_MASK:
                o_t = start + i * SLOTS + o_slot  # the same tokens, each once
                token = tl.load(p_mask_row + o_t.to(tl.int64) * stride_mask_l, mask=o_t < stop, other=0) != 0
                token = token.to(tl.int32)
                rank = across_groups(seen + tl.cumsum(token, axis=0) - 1, GROUPS)
                seen += tl.sum(token, axis=0)
                real = across_groups(token, GROUPS) != 0
            m_read = m_l if OFFICIAL else real
            o_u = o_row + o_l.to(tl.int64)[:, None] * stride_l + o_d[None, :]  # [GROUPS * SLOTS, BLOCK_D]
            beta = token_factor(y, rank, o_l, tl.maximum(length, 1), num_tokens, scale, OFFICIAL)  # [GROUPS * SLOTS]
            new_sums = ()
            new_pools = ()
            for j in tl.static_range(PER):
                m_u = m_read[:, None] & m_d[None, :]
                if GROUPS * PER > NUM:
                    m_u = m_u & (i_g * PER + j < NUM)[:, None]
                p_u = row_pointers(p_hidden, j, i_g, DEAL)
                u = tl.load(p_u[:, None] + o_u, mask=m_u, other=0.0, eviction_policy="evict_first").to(tl.float32)
                new_sums = new_sums + (tl.fma(u, tl.broadcast_to(beta[:, None], u.shape), sums[j]),)
                if POOLING is not None:
                    if OFFICIAL:
                        u = tl.where(real[:, None], u, 0.0)
                    if POOLING != "mean":
                        # One token, selected: multiplying by 0 and 1 would spread its neighbours' NaN.
                        u = tl.where((pooling_weight(o_l, first, end, length, POOLING) > 0.0)[:, None], u, 0.0)
                    new_pools = new_pools + (pools[j] + u,)
                else:
                    new_pools = new_pools + (nothing,)
            sums = new_sums
            pools = new_pools
        if IN_RUNS:
            ends = run_ends(start, begin, ROWS, SLOTS)
            sums, totals = end_run(ends, sums, totals, PER)
            if POOLING is not None:
                pools, pool_totals = end_run(ends, pools, pool_totals, PER)
    if IN_RUNS:
        sums = add_runs(sums, totals, PER)
        pools = add_runs(pools, pool_totals, PER)
    return sums, pools, seen


@triton.jit
def sum_tokens(
    p_hidden,
    p_mask_row,
    where,
    window,
    span,
    num_tokens,
    strides,
    wave,
    DEAL: tl.constexpr,
    OFFICIAL: tl.constexpr,
    POOLING: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums over the window's tokens: S = sum of beta u and P = sum of w u before the mean's division, ``per_group`` tensors
    [GROUPS, BLOCK_D] of each; and the third result of ``running_sums``, whose arguments these are.

    Reads each token's mask only if the sentence has holes, or in profile ``official``, whose ``span`` bounds pooling alone."""
    GROUPS: tl.constexpr = DEAL.groups
    PER: tl.constexpr = DEAL.per_group
    SLOTS: tl.constexpr = TILE.slots
    first, end, length = span
    begin, stop, seen = window
    if p_mask_row is not None and (OFFICIAL or end - first != length):
        slots, pool_slots, seen = running_sums(
            p_hidden, p_mask_row, where, window, span, num_tokens, strides, wave, DEAL, OFFICIAL, POOLING, TILE, True
        )
    else:
        slots, pool_slots, seen = running_sums(
            p_hidden, p_mask_row, where, window, span, num_tokens, strides, wave, DEAL, OFFICIAL, POOLING, TILE, False
        )
    sums = ()
    pools = ()
    for j in tl.static_range(PER):
        sums = sums + (sum_slots(slots[j], GROUPS, SLOTS),)
        pools = pools + (sum_slots(pool_slots[j], GROUPS, SLOTS),)
    return sums, pools, seen

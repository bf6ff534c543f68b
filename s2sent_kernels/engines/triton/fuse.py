"""fuse: v from the gates and the hidden states, one read and one write; and the gates' gradient.

v[b,l,d] = sum_n g[b,n,d] u_n[b,l,d], blocks ascending, 0 at padding
dg[b,n,d] = sum_l dv[b,l,d] u_n[b,l,d] over real tokens, in the order of summation of squeeze
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formula.call import Batch
from . import config
from .common import (
    RUN,
    add_runs,
    end_run,
    real_span,
    row_pointers,
    run_ends,
    sentence_at,
    sum_slots,
    wait_for_previous,
)
from .direct import direct
from .launch import FUSE_MULTIPLY_ADD, HiddenStates, Mask, cdiv, dense, launches_overlap

_RUNTIME = ["num_tokens", "stride_b", "stride_l", "stride_mask_b", "stride_mask_l"]
# Their alignment must not select another variant, which could sum in another order.
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


@triton.jit(do_not_specialize=[*_RUNTIME, "num_sentences"], do_not_specialize_on_alignment=_UNALIGNED)
def fuse_kernel(
    p_hidden,  # N pointers to [B, L, D] or [T, D]
    p_gates,  # g [B, N, D] float32
    p_mask,  # [B, L] or None
    p_cu_seqlens,  # [B + 1] or None
    p_fused,  # v like a hidden state, contiguous
    num_tokens,  # L, or T for packed batches
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
    OVERLAP: tl.constexpr,
):
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    index = tl.program_id(0).to(tl.int64)
    stride_b = stride_b.to(tl.int64) * VEC  # in units of a load, so that the compiler knows what divides them
    stride_l = stride_l.to(tl.int64) * VEC
    i_row = index // TILES
    o_d = (index % TILES).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_d = o_d < D
    if OVERLAP:
        wait_for_previous()
    if p_cu_seqlens is not None:
        # A tile of packed tokens may hold rows of several sentences, which are written one sentence after another.
        start = (i_row * TOKENS).to(tl.int32)
        o_t = start + tl.arange(0, TOKENS)  # [TOKENS] row of the packed batch
        o_u = o_t.to(tl.int64)[:, None] * stride_l + o_d[None, :]
        o_v = o_t.to(tl.int64)[:, None] * D + o_d[None, :]
        sentence = sentence_at(p_cu_seqlens, num_sentences, start)
        begin = tl.load(p_cu_seqlens + sentence)
        while (sentence < num_sentences) & (begin < start + TOKENS):
            stop = tl.load(p_cu_seqlens + sentence + 1)
            m_row = (o_t >= begin) & (o_t < stop) & (o_t < num_tokens)
            v = weighted_sum(p_hidden, p_gates, o_u, o_d, m_row, m_d, sentence.to(tl.int64), N, D)
            tl.store(p_fused + o_v, v.to(p_fused.dtype.element_ty), mask=m_row[:, None] & m_d[None, :])
            begin = stop
            sentence += 1
    else:
        tiles_l = (num_tokens + TOKENS - 1) // TOKENS
        i_b = i_row // tiles_l
        o_l = (i_row % tiles_l).to(tl.int32) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
        m_l = o_l < num_tokens
        real = m_l
        if p_mask is not None:
            p_mask_row = p_mask + i_b * stride_mask_b
            real = tl.load(p_mask_row + o_l.to(tl.int64) * stride_mask_l, mask=m_l, other=0) != 0
        o_u = i_b * stride_b + o_l.to(tl.int64)[:, None] * stride_l + o_d[None, :]
        v = weighted_sum(p_hidden, p_gates, o_u, o_d, real, m_d, i_b, N, D)
        o_v = (i_b * num_tokens + o_l.to(tl.int64))[:, None] * D + o_d[None, :]
        tl.store(p_fused + o_v, v.to(p_fused.dtype.element_ty), mask=m_l[:, None] & m_d[None, :])


@triton.jit
def sum_products(
    p_hidden,  # tuple of pointers
    p_dv,
    p_mask_row,  # with READ_MASK
    rows,  # (o_row, o_dv_row): the sentence's first row, in a hidden state and in dv
    features,  # (o_d, m_d): [BLOCK_D] each
    span,  # (first, end): the tokens to sum
    strides,  # (of a hidden state's tokens, of dv's, of the mask's)
    DEAL: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    READ_MASK: tl.constexpr,  # else every token is real
):
    """Running sums of dv u over the tokens of ``span``: ``per_group`` tensors [GROUPS * SLOTS, BLOCK_D]."""
    N: tl.constexpr = DEAL.num_blocks
    GROUPS: tl.constexpr = DEAL.groups
    PER: tl.constexpr = DEAL.per_group
    IN_RUNS: tl.constexpr = p_hidden[0].dtype.element_ty == tl.float32
    o_row, o_dv_row = rows
    o_d, m_d = features
    first, end = span
    stride_l, stride_dv_l, stride_mask_l = strides
    o_r = tl.arange(0, GROUPS * SLOTS)  # [GROUPS * SLOTS] row of a tile: (GROUPS, SLOTS)
    i_g = o_r // SLOTS
    sums = (tl.zeros([GROUPS * SLOTS, o_d.shape[0]], tl.float32),) * PER
    totals = sums  # of the runs that have ended, with IN_RUNS
    for start in tl.range(first, end, ROWS * SLOTS, num_stages=STAGES):
        for i in tl.static_range(ROWS):
            o_l = start + i * SLOTS + o_r % SLOTS  # [GROUPS * SLOTS]
            real = o_l < end
            if READ_MASK:
                real = tl.load(p_mask_row + o_l.to(tl.int64) * stride_mask_l, mask=real, other=0) != 0
            m_dv = real[:, None] & m_d[None, :]  # [GROUPS * SLOTS, BLOCK_D]
            o_dv = o_dv_row + o_l.to(tl.int64)[:, None] * stride_dv_l + o_d[None, :]
            dv = tl.load(p_dv + o_dv, mask=m_dv, other=0.0).to(tl.float32)
            o_u = o_row + o_l.to(tl.int64)[:, None] * stride_l + o_d[None, :]
            new_sums = ()
            for j in tl.static_range(PER):
                m_u = m_dv if GROUPS * PER == N else m_dv & (i_g * PER + j < N)[:, None]
                p_u = row_pointers(p_hidden, j, i_g, DEAL)
                u = tl.load(p_u[:, None] + o_u, mask=m_u, other=0.0, eviction_policy="evict_first")
                new_sums = new_sums + (tl.fma(dv, u.to(tl.float32), sums[j]),)
            sums = new_sums
        if IN_RUNS:
            sums, totals = end_run(run_ends(start, first, ROWS, SLOTS), sums, totals, PER)
    if IN_RUNS:
        sums = add_runs(sums, totals, PER)
    return sums


@triton.jit
def sum_chunk(
    p_hidden,
    p_dv,
    p_mask_row,  # or None
    rows,
    features,
    span,
    strides,
    holes,  # whether some tokens between the sentence's first and last are not real
    DEAL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums of dv u over the tokens of ``span``, ``per_group`` tensors [GROUPS, BLOCK_D]; the other arguments are those of
    ``sum_products``. Reads each token's mask only where there are holes."""
    GROUPS: tl.constexpr = DEAL.groups
    PER: tl.constexpr = DEAL.per_group
    ROWS: tl.constexpr = TILE.rows
    FEWER: tl.constexpr = ROWS // 2 if ROWS > 1 else 1  # where the mask is read too, or registers spill on sm_80
    SLOTS: tl.constexpr = TILE.slots
    STAGES: tl.constexpr = TILE.stages
    if p_mask_row is not None and holes:
        slots = sum_products(
            p_hidden, p_dv, p_mask_row, rows, features, span, strides, DEAL, FEWER, SLOTS, 1, READ_MASK=True
        )
    else:
        slots = sum_products(
            p_hidden, p_dv, None, rows, features, span, strides, DEAL, ROWS, SLOTS, STAGES, READ_MASK=False
        )
    sums = ()
    for j in tl.static_range(PER):
        sums = sums + (sum_slots(slots[j], GROUPS, SLOTS),)
    return sums


@triton.jit(do_not_specialize=[*_RUNTIME, "stride_dv_b", "stride_dv_l"], do_not_specialize_on_alignment=_UNALIGNED)
def fuse_backward_kernel(
    p_hidden,  # N pointers to [B, L, D] or [T, D]
    p_dv,  # like a hidden state
    p_mask,  # [B, L] or None
    p_cu_seqlens,  # [B + 1] or None
    p_dgates,  # dg [B, N, D] float32
    num_tokens,  # L
    stride_b,  # of a hidden state, in units of VEC elements
    stride_l,
    stride_dv_b,
    stride_dv_l,
    stride_mask_b,
    stride_mask_l,
    D: tl.constexpr,
    VEC: tl.constexpr,
    DEAL: tl.constexpr,
    TILE: tl.constexpr,
    SINGLE: tl.constexpr,  # every sentence is a single chunk
):
    """A program computes one sentence and one tile of features. Its blocks are dealt to the warps and its tokens cut into chunks
    as in squeeze."""
    N: tl.constexpr = DEAL.num_blocks
    GROUPS: tl.constexpr = DEAL.groups
    PER: tl.constexpr = DEAL.per_group
    BLOCK_D: tl.constexpr = TILE.block_d
    CHUNK: tl.constexpr = RUN * TILE.slots
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    index = tl.program_id(0).to(tl.int64)
    stride_b = stride_b.to(tl.int64) * VEC  # in units of a load, so that the compiler knows what divides them
    stride_l = stride_l.to(tl.int64) * VEC
    stride_dv_b = stride_dv_b.to(tl.int64) * VEC
    stride_dv_l = stride_dv_l.to(tl.int64) * VEC
    o_d = (index % TILES).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    i_b = index // TILES
    m_d = o_d < D
    features = (o_d, m_d)
    rows = (i_b * stride_b, i_b * stride_dv_b)
    strides = (stride_l, stride_dv_l, stride_mask_l)
    p_mask_row = p_mask
    first = num_tokens * 0
    end = num_tokens
    length = num_tokens
    if p_cu_seqlens is not None:
        begin = tl.load(p_cu_seqlens + i_b)
        end = tl.load(p_cu_seqlens + i_b + 1) - begin
        rows = (begin.to(tl.int64) * stride_l, begin.to(tl.int64) * stride_dv_l)
    elif p_mask is not None:
        p_mask_row = p_mask + i_b * stride_mask_b
        first, end, length = real_span(p_mask_row, stride_mask_l, num_tokens)
    holes = end - first != length
    i_g = tl.arange(0, GROUPS)[:, None]  # [GROUPS, 1]
    if SINGLE:
        sums = sum_chunk(p_hidden, p_dv, p_mask_row, rows, features, (first, end), strides, holes, DEAL, TILE)
        for j in tl.static_range(PER):
            n = i_g * PER + j
            tl.store(p_dgates + (i_b * N + n) * D + o_d[None, :], sums[j], mask=(n < N) & m_d[None, :])
    else:
        # Sums of earlier chunks are kept in memory, because they would fill half the registers. The loop runs at least once, so
        # that an empty sentence's sums are written too.
        for chunk in range(first, tl.maximum(end, first + 1), CHUNK):
            span = (chunk, tl.minimum(chunk + CHUNK, end))
            sums = sum_chunk(p_hidden, p_dv, p_mask_row, rows, features, span, strides, holes, DEAL, TILE)
            for j in tl.static_range(PER):
                n = i_g * PER + j
                m_n = (n < N) & m_d[None, :]  # [GROUPS, BLOCK_D]
                p_n = p_dgates + (i_b * N + n) * D + o_d[None, :]
                before = tl.load(p_n, mask=m_n & (chunk > first), other=0.0)
                tl.store(p_n, before + sums[j], mask=m_n)
            tl.debug_barrier()  # another thread may load what this one stored


# ---------------------------------------------------------------- launchers

launch_fuse = direct(fuse_kernel, tuples=("p_hidden",))
launch_fuse_backward = direct(fuse_backward_kernel, tuples=("p_hidden",))


def fuse(batch: Batch, gates: Tensor) -> Tensor:
    """v like a hidden state."""
    return fuse_laid_out(HiddenStates.of(batch.hidden_states, batch.packed, 1), batch, gates)


def fuse_laid_out(hidden: HiddenStates, batch: Batch, gates: Tensor) -> Tensor:
    """``fuse`` of the batch's hidden states as they were laid out, for one part."""
    fused = batch.hidden_states[0].new_empty(*batch.shape)
    if fused.numel() == 0:
        return fused
    tile = config.fuse(hidden.hidden_size, batch.num_blocks, hidden.vector)
    overlap = launches_overlap(batch.device)
    rows = cdiv(hidden.num_tokens, tile.tokens) * (1 if batch.packed else batch.num_sentences)
    mask = Mask.of(batch)
    launch_fuse(
        rows * cdiv(hidden.hidden_size, tile.block_d),
        p_hidden=hidden.tensors,
        num_tokens=hidden.num_tokens,
        stride_b=hidden.stride_b,
        stride_l=hidden.stride_l,
        D=hidden.hidden_size,
        VEC=hidden.vector,
        p_mask=mask.attention_mask,
        p_cu_seqlens=mask.cu_seqlens,
        stride_mask_b=mask.stride_b,
        stride_mask_l=mask.stride_l,
        p_gates=dense(gates, torch.float32),
        p_fused=fused,
        num_sentences=batch.num_sentences if batch.packed else 0,
        N=batch.num_blocks,
        TOKENS=tile.tokens,
        BLOCK_D=tile.block_d,
        OVERLAP=overlap,
        num_warps=tile.num_warps,
        enable_fp_fusion=FUSE_MULTIPLY_ADD,
        launch_pdl=overlap or None,
    )
    return fused


def fuse_backward(grad_fused: Tensor, batch: Batch) -> Tensor:
    """dg [B, N, D] float32: one read of the hidden states and of dv."""
    hidden = HiddenStates.of(batch.hidden_states, batch.packed, 1)
    grad = HiddenStates.of([grad_fused], batch.packed, 1)
    num_sentences, num_blocks = batch.num_sentences, batch.num_blocks
    dgates = grad_fused.new_empty(num_sentences, num_blocks, hidden.hidden_size, dtype=torch.float32)
    if num_sentences == 0:
        return dgates
    deal = config.deal(num_blocks)
    tile = config.fuse_backward(hidden.hidden_size, hidden.vector, deal.groups)
    mask = Mask.of(batch)
    launch_fuse_backward(
        num_sentences * cdiv(hidden.hidden_size, tile.block_d),
        p_hidden=hidden.tensors,
        num_tokens=hidden.num_tokens,
        stride_b=hidden.stride_b,
        stride_l=hidden.stride_l,
        D=hidden.hidden_size,
        VEC=hidden.vector,
        p_mask=mask.attention_mask,
        p_cu_seqlens=mask.cu_seqlens,
        stride_mask_b=mask.stride_b,
        stride_mask_l=mask.stride_l,
        p_dv=grad.tensors[0],
        p_dgates=dgates,
        stride_dv_b=grad.stride_b,
        stride_dv_l=grad.stride_l,
        DEAL=deal,
        TILE=tile,
        SINGLE=hidden.num_tokens <= tile.chunk,
        num_warps=deal.groups,
        enable_fp_fusion=FUSE_MULTIPLY_ADD,
    )
    return dgates

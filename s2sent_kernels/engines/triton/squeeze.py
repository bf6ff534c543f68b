"""squeeze: f and, in the same read, the pooled p and the bottleneck's products.

    f[b,d] = sum_n sum_l alpha[m(d),n] beta[b,m(d),l] u_n[b,l,d]        p[b,n,d] = sum_l w[b,l] u_n[b,l,d]
    t[b,i,h] = sum_{d in tile i} W1[h,d] f[b,d]                         the gate's W1 f, by feature tiles

A program computes one sentence and one tile of features that lie in one part, so that alpha and beta are the same for all
its features. The blocks are dealt to its warps: GROUPS warps sum PER neighbouring blocks each, side by side as the rows of
one tile. Copies into shared memory are prefetched (``num_stages``), which keeps loads in flight. At the end the program
multiplies its f with its slice of W1, because the gate would have to read all of W1 in every one of its programs.

Order of summation, on which every bit depends: a sentence's tokens, from its first real one on, are cut into chunks of
RUN * SLOTS; a chunk's tokens are dealt to SLOTS slots in turn, each a running sum, which in float32 is cut into runs of
FLOAT32_RUN terms that are added ascending; at the chunk's end the slots are summed as a tree; then the chunks ascending; then
the blocks of a group ascending, weighted by alpha; then the groups ascending; for t the features of a tile as a tree. SLOTS is
the number of tokens of a block that a warp holds side by side; the runs bound the sums' rounding (bench/ACCURACY.md).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formula.call import Batch, PartialSums, Place, Reading
from . import config
from .bottleneck import Squeezed, bottleneck_like, down_weight_rows, store_bottleneck
from .common import RUN, allow_next_launch, block_factor, frequency_of, real_span, token_scale
from .direct import direct
from .launch import FUSE_MULTIPLY_ADD, HiddenStates, Mask, dense, launches_overlap
from .squeeze_sums import sum_tokens

_RUNTIME = ["num_tokens", "stride_b", "stride_l", "stride_mask_b", "stride_mask_l", "first_block"]
# Their alignment must not select another variant, which could sum in another order.
_UNALIGNED = ["p_mask", "p_cu_seqlens"]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_UNALIGNED)
def squeeze_kernel(
    p_hidden,  # pointers to HERE's blocks [B, L, D] or [T, D]
    p_mask,  # [B, L] or None
    p_cu_seqlens,  # [B + 1] or None
    p_squeezed,  # f [B, D] float32, or None if p_groups is given
    p_groups,  # partial sums of f [B, GROUPS of N, D] float32 if blocks are squeezed one at a time, else None
    p_pooled,  # p [B, N, D] float32 or None
    p_chunks,  # [B, N, D] float32, sums of the chunks so far; None if every sentence is a single chunk
    p_down_weight,  # W1 [H, D] or None
    p_bottleneck,  # t [B, TILES of D, H] float32, with p_down_weight
    num_tokens,  # L
    stride_b,  # of a hidden state, in units of VEC elements
    stride_l,
    stride_mask_b,
    stride_mask_l,
    first_block,  # the block that p_hidden[0] is
    D: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    VEC: tl.constexpr,
    DCT: tl.constexpr,
    POOLING: tl.constexpr,
    HERE: tl.constexpr,  # the deal of the blocks in p_hidden: all N of them, or one
    WHOLE: tl.constexpr,  # the deal of N blocks
    TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    N: tl.constexpr = WHOLE.num_blocks
    NUM: tl.constexpr = HERE.num_blocks
    GROUPS: tl.constexpr = HERE.groups
    PER: tl.constexpr = HERE.per_group
    GROUPS_OF_N: tl.constexpr = WHOLE.groups
    PER_OF_N: tl.constexpr = WHOLE.per_group
    ALPHA: tl.constexpr = DCT.alpha  # Triton 3.6 cannot pass a record's tuple on as an argument
    OFFICIAL: tl.constexpr = DCT.official
    BLOCK_D: tl.constexpr = TILE.block_d
    CHUNK: tl.constexpr = RUN * TILE.slots
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
        first, end, length = real_span(p_mask_row, stride_mask_l, num_tokens)
    else:
        first = num_tokens * 0
        end = num_tokens
        length = num_tokens
    start = first
    stop = end
    if OFFICIAL:  # the published code squeezes padding too
        start = num_tokens * 0
        stop = num_tokens

    y = frequency_of(part, DCT.y_low, DCT.y_high)
    wave = (y, token_scale(y, length, DCT.scale))
    where = (o_row, o_d, m_d)
    span = (first, end, length)
    strides = (stride_l, stride_mask_l)
    i_g = tl.arange(0, GROUPS)[:, None]  # [GROUPS, 1]
    seen = length * 0
    if p_chunks is None:
        window = (start, stop, seen)
        sums, pools, seen = sum_tokens(
            p_hidden, p_mask_row, where, window, span, num_tokens, strides, wave, HERE, OFFICIAL, POOLING, TILE
        )
    else:
        # Sums of earlier chunks are kept in memory, because they would fill half the registers. The loop runs at least once, so
        # that an empty sentence's sums are written too.
        for chunk in range(start, tl.maximum(stop, start + 1), CHUNK):
            window = (chunk, tl.minimum(chunk + CHUNK, stop), seen)
            sums, pools, seen = sum_tokens(
                p_hidden, p_mask_row, where, window, span, num_tokens, strides, wave, HERE, OFFICIAL, POOLING, TILE
            )
            for j in tl.static_range(PER):
                n = first_block + i_g * PER + j
                m_n = (n < N) & m_d[None, :]  # [GROUPS, BLOCK_D]
                o_n = (i_b * N + n) * D + o_d[None, :]
                before = m_n & (chunk > start)
                tl.store(p_chunks + o_n, tl.load(p_chunks + o_n, mask=before, other=0.0) + sums[j], mask=m_n)
                if POOLING is not None:
                    tl.store(p_pooled + o_n, tl.load(p_pooled + o_n, mask=before, other=0.0) + pools[j], mask=m_n)
            tl.debug_barrier()  # another thread may load what this one stored
        sums = ()
        pools = ()
        for j in tl.static_range(PER):
            n = first_block + i_g * PER + j
            m_n = (n < N) & m_d[None, :]
            o_n = (i_b * N + n) * D + o_d[None, :]
            sums = sums + (tl.load(p_chunks + o_n, mask=m_n, other=0.0),)
            pools = pools + (tl.load(p_pooled + o_n, mask=m_n, other=0.0) if POOLING is not None else sums[j],)
        tl.debug_barrier()  # p is overwritten below

    if p_down_weight is not None and H <= BLOCK_H:  # loaded early, to hide the latency
        w = down_weight_rows(p_down_weight, 0, o_d, m_d, H, D, BLOCK_H)
    x = frequency_of(part, DCT.x_low, DCT.x_high)
    f_groups = tl.zeros([GROUPS, BLOCK_D], tl.float32)
    if p_groups is not None:  # one block of N: continue its group's sum
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

launch_squeeze = direct(squeeze_kernel, tuples=("p_hidden",))


class _Results(NamedTuple):
    """The tensors that a launch writes; None for what it does not compute."""

    squeezed: Tensor | None  # f [B, D]
    groups: Tensor | None  # f's partial sums [B, G, D], in place of f if blocks are squeezed one at a time
    pooled: Tensor | None  # p [B, N, D]
    bottleneck: Tensor | None  # t [B, feature tiles, H]


def _launch(
    hidden: HiddenStates, batch: Batch, place: Place, reading: Reading, results: _Results, down_weight: Tensor | None
) -> None:
    """Squeezes all N blocks, or the one at ``place``."""
    num_sentences, num_blocks, hidden_size = batch.num_sentences, place.num_blocks, hidden.hidden_size
    if num_sentences == 0:
        return
    here = config.deal(batch.num_blocks)
    tile = config.squeeze(hidden_size // reading.frequencies, hidden.vector, here.groups)
    chunks = None
    if hidden.num_tokens > tile.chunk:
        chunks = torch.empty(num_sentences, num_blocks, hidden_size, dtype=torch.float32, device=batch.device)
    mask = Mask.of(batch)
    launch_squeeze(
        num_sentences * config.num_tiles(hidden_size, reading.frequencies, hidden.vector),
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
        p_squeezed=results.squeezed,
        p_groups=results.groups,
        p_pooled=results.pooled,
        p_chunks=chunks,
        p_down_weight=dense(down_weight),
        p_bottleneck=results.bottleneck,
        first_block=place.block,
        M=reading.frequencies,
        H=0 if down_weight is None else down_weight.shape[0],
        DCT=config.dct_constants(num_blocks, reading.frequencies, reading.profile),
        POOLING=reading.pooling,
        HERE=here,
        WHOLE=config.deal(num_blocks),
        TILE=tile,
        BLOCK_H=config.bottleneck_rows(here.groups),
        OVERLAP=down_weight is not None and launches_overlap(batch.device),
        num_warps=here.groups,
        enable_fp_fusion=FUSE_MULTIPLY_ADD,
    )


def laid_out(batch: Batch, reading: Reading) -> HiddenStates:
    return HiddenStates.of(batch.hidden_states, batch.packed, reading.frequencies)


def squeeze_for_gate(hidden: HiddenStates, batch: Batch, reading: Reading, down_weight: Tensor | None) -> Squeezed:
    """f, p and, for a ``down_weight`` [H, D], its products with f: one launch."""
    num_sentences, num_blocks, hidden_size = batch.num_sentences, batch.num_blocks, hidden.hidden_size
    first = batch.hidden_states[0]
    squeezed = first.new_empty(num_sentences, hidden_size, dtype=torch.float32)
    pooled = bottleneck = None
    if reading.pooling is not None:
        pooled = first.new_empty(num_sentences, num_blocks, hidden_size, dtype=torch.float32)
    if down_weight is not None:
        bottleneck = bottleneck_like(squeezed, down_weight, reading.frequencies, hidden.vector)
    results = _Results(squeezed, None, pooled, bottleneck)
    _launch(hidden, batch, Place(0, num_blocks), reading, results, down_weight)
    return Squeezed(squeezed, pooled, bottleneck)


def squeeze(batch: Batch, reading: Reading) -> tuple[Tensor, Tensor | None]:
    """f [B, D], and p [B, N, D] with pooling."""
    squeezed, pooled, _ = squeeze_for_gate(laid_out(batch, reading), batch, reading, None)
    return squeezed, pooled


def num_groups(num_blocks: int) -> int:
    """G, the rows of ``squeezed_groups`` into which ``squeeze_block`` sums N blocks."""
    return config.deal(num_blocks).groups


def squeeze_block(batch: Batch, place: Place, sums: PartialSums, reading: Reading) -> None:
    """Adds one block to f's partial sums [B, G, D] and writes its row of p [B, N, D]; blocks in ascending order."""
    _launch(
        laid_out(batch, reading), batch, place, reading, _Results(None, sums.squeezed_groups, sums.pooled, None), None
    )

"""The gate with batch statistics: three launches after squeeze, or after W1 f.

    s = act(W1 f + b1),  x[b,h] = s[b,h] - mean_b s[b,h]
    z[b,j] - mean_b z[b,j] = sum_h W2[j,h] x[b,h]           so b2 and the mean cancel before any product is rounded
    var_j = sum_b (sum_h W2[j,h] x[b,h])^2 / B,  rstd_j = 1 / sqrt(var_j + eps),  mean_j = sum_h W2[j,h] mean_b s[b,h] + b2[j]
    y[b,j] = (sum_h W2[j,h] x[b,h]) rstd_j w_j + b_j        and then as in ``gate``

    bottleneck_kernel    s [B, H], and its float64 sums over a few sentences
    statistics_kernel    a program owns columns j of z, over all sentences, some at a time: mean, rstd and the running
                         statistics; the programs share the writing of x
    gate_kernel          of ``gate``, from x and rstd

Order of summation: s over a few sentences, then over these sums, in float64, ascending; var in lanes of sentences, each
ascending in steps of a tile, then over the lanes. Every column has one program, so the bits do not vary between runs.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formula import reference
from ...formula.call import Batch, BatchStatistics, GateParameters, Gating, Reading
from . import config
from .bottleneck import Squeezed, sum_groups_for_gate
from .common import activate, allow_next_launch, centred, mean_of_sums, store_sum, two_floats, wait_for_previous
from .direct import direct
from .gate import launch_gate
from .gate_backward import fits
from .gate_backward_sums import PRECISION
from .launch import cdiv, launches_overlap
from .squeeze import laid_out, squeeze_for_gate


@triton.jit(do_not_specialize=["num_sentences"])
def bottleneck_kernel(
    p_tiles,  # t [B, T, H] float32, whose sum over T is W1 f
    p_down_bias,  # b1 [H]
    p_bottleneck,  # s [B, H] float32
    p_sums,  # [programs of sentences, H] float64
    num_sentences,
    H: tl.constexpr,
    T: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNROLL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    index = tl.program_id(0).to(tl.int64)
    o_b = index // TILES * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B] sentence
    o_h = (index % TILES).to(tl.int32) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    m_b, m_h = o_b < num_sentences, o_h < H
    bias = tl.load(p_down_bias + o_h, mask=m_h, other=0.0).to(tl.float32)
    if OVERLAP:
        allow_next_launch()
        wait_for_previous()
    s = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    p_t = p_tiles + o_b[:, None] * (T * H) + o_h[None, :]
    for tile in tl.range(0, T, loop_unroll_factor=UNROLL):
        s += tl.load(p_t + tile * H, mask=m_b[:, None] & m_h[None, :], other=0.0)
    s = activate(s + bias[None, :], ACTIVATION)
    tl.store(p_bottleneck + o_b[:, None] * H + o_h[None, :], s, mask=m_b[:, None] & m_h[None, :])
    store_sum(p_sums + index // TILES * H, s, m_b, o_h, m_h)


@triton.jit(do_not_specialize=["num_sentences", "momentum_bits"])
def statistics_kernel(
    p_bottleneck,  # s [B, H] float32
    p_sums,  # [sums of SENTENCES sentences, H] float64
    p_up_weight,  # W2 [COLUMNS, H]
    p_up_bias,  # b2 [COLUMNS]
    p_running_mean,  # [COLUMNS], updated in place, as the next
    p_running_var,
    p_mean,  # [COLUMNS] float32
    p_rstd,  # [COLUMNS] float32
    p_centred,  # x [B, H] float32
    momentum_bits,  # of a float32: a direct launch passes integers
    num_sentences,
    COLUMNS: tl.constexpr,  # N * D
    H: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    SENTENCES: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    BLOCK_B: tl.constexpr = TILE.sentences
    BLOCK_C: tl.constexpr = TILE.columns
    BLOCK_H: tl.constexpr = TILE.block_h
    BLOCK_P: tl.constexpr = max(2, 1024 // BLOCK_H)  # sums that are added at once
    PROGRAMS: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    index = tl.program_id(0)
    o_c = index * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C] row of W2
    m_c = o_c < COLUMNS
    o_h = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    m_h = o_h < H
    p_w = p_up_weight + o_h[:, None] + o_c.to(tl.int64)[None, :] * H
    w = tl.load(p_w, mask=m_h[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_C]
    bias = tl.load(p_up_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if OVERLAP:
        allow_next_launch()
        wait_for_previous()

    mean_s = mean_of_sums(p_sums, num_sentences, o_h, m_h, H, SENTENCES, BLOCK_P)
    # PyTorch's rounding averages out over the sentences, this product's would not.
    mean = (tl.sum(w.to(tl.float64) * mean_s[:, None], axis=0) + bias.to(tl.float64)).to(tl.float32)  # [BLOCK_C]
    high_and_low = two_floats(mean_s)
    squares = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for first in tl.range(0, num_sentences, BLOCK_B, num_stages=TILE.stages):
        o_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)  # [BLOCK_B]
        m_b = o_b < num_sentences
        x = centred(p_bottleneck, high_and_low, o_b, m_b, o_h, m_h, H)
        mine = first // BLOCK_B % PROGRAMS == index
        tl.store(p_centred + o_b[:, None] * H + o_h[None, :], x, mask=(m_b & mine)[:, None] & m_h[None, :])
        z = tl.dot(x, w, input_precision=PRECISION)  # [BLOCK_B, BLOCK_C]
        squares += z * z
    count = num_sentences.to(tl.float32)
    total = tl.sum(squares, axis=0) + (mean - mean)  # [BLOCK_C]; NaN where b2 makes z NaN or infinite
    tl.store(p_mean + o_c, mean, mask=m_c)
    tl.store(p_rstd + o_c, 1.0 / tl.sqrt_rn(tl.div_rn(total, count) + EPS), mask=m_c)
    unbiased = tl.div_rn(total, count - 1.0)
    momentum = tl.cast(tl.cast(momentum_bits, tl.int32), tl.float32, bitcast=True)
    keep = 1.0 - momentum
    running_mean = tl.load(p_running_mean + o_c, mask=m_c, other=0.0).to(tl.float32) * keep + mean * momentum
    running_var = tl.load(p_running_var + o_c, mask=m_c, other=0.0).to(tl.float32) * keep + unbiased * momentum
    tl.store(p_running_mean + o_c, running_mean.to(p_running_mean.dtype.element_ty), mask=m_c)
    tl.store(p_running_var + o_c, running_var.to(p_running_var.dtype.element_ty), mask=m_c)


# ---------------------------------------------------------------- launchers

launch_bottleneck = direct(bottleneck_kernel)
launch_statistics = direct(statistics_kernel)


def _bits(number: float) -> int:
    """The float32 ``number`` as an int32."""
    return struct.unpack("<i", struct.pack("<f", number))[0]


def _launch_statistics(
    bottleneck: Tensor, parameters: GateParameters, gating: Gating
) -> tuple[Tensor, BatchStatistics]:
    """x [B, H], and the statistics of the batch, from t [B, T, H]."""
    num_sentences, tiles, width = bottleneck.shape
    columns = parameters.up_weight.shape[0]
    t, tile, overlap = config.GATE_TRAINING, config.gate_statistics(width), launches_overlap(bottleneck.device)
    s, centred_s = bottleneck.new_empty(num_sentences, width), bottleneck.new_empty(num_sentences, width)
    sums = bottleneck.new_empty(cdiv(num_sentences, t.sentences), width, dtype=torch.float64)
    statistics = BatchStatistics(bottleneck.new_empty(columns), bottleneck.new_empty(columns))
    kept = parameters.running_mean, parameters.running_var
    assert kept[0] is not None and kept[1] is not None
    running = tuple(one.contiguous() for one in kept if one is not None)
    launch_bottleneck(
        len(sums) * cdiv(width, t.block_h),
        p_tiles=bottleneck,
        p_down_bias=parameters.down_bias.contiguous(),
        p_bottleneck=s,
        p_sums=sums,
        num_sentences=num_sentences,
        H=width,
        T=tiles,
        ACTIVATION=gating.activation,
        BLOCK_B=t.sentences,
        BLOCK_H=t.block_h,
        UNROLL=12,
        OVERLAP=overlap,
        num_warps=t.num_warps,
        launch_pdl=overlap or None,
    )
    launch_statistics(
        cdiv(columns, tile.columns),
        p_bottleneck=s,
        p_sums=sums,
        p_up_weight=parameters.up_weight.contiguous(),
        p_up_bias=parameters.up_bias.contiguous(),
        p_running_mean=running[0],
        p_running_var=running[1],
        p_mean=statistics.mean,
        p_rstd=statistics.rstd,
        p_centred=centred_s,
        momentum_bits=_bits(gating.momentum),
        num_sentences=num_sentences,
        COLUMNS=columns,
        H=width,
        EPS=gating.eps,
        PRECISION=PRECISION,
        SENTENCES=t.sentences,
        TILE=tile,
        OVERLAP=overlap,
        num_warps=tile.num_warps,
        launch_pdl=overlap or None,
    )
    for one, new in zip(kept, running, strict=True):
        if one is not None and one is not new:  # strided
            one.copy_(new)
    return centred_s, statistics


def _finish(
    done: Squeezed, pooled: Tensor | None, parameters: GateParameters, gating: Gating, dtype: torch.dtype
) -> tuple[Tensor, BatchStatistics]:
    """g, or with p o in ``dtype``, and the statistics."""
    num_sentences, hidden_size = done.f.shape
    if done.bottleneck is None or num_sentences == 0:
        return reference.gate_in_training(done.f, pooled, parameters, gating, dtype)
    centred_s, statistics = _launch_statistics(done.bottleneck, parameters, gating)
    if pooled is None:
        output = done.f.new_empty(num_sentences, len(parameters.up_weight) // hidden_size, hidden_size)
    else:
        output = done.f.new_empty(done.f.shape, dtype=dtype)
    launch_gate(centred_s[:, None], parameters, gating, pooled, output, statistics.rstd)
    return output, statistics


def gate_in_training(
    squeezed: Tensor, pooled: Tensor | None, parameters: GateParameters, gating: Gating, dtype: torch.dtype
) -> tuple[Tensor, BatchStatistics]:
    """g [B, N, D], or with p o [B, D] in ``dtype``, and the statistics of the batch."""
    if not fits(parameters, parameters.up_weight.shape[0] // squeezed.shape[1]):
        return reference.gate_in_training(squeezed, pooled, parameters, gating, dtype)
    done = sum_groups_for_gate(squeezed.contiguous()[:, None], 1, squeezed.dtype, parameters.down_weight)
    return _finish(done, None if pooled is None else pooled.contiguous(), parameters, gating, dtype)


def select_pool_in_training(
    batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating
) -> tuple[Tensor, Tensor, Tensor, BatchStatistics]:
    """o [B, D], f [B, D], p [B, N, D] and the statistics of the batch in four launches."""
    fused = fits(parameters, batch.num_blocks)
    done = squeeze_for_gate(laid_out(batch, reading), batch, reading, parameters.down_weight if fused else None)
    assert done.pooled is not None
    output, statistics = _finish(done, done.pooled, parameters, gating, batch.dtype)
    return output, done.f, done.pooled, statistics

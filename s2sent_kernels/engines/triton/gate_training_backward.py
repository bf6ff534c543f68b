"""The gradients behind batch statistics: from dy, which ``gate_backward`` computes with them, to the rest.

    xi = (z - mean) rstd,  dw_j = sum_b dy xi,  db_j = sum_b dy,  dz = w rstd (dy - db / B - xi dw / B)
    dW2 = dz^T s,  db2 = sum_b dz,  ds = dz W2,  ddown = ds act'

    gate_backward_bottleneck_kernel, gate_backward_kernel    of ``gate_backward``: s; dp, dy, xi
    columns_kernel           a program owns columns j of z, over all sentences, some at a time, twice: the sums of a column, then
                             dz. Writes dW2 and the vectors, and ds as partial sums over the columns
    sum_kernel               ddown from these, and the gradients of the prior and of the scale
    gate_backward_down_kernel    of ``gate_backward_sums``: dW1, db1, df

Order of summation: over sentences in lanes, each ascending in steps of a tile, then over the
lanes; dW2 ascending; ds over programs in lanes, each ascending, then over the lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...formula import reference
from ...formula.call import BatchStatistics, GateParameters, Gating
from . import config
from .common import allow_next_launch, slope, wait_for_previous
from .direct import direct
from .gate_backward import Results, fits, launch_gates
from .gate_backward_sums import PRECISION, Work, sum_down, sum_rows
from .launch import cdiv, contiguous, launches_overlap


@triton.jit(do_not_specialize=["num_sentences"])
def columns_kernel(
    p_grad_y,  # dy [B, COLUMNS] float32
    p_normed,  # xi [B, COLUMNS] float32
    p_bottleneck,  # s [B, H] float32
    p_up_weight,  # W2 [COLUMNS, H]
    p_norm_weight,  # [COLUMNS]
    p_rstd,  # [COLUMNS] float32
    p_grad_up_weight,  # dW2 [COLUMNS, H]
    p_grad_up_bias,  # db2 [COLUMNS]
    p_grad_norm_weight,  # [COLUMNS], as the next
    p_grad_norm_bias,
    p_grad_bottleneck,  # ds of each program's columns [programs, B, H] float32
    num_sentences,
    COLUMNS: tl.constexpr,  # N * D
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    BLOCK_B: tl.constexpr = TILE.sentences
    BLOCK_C: tl.constexpr = TILE.columns
    BLOCK_H: tl.constexpr = TILE.block_h
    index = tl.program_id(0).to(tl.int64)
    o_c = index * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C] row of W2
    m_c = o_c < COLUMNS
    o_h = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    m_h = o_h < H
    o_ch = o_c[:, None] * H + o_h[None, :]
    m_ch = m_c[:, None] & m_h[None, :]
    w = tl.load(p_up_weight + o_ch, mask=m_ch, other=0.0).to(tl.float32)  # [BLOCK_C, BLOCK_H]
    norm_weight = tl.load(p_norm_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    scale = norm_weight * tl.load(p_rstd + o_c, mask=m_c, other=0.0)
    if OVERLAP:
        allow_next_launch()
        wait_for_previous()

    sums = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for first in tl.range(0, num_sentences, BLOCK_B, loop_unroll_factor=TILE.unroll):
        o_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)  # [BLOCK_B]
        o_bc = o_b[:, None] * COLUMNS + o_c[None, :]
        m_bc = (o_b < num_sentences)[:, None] & m_c[None, :]
        dy = tl.load(p_grad_y + o_bc, mask=m_bc, other=0.0)  # [BLOCK_B, BLOCK_C]
        sums += dy
        products += dy * tl.load(p_normed + o_bc, mask=m_bc, other=0.0)
    sum_dy, sum_products = tl.sum(sums, axis=0), tl.sum(products, axis=0)  # [BLOCK_C]
    tl.store(p_grad_norm_weight + o_c, sum_products.to(p_grad_norm_weight.dtype.element_ty), mask=m_c)
    tl.store(p_grad_norm_bias + o_c, sum_dy.to(p_grad_norm_bias.dtype.element_ty), mask=m_c)
    count = num_sentences.to(tl.float32)
    mean_dy, along = tl.div_rn(sum_dy, count), tl.div_rn(sum_products, count)

    grad = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    sums = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for first in tl.range(0, num_sentences, BLOCK_B, num_stages=TILE.stages):
        o_b = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_B)  # [BLOCK_B]
        m_b = o_b < num_sentences
        o_bc, o_bh = o_b[:, None] * COLUMNS + o_c[None, :], o_b[:, None] * H + o_h[None, :]
        m_bc, m_bh = m_b[:, None] & m_c[None, :], m_b[:, None] & m_h[None, :]
        dy = tl.load(p_grad_y + o_bc, mask=m_bc, other=0.0)  # [BLOCK_B, BLOCK_C]
        xi = tl.load(p_normed + o_bc, mask=m_bc, other=0.0)
        s = tl.load(p_bottleneck + o_bh, mask=m_bh, other=0.0)  # [BLOCK_B, BLOCK_H]
        dz = ((dy - mean_dy[None, :]) - xi * along[None, :]) * scale[None, :]
        dz = tl.where(m_bc, dz, 0.0)
        sums += dz
        grad = tl.dot(tl.trans(dz), s, grad, input_precision="ieee")  # [BLOCK_C, BLOCK_H]
        ds = tl.dot(dz, w, input_precision=PRECISION)  # [BLOCK_B, BLOCK_H]
        tl.store(p_grad_bottleneck + index * num_sentences * H + o_bh, ds, mask=m_bh)
    tl.store(p_grad_up_weight + o_ch, grad.to(p_grad_up_weight.dtype.element_ty), mask=m_ch)
    tl.store(p_grad_up_bias + o_c, tl.sum(sums, axis=0).to(p_grad_up_bias.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["num_sentences", "partial_sums"])
def sum_kernel(
    p_grad_bottleneck,  # [TILES, B, H] float32
    p_bottleneck,  # s [B, H] float32
    p_prior_sums,  # [partial_sums, N] float32, or None
    p_scale_sums,  # [partial_sums] float32, or None
    p_grad_down,  # ddown [B, H] float32
    p_grad_prior,  # dc [N], or None
    p_grad_scale,  # dtau, one number, or None
    num_sentences,
    partial_sums,
    N: tl.constexpr,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNROLL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    if OVERLAP:
        wait_for_previous()
    if index < tl.cdiv(num_sentences, BLOCK_B):
        o_bh = tl.arange(0, BLOCK_B * BLOCK_H)  # [BLOCK_B * BLOCK_H]
        o_b, o_h = index * BLOCK_B + o_bh // BLOCK_H, o_bh % BLOCK_H
        m_bh = (o_b < num_sentences) & (o_h < H)
        ds = tl.zeros([BLOCK_T, BLOCK_B * BLOCK_H], tl.float32)
        for first in tl.range(0, TILES, BLOCK_T, loop_unroll_factor=UNROLL):
            o_t = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_T)  # [BLOCK_T]
            p_ds = p_grad_bottleneck + (o_t[:, None] * num_sentences + o_b[None, :]) * H + o_h[None, :]
            ds += tl.load(p_ds, mask=(o_t < TILES)[:, None] & m_bh[None, :], other=0.0)
        s = tl.load(p_bottleneck + o_b * H + o_h, mask=m_bh, other=0.0)
        act_slope = slope(s, ACTIVATION)
        tl.store(p_grad_down + o_b * H + o_h, tl.sum(ds, axis=0) * act_slope, mask=m_bh)
    else:
        if p_prior_sums is not None:
            sum_rows(p_prior_sums, p_grad_prior, partial_sums, N, BLOCK_R, UNROLL)
        if p_scale_sums is not None:
            sum_rows(p_scale_sums, p_grad_scale, partial_sums, 1, BLOCK_R, UNROLL)


# ---------------------------------------------------------------- launchers

launch_columns = direct(columns_kernel)
launch_sum = direct(sum_kernel)


def _sum_columns(work: Work, rstd: Tensor, w: GateParameters, grads: GateParameters, gating: Gating) -> None:
    """Writes ddown, and the gradients of W2, b2, the norm, the prior and the scale. ``w``: contiguous parameters."""
    num_sentences, num_blocks, hidden_size = work.shape
    columns, overlap = num_blocks * hidden_size, launches_overlap(work.s.device)
    t, tile = config.GATE_TRAINING, config.gate_training_backward(w.bottleneck)
    programs = cdiv(columns, tile.columns)
    grad_bottleneck = work.s.new_empty(programs, num_sentences, w.bottleneck)
    launch_columns(
        programs,
        p_grad_y=work.grad_y,
        p_normed=work.normed,
        p_bottleneck=work.s,
        p_up_weight=w.up_weight,
        p_norm_weight=w.norm_weight,
        p_rstd=rstd,
        p_grad_up_weight=grads.up_weight,
        p_grad_up_bias=grads.up_bias,
        p_grad_norm_weight=grads.norm_weight,
        p_grad_norm_bias=grads.norm_bias,
        p_grad_bottleneck=grad_bottleneck,
        num_sentences=num_sentences,
        COLUMNS=columns,
        H=w.bottleneck,
        PRECISION=PRECISION,
        TILE=tile,
        OVERLAP=overlap,
        num_warps=tile.num_warps,
        launch_pdl=overlap or None,
    )
    launch_sum(
        cdiv(num_sentences, t.sum_rows) + work.has_vectors,
        p_grad_bottleneck=grad_bottleneck,
        p_bottleneck=work.s,
        p_prior_sums=work.prior_sums,
        p_scale_sums=work.scale_sums,
        p_grad_down=work.grad_down,
        p_grad_prior=grads.block_prior,
        p_grad_scale=grads.gate_scale,
        num_sentences=num_sentences,
        partial_sums=work.programs,
        N=num_blocks,
        H=w.bottleneck,
        ACTIVATION=gating.activation,
        TILES=programs,
        BLOCK_B=t.sum_rows,
        BLOCK_H=tile.block_h,
        BLOCK_T=t.in_flight,
        BLOCK_R=t.prior_rows,
        UNROLL=t.unroll,
        OVERLAP=overlap,
        num_warps=t.num_warps,
        launch_pdl=overlap or None,
    )


def gate_in_training_backward(
    grad: Tensor,
    squeezed: Tensor,
    pooled: Tensor | None,
    statistics: BatchStatistics,
    parameters: GateParameters,
    gating: Gating,
) -> tuple[Tensor | None, Tensor, GateParameters]:
    """dp [B, N, D] (None without p), df [B, D] and the parameters' gradients from do [B, D], or without p from dg [B, N, D]."""
    if not fits(parameters, parameters.up_weight.shape[0] // squeezed.shape[1]):
        return reference.gate_in_training_backward(grad, squeezed, pooled, statistics, parameters, gating)
    squeezed = squeezed.contiguous()
    pooled = None if pooled is None else pooled.contiguous()
    results = Results.of(squeezed, pooled, parameters)
    if len(squeezed) != 0:
        grad = grad.contiguous() if pooled is not None else grad.to(squeezed.dtype).contiguous()
        w = contiguous(parameters)
        work = launch_gates(grad, squeezed, pooled, statistics, w, gating, results)
        _sum_columns(work, statistics.rstd, w, results.grads, gating)
        sum_down(work.grad_down, squeezed, w, results.grads, results.grad_squeezed)
    return results.grad_pooled, results.grad_squeezed, results.grads

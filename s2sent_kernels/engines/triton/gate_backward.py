"""gate_backward: df and every parameter's gradient from dg, or from do and p, and then dp too; the gates are recomputed from f.

    dg_n = do p_n,  dp_n = g_n do                                                       the pooled path
    dlogits_n = g_n (dg_n - sum_n' g_n' dg_n'),  dy_n = dlogits_n e_n (1 - e_n),  dz_n = dy_n w_n / sqrt(var_n + eps)
    dW2_n = dz_n^T s,  ds = sum_n dz_n W2_n,  ddown = ds act',  dW1 = ddown^T f,  df = ddown W1

Four launches, because ds sums over all features and dW1 over all sentences:

    bottleneck_kernel       s [B, H]
    gate_backward_kernel    a few sentences x a few features, with all of their blocks side by side: z is computed once and
                            the sums over blocks stay on chip. Writes dp, dy, and ds as partial sums over the features
    up_kernel               dW2 and the vectors, from dy; ddown from the partial sums of ds
    down_kernel             dW1, db1, df

dy is kept and not dz: its sums are the norm's gradients, and dy cannot be had from dz where the norm's weight is 0. So dW2
is summed as dy^T s and scaled afterwards. Every sum has one order, and a sentence's df and dp do not depend on its batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..backend import triton_interprets
from ..reference import GateParameters
from . import config
from .gate import tanh
from .launch import device_of

# Three bf16 terms a factor carry float32's 24 bits, in as many products as three of TF32, whose two terms carry 22: enough
# for the gates, behind a sigmoid, and not for gradients. (The interpreter knows no such thing.)
PRECISION = "ieee" if triton_interprets() else "bf16x6"


@triton.jit(do_not_specialize=["batch"])
def bottleneck_kernel(
    p_squeezed,  # f [B, D] float32
    p_down_weight,  # [H, D]
    p_down_bias,  # [H]
    p_bottleneck,  # s [B, H] float32
    batch,
    D: tl.constexpr,
    H: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    index = tl.program_id(0).to(tl.int64)
    o_b = index // TILES * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    o_h = (index % TILES).to(tl.int32) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    m_b, m_h = o_b < batch, o_h < H
    s = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for k in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        o_k = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        m_k = o_k < D
        f = tl.load(p_squeezed + o_b[:, None] * D + o_k[None, :], mask=m_b[:, None] & m_k[None, :], other=0.0)
        w = tl.load(p_down_weight + o_k[:, None] + o_h[None, :] * D, mask=m_k[:, None] & m_h[None, :], other=0.0)
        s = tl.dot(f, w.to(tl.float32), s, input_precision=PRECISION)  # [BLOCK_B, BLOCK_H]
    s += tl.load(p_down_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    s = tl.where(s < 0.0, 0.0, s) if RELU else tanh(s)
    tl.store(p_bottleneck + o_b[:, None] * H + o_h[None, :], s, mask=m_b[:, None] & m_h[None, :])


@triton.jit(do_not_specialize=["batch"])
def gate_backward_kernel(
    p_grad,  # do [B, D], or without p_pooled dg [B, N, D] float32
    p_pooled,  # p [B, N, D] float32, or None
    p_bottleneck,  # s [B, H] float32
    p_up_weight,  # [N * D, H]
    p_up_bias,  # [N * D]
    p_norm_weight,  # [N * D] or None, with the next three
    p_norm_bias,
    p_running_mean,
    p_running_var,
    p_prior,  # [N] or None
    p_grad_pooled,  # dp [B, N, D] float32, or None
    p_grad_y,  # dy [B, N, D] float32
    p_grad_bottleneck,  # [TILES, B, H] float32, ds of each tile of features
    p_norm_sums,  # [programs of sentences, N * D] float32, sums of dy (z - mean) / sqrt(var + eps); None without norm
    p_prior_sums,  # [programs, N] float32, sums of dlogits, or None
    batch,
    N: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    PADDED_N: tl.constexpr = triton.next_power_of_2(N)
    COLUMNS: tl.constexpr = PADDED_N * BLOCK_D
    index = tl.program_id(0).to(tl.int64)
    i_tile = (index % TILES).to(tl.int32)
    o_b = index // TILES * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B] sentence
    m_b = o_b < batch
    o_h = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    m_h = o_h < H
    o_column = tl.arange(0, COLUMNS)  # [COLUMNS], n major
    n = o_column // BLOCK_D
    d = i_tile * BLOCK_D + o_column % BLOCK_D
    m_nd = (n < N) & (d < D)
    o_nd = n * D + d  # row of W2
    m_bnd = m_b[:, None] & m_nd[None, :]  # [BLOCK_B, COLUMNS]
    o_bnd = o_b[:, None] * (N * D) + o_nd[None, :]
    # Everything is asked for before the products, which wait at barriers.
    if p_pooled is not None:
        do = tl.load(p_grad + o_b[:, None] * D + d[None, :], mask=m_bnd, other=0.0).to(tl.float32)
        dg = do * tl.load(p_pooled + o_bnd, mask=m_bnd, other=0.0)
    else:
        dg = tl.load(p_grad + o_bnd, mask=m_bnd, other=0.0)
    bias = tl.load(p_up_bias + o_nd, mask=m_nd, other=0.0).to(tl.float32)
    if p_norm_weight is not None:
        variance = tl.load(p_running_var + o_nd, mask=m_nd, other=1.0).to(tl.float32)
        bias -= tl.load(p_running_mean + o_nd, mask=m_nd, other=0.0).to(tl.float32)
        inv_std = 1.0 / tl.sqrt_rn(variance + EPS)
        norm_weight = tl.load(p_norm_weight + o_nd, mask=m_nd, other=0.0).to(tl.float32)
        norm_bias = tl.load(p_norm_bias + o_nd, mask=m_nd, other=0.0).to(tl.float32)

    z = tl.zeros([BLOCK_B, COLUMNS], tl.float32)
    for k in tl.range(0, BLOCK_H, BLOCK_K, num_stages=BLOCK_H // BLOCK_K + 1):
        o_k = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        m_k = o_k < H
        s = tl.load(p_bottleneck + o_b[:, None] * H + o_k[None, :], mask=m_b[:, None] & m_k[None, :], other=0.0)
        p_w = p_up_weight + o_k[:, None] + o_nd.to(tl.int64)[None, :] * H
        w = tl.load(p_w, mask=m_k[:, None] & m_nd[None, :], other=0.0)  # [BLOCK_K, COLUMNS]
        z = tl.dot(s, w.to(tl.float32), z, input_precision=PRECISION)
    z += bias[None, :]
    if p_norm_weight is not None:
        z *= inv_std[None, :]
        y = z * norm_weight[None, :] + norm_bias[None, :]
    else:
        y = z
    e = 1.0 / (1.0 + tl.exp(-y))
    logits = e
    if p_prior is not None:
        o_n = tl.arange(0, PADDED_N)  # [PADDED_N]
        highest = tl.max(tl.load(p_prior + o_n, mask=o_n < N, other=float("-inf")).to(tl.float32), axis=0)
        prior = tl.load(p_prior + n, mask=n < N, other=0.0).to(tl.float32) - highest
        logits += prior[None, :]
    weight = tl.where(m_nd[None, :], tl.exp(logits), 0.0)

    # over the blocks
    weight = tl.reshape(weight, [BLOCK_B, PADDED_N, BLOCK_D])
    dg = tl.reshape(dg, [BLOCK_B, PADDED_N, BLOCK_D])
    g = tl.div_rn(weight, tl.broadcast_to(tl.sum(weight, axis=1)[:, None, :], [BLOCK_B, PADDED_N, BLOCK_D]))
    dlogits = g * (dg - tl.sum(g * dg, axis=1)[:, None, :])
    if p_pooled is not None:
        tl.store(p_grad_pooled + o_bnd, tl.reshape(g, [BLOCK_B, COLUMNS]) * do, mask=m_bnd)

    # A NaN stays in its sentence and its column: the padded ones, where it may stand as well, take part in the sums.
    dlogits = tl.where(m_bnd, tl.reshape(dlogits, [BLOCK_B, COLUMNS]), 0.0)
    dy = tl.where(m_bnd, dlogits * e * (1.0 - e), 0.0)  # [BLOCK_B, COLUMNS]
    tl.store(p_grad_y + o_bnd, dy, mask=m_bnd)
    dz = dy
    if p_norm_weight is not None:
        dz = dy * (norm_weight * inv_std)[None, :]
        sums = tl.sum(tl.where(m_bnd, dy * z, 0.0), axis=0)  # [COLUMNS]
        tl.store(p_norm_sums + index // TILES * (N * D) + o_nd, sums, mask=m_nd)
    if p_prior is not None:
        of_blocks = tl.sum(tl.reshape(tl.sum(dlogits, axis=0), [PADDED_N, BLOCK_D]), axis=1)  # [PADDED_N]
        tl.store(p_prior_sums + index * N + o_n, of_blocks, mask=o_n < N)
    # Asked for again, out of the cache: held until here it would not fit into the registers.
    w = tl.load(
        p_up_weight + o_nd.to(tl.int64)[:, None] * H + o_h[None, :], mask=m_nd[:, None] & m_h[None, :], other=0.0
    )  # [COLUMNS, BLOCK_H]
    ds = tl.dot(dz, w.to(tl.float32), input_precision=PRECISION)  # [BLOCK_B, BLOCK_H]
    p_ds = p_grad_bottleneck + (i_tile.to(tl.int64) * batch + o_b[:, None]) * H + o_h[None, :]
    tl.store(p_ds, ds, mask=m_b[:, None] & m_h[None, :])


@triton.jit(do_not_specialize=["batch"])
def up_kernel(
    p_grad_y,  # dy [B, N, D] float32
    p_norm_sums,  # [programs of sentences, N * D] float32, or None
    p_prior_sums,  # [programs of sentences * TILES, N] float32, or None
    p_grad_bottleneck,  # [TILES, B, H] float32
    p_bottleneck,  # s [B, H] float32
    p_norm_weight,  # [N * D] or None, with the next
    p_running_var,
    p_grad_up_weight,  # dW2 [N * D, H]
    p_grad_up_bias,  # [N * D]
    p_grad_norm_weight,  # [N * D] or None, with the next
    p_grad_norm_bias,
    p_grad_prior,  # [N] or None
    p_grad_down,  # ddown [B, H] float32
    batch,
    N: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    TILES: tl.constexpr,
    SENTENCES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROW_PROGRAMS: tl.constexpr = (N * D + BLOCK_R - 1) // BLOCK_R
    PADDED_N: tl.constexpr = triton.next_power_of_2(N)
    index = tl.program_id(0).to(tl.int64)
    sentence_programs = tl.cdiv(batch, BLOCK_B)
    partial_sums = tl.cdiv(batch, SENTENCES)
    o_h = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    m_h = o_h < H
    if index < ROW_PROGRAMS:  # the programs that take longest start first: dW2, and the vectors of its rows
        o_nd = index * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        m_nd = o_nd < N * D
        grad = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
        sums = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)
        for first in tl.range(0, batch, BLOCK_S, num_stages=STAGES):
            o_s = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_S)  # [BLOCK_S]
            m_s = o_s < batch
            p_dy = p_grad_y + o_s[None, :] * (N * D) + o_nd[:, None]
            dy = tl.load(p_dy, mask=m_s[None, :] & m_nd[:, None], other=0.0)  # [BLOCK_R, BLOCK_S]
            s = tl.load(p_bottleneck + o_s[:, None] * H + o_h[None, :], mask=m_s[:, None] & m_h[None, :], other=0.0)
            grad = tl.dot(dy, s, grad, input_precision="ieee")  # [BLOCK_R, BLOCK_H]
            sums += dy
        sum_dy = tl.sum(sums, axis=1)  # [BLOCK_R]
        sum_dz = sum_dy
        if p_norm_weight is not None:
            sum_norm = tl.zeros([BLOCK_R], tl.float32)
            for first in tl.range(0, partial_sums, BLOCK_T):
                for i in tl.static_range(BLOCK_T):  # so many loads in flight
                    at = tl.cast(first + i, tl.int64) * (N * D)
                    sum_norm += tl.load(p_norm_sums + at + o_nd, mask=m_nd & (first + i < partial_sums), other=0.0)
            variance = tl.load(p_running_var + o_nd, mask=m_nd, other=1.0).to(tl.float32)
            scale = tl.load(p_norm_weight + o_nd, mask=m_nd, other=0.0).to(tl.float32) / tl.sqrt_rn(variance + EPS)
            tl.store(p_grad_norm_weight + o_nd, sum_norm.to(p_grad_norm_weight.dtype.element_ty), mask=m_nd)
            tl.store(p_grad_norm_bias + o_nd, sum_dy.to(p_grad_norm_bias.dtype.element_ty), mask=m_nd)
            sum_dz = sum_dy * scale
            grad *= scale[:, None]
        p_w = p_grad_up_weight + o_nd[:, None] * H + o_h[None, :]
        tl.store(p_w, grad.to(p_grad_up_weight.dtype.element_ty), mask=m_nd[:, None] & m_h[None, :])
        tl.store(p_grad_up_bias + o_nd, sum_dz.to(p_grad_up_bias.dtype.element_ty), mask=m_nd)
    elif index < ROW_PROGRAMS + sentence_programs:  # ddown
        o_b = (index - ROW_PROGRAMS) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
        m_bh = (o_b < batch)[:, None] & m_h[None, :]
        o_bh = o_b[:, None] * H + o_h[None, :]
        ds = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        for first in tl.range(0, TILES, BLOCK_T):
            for i in tl.static_range(BLOCK_T):
                p_ds = p_grad_bottleneck + tl.cast(first + i, tl.int64) * batch * H + o_bh
                ds += tl.load(p_ds, mask=m_bh & (first + i < TILES), other=0.0)
        at_b = tl.load(p_bottleneck + o_bh, mask=m_bh, other=0.0)
        slope = tl.where(at_b > 0.0, 1.0, 0.0) if RELU else 1.0 - at_b * at_b
        tl.store(p_grad_down + o_bh, ds * slope, mask=m_bh)
    elif p_prior_sums is not None:
        o_n = tl.arange(0, PADDED_N)  # [PADDED_N]
        # B D terms of either sign: rounding their running sums to float32 would cost more than the terms' own errors.
        of_blocks = tl.zeros([BLOCK_R, PADDED_N], tl.float64)
        for first in tl.range(0, partial_sums * TILES, BLOCK_R):
            o_t = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_R)  # [BLOCK_R]
            m_t = (o_t < partial_sums * TILES)[:, None] & (o_n < N)[None, :]
            of_blocks += tl.load(p_prior_sums + o_t[:, None] * N + o_n[None, :], mask=m_t, other=0.0).to(tl.float64)
        tl.store(p_grad_prior + o_n, tl.sum(of_blocks, axis=0).to(p_grad_prior.dtype.element_ty), mask=o_n < N)


@triton.jit(do_not_specialize=["batch"])
def down_kernel(
    p_grad_down,  # ddown [B, H] float32
    p_squeezed,  # f [B, D] float32
    p_down_weight,  # W1 [H, D]
    p_grad_down_weight,  # dW1 [H, D]
    p_grad_down_bias,  # [H]
    p_grad_squeezed,  # df [B, D] float32
    batch,
    D: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    WEIGHT_COLUMNS: tl.constexpr = (D + BLOCK_W - 1) // BLOCK_W
    WEIGHT_TILES: tl.constexpr = WEIGHT_COLUMNS * ((H + BLOCK_R - 1) // BLOCK_R)
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    index = tl.program_id(0).to(tl.int64)
    if index < WEIGHT_TILES:  # the programs that take longest start first: dW1 and db1
        o_r = index // WEIGHT_COLUMNS * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R] row of W1
        o_w = index % WEIGHT_COLUMNS * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
        m_r, m_w = o_r < H, o_w < D
        grad = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
        sums = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)
        for first in tl.range(0, batch, BLOCK_S, num_stages=STAGES):
            o_s = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_S)  # [BLOCK_S]
            m_s = o_s < batch
            p_rows = p_grad_down + o_s[None, :] * H + o_r[:, None]
            rows = tl.load(p_rows, mask=m_s[None, :] & m_r[:, None], other=0.0)  # [BLOCK_R, BLOCK_S]
            f = tl.load(p_squeezed + o_s[:, None] * D + o_w[None, :], mask=m_s[:, None] & m_w[None, :], other=0.0)
            grad = tl.dot(rows, f, grad, input_precision="ieee")  # [BLOCK_R, BLOCK_W]
            sums += rows
        p_dw = p_grad_down_weight + o_r[:, None] * D + o_w[None, :]
        tl.store(p_dw, grad.to(p_grad_down_weight.dtype.element_ty), mask=m_r[:, None] & m_w[None, :])
        if index % WEIGHT_COLUMNS == 0:
            bias = tl.sum(sums, axis=1)  # [BLOCK_R]
            tl.store(p_grad_down_bias + o_r, bias.to(p_grad_down_bias.dtype.element_ty), mask=m_r)
    else:
        o_b = (index - WEIGHT_TILES) // TILES * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
        o_d = (index - WEIGHT_TILES) % TILES * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        m_b, m_d = o_b < batch, o_d < D
        df = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for k in tl.range(0, H, BLOCK_K, num_stages=STAGES):
            o_k = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            m_k = o_k < H
            ddown = tl.load(p_grad_down + o_b[:, None] * H + o_k[None, :], mask=m_b[:, None] & m_k[None, :], other=0.0)
            w = tl.load(p_down_weight + o_k[:, None] * D + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
            df = tl.dot(ddown, w.to(tl.float32), df, input_precision=PRECISION)  # [BLOCK_B, BLOCK_D]
        tl.store(p_grad_squeezed + o_b[:, None] * D + o_d[None, :], df, mask=m_b[:, None] & m_d[None, :])


# ---------------------------------------------------------------- launchers


def fits(parameters: GateParameters, num_blocks: int) -> bool:
    """Whether the fused kernels hold this gate. What is wider is computed in plain PyTorch."""
    return config.gate_backward(num_blocks, parameters.down_weight.shape[0]) is not None


def _fresh(tensor: Tensor) -> Tensor:
    """Where a kernel writes the gradient of ``tensor``: in its dtype, so that nothing has to be cast. The interpreter would
    truncate to bfloat16."""
    coarse = tensor.dtype == torch.bfloat16 and triton_interprets()
    return tensor.new_empty(tensor.shape, dtype=torch.float32 if coarse else None)


def _launch(
    grad: Tensor,  # do [B, D] with p, dg [B, N, D] without
    pooled: Tensor | None,
    squeezed: Tensor,
    parameters: GateParameters,
    num_blocks: int,
    activation: str,
    eps: float,
) -> tuple[Tensor | None, Tensor, GateParameters]:
    """dp (with p), df and the parameters' gradients."""
    batch, size = squeezed.shape
    bottleneck = parameters.down_weight.shape[0]
    tile = config.gate_backward(num_blocks, bottleneck)
    assert tile is not None
    grad_pooled = None if pooled is None else torch.empty_like(pooled)
    grad_squeezed = torch.empty_like(squeezed)
    if batch == 0:
        grads = parameters._replace(running_mean=None, running_var=None).each(torch.zeros_like)
        return grad_pooled, grad_squeezed, grads
    grads = parameters._replace(running_mean=None, running_var=None).each(_fresh)
    w = parameters.each(lambda t: t.contiguous())
    rows, tiles = triton.cdiv(batch, tile.sentences), triton.cdiv(size, tile.block_d)
    has_norm, has_prior = w.norm_weight is not None, w.block_prior is not None
    s, grad_down = squeezed.new_empty(batch, bottleneck), squeezed.new_empty(batch, bottleneck)
    grad_y = squeezed.new_empty(batch, num_blocks, size)
    grad_bottleneck = squeezed.new_empty(tiles, batch, bottleneck)
    norm_sums = squeezed.new_empty(rows, num_blocks * size) if has_norm else None
    prior_sums = squeezed.new_empty(rows * tiles, num_blocks) if has_prior else None
    shape, relu, t = {"D": size, "H": bottleneck, "PRECISION": PRECISION}, activation == "relu", config.GATE_BACKWARD
    with device_of(squeezed):
        bottleneck_kernel[(triton.cdiv(batch, t.sentences) * triton.cdiv(bottleneck, t.sentences),)](
            squeezed, w.down_weight, w.down_bias, s, batch, **shape, RELU=relu,
            BLOCK_B=t.sentences, BLOCK_H=t.sentences, BLOCK_K=t.block_k, STAGES=t.stages, num_warps=t.num_warps,
        )  # fmt: skip
        gate_backward_kernel[(rows * tiles,)](
            grad, pooled, s, *w[2:], grad_pooled, grad_y, grad_bottleneck, norm_sums, prior_sums, batch,
            N=num_blocks, **shape, EPS=eps, BLOCK_B=tile.sentences, BLOCK_D=tile.block_d, BLOCK_K=tile.block_k,
            BLOCK_H=tile.block_h, num_warps=tile.num_warps,
        )  # fmt: skip
        programs = triton.cdiv(num_blocks * size, t.rows) + triton.cdiv(batch, t.sum_rows) + has_prior
        up_kernel[(programs,)](
            grad_y, norm_sums, prior_sums, grad_bottleneck, s, w.norm_weight, w.running_var, grads.up_weight,
            grads.up_bias, grads.norm_weight, grads.norm_bias, grads.block_prior, grad_down, batch,
            N=num_blocks, **shape, EPS=eps, RELU=relu, TILES=tiles, SENTENCES=tile.sentences, BLOCK_S=t.sentences_up,
            BLOCK_R=t.rows, BLOCK_B=t.sum_rows, BLOCK_H=tile.block_h, BLOCK_T=t.in_flight, STAGES=t.stages,
            num_warps=t.num_warps,
        )  # fmt: skip
        programs = triton.cdiv(size, t.columns) * triton.cdiv(bottleneck, t.rows)
        programs += triton.cdiv(batch, t.sentences) * triton.cdiv(size, t.block_d)
        down_kernel[(programs,)](
            grad_down, squeezed, w.down_weight, grads.down_weight, grads.down_bias, grad_squeezed, batch,
            **shape, BLOCK_B=t.sentences, BLOCK_D=t.block_d, BLOCK_K=t.block_h, BLOCK_S=t.sentences_down,
            BLOCK_R=t.rows, BLOCK_W=t.columns, STAGES=t.stages, num_warps=t.num_warps,
        )  # fmt: skip
    return grad_pooled, grad_squeezed, grads


def gate_backward(
    grad_gates: Tensor, squeezed: Tensor, parameters: GateParameters, activation: str, eps: float
) -> tuple[Tensor, GateParameters]:
    """df [B, D] and the parameters' gradients from dg [B, N, D]."""
    num_blocks = grad_gates.shape[1]
    if not fits(parameters, num_blocks):
        return reference.gate_backward(grad_gates, squeezed, parameters, activation, eps)
    grad = grad_gates.to(torch.float32).contiguous()
    return _launch(grad, None, squeezed.contiguous(), parameters, num_blocks, activation, eps)[1:]


def gate_pool_backward(
    grad_output: Tensor, squeezed: Tensor, pooled: Tensor, parameters: GateParameters, activation: str, eps: float
) -> tuple[Tensor, Tensor, GateParameters]:
    """dp [B, N, D], df [B, D] and the parameters' gradients from do [B, D] and p [B, N, D]."""
    num_blocks = pooled.shape[1]
    if not fits(parameters, num_blocks):
        return reference.gate_pool_backward(grad_output, squeezed, pooled, parameters, activation, eps)
    grad_pooled, grad_squeezed, grads = _launch(
        grad_output.contiguous(), pooled.contiguous(), squeezed.contiguous(), parameters, num_blocks, activation, eps
    )
    assert grad_pooled is not None
    return grad_pooled, grad_squeezed, grads

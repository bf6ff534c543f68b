"""gate_backward: df and every parameter's gradient from dg, or dp too from do and p; the gates are recomputed from f.

    dg_n = do p_n,  dp_n = g_n do                                                       the pooled path
    dlogits_n = g_n (dg_n - sum_n' g_n' dg_n'),  dc_n = sum dlogits_n,  dtau = sum dlogits_n e_n
    dy_n = dlogits_n tau e_n (1 - e_n),  dz_n = dy_n w_n / sqrt(var_n + eps)
    dW2_n = dz_n^T s,  ds = sum_n dz_n W2_n,  ddown = ds act',  dW1 = ddown^T f,  df = ddown W1

Four launches, because ds sums over all features and dW1 over all sentences; the last two are in ``gate_backward_sums``. With
batch statistics ``gate_training_backward`` goes on from dy.

    gate_backward_bottleneck_kernel   s [B, H]
    gate_backward_kernel              a few sentences x a few features, with all of their blocks side by side: z is computed
                                      once and the sums over blocks stay on chip. Writes dp, dy, and ds as partial sums over
                                      the features
    gate_backward_up_kernel           dW2 and the vectors, from dy; ddown from the partial sums of ds
    gate_backward_down_kernel         dW1, db1, df

dy is kept instead of dz: its sums are the norm's gradients, and dz has lost it where the norm's weight is 0. So dW2 is summed
as dy^T s and scaled afterwards. Every sum has one order, and a sentence's df and dp do not depend on its batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formula import reference
from ...formula.call import BatchStatistics, GateParameters, Gating
from ..interface import say_once
from . import config
from .common import activate
from .direct import direct
from .gate_backward_sums import PRECISION, Work, sum_down, sum_up
from .launch import cdiv, contiguous
from .limits import triton_interprets


@triton.jit(do_not_specialize=["num_sentences"])
def gate_backward_bottleneck_kernel(
    p_squeezed,  # f [B, D] float32
    p_down_weight,  # W1 [H, D]
    p_down_bias,  # b1 [H]
    p_bottleneck,  # s [B, H] float32
    num_sentences,
    D: tl.constexpr,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    m_b, m_h = o_b < num_sentences, o_h < H
    s = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for k in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        o_k = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        m_k = o_k < D
        f = tl.load(p_squeezed + o_b[:, None] * D + o_k[None, :], mask=m_b[:, None] & m_k[None, :], other=0.0)
        w = tl.load(p_down_weight + o_k[:, None] + o_h[None, :] * D, mask=m_k[:, None] & m_h[None, :], other=0.0)
        s = tl.dot(f, w.to(tl.float32), s, input_precision=PRECISION)  # [BLOCK_B, BLOCK_H]
    s += tl.load(p_down_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    s = activate(s, ACTIVATION)
    tl.store(p_bottleneck + o_b[:, None] * H + o_h[None, :], s, mask=m_b[:, None] & m_h[None, :])


@triton.jit(do_not_specialize=["num_sentences"])
def gate_backward_kernel(
    p_grad,  # do [B, D] with p_pooled, else dg [B, N, D] float32
    p_pooled,  # p [B, N, D] float32, or None
    p_bottleneck,  # s [B, H] float32
    p_up_weight,  # W2 [N * D, H]
    p_up_bias,  # b2 [N * D]
    p_norm_weight,  # [N * D] or None, with the next three
    p_norm_bias,
    p_mean,  # running, or of the batch
    p_running_var,
    p_rstd,  # [N * D] of the batch in place of p_running_var, or None
    p_prior,  # c [N] or None
    p_scale,  # tau, one number, or None
    p_grad_pooled,  # dp [B, N, D] float32, or None
    p_grad_y,  # dy [B, N, D] float32
    p_normed,  # (z - mean) rstd [B, N, D] float32 with p_rstd, or None
    p_grad_bottleneck,  # [TILES, B, H] float32, ds of each tile of features; None with p_rstd, as the next
    p_norm_sums,  # [programs of sentences, N * D] float32, sums of dy (z - mean) / sqrt(var + eps); None without norm
    p_prior_sums,  # [programs, N] float32, sums of dlogits, or None
    p_scale_sums,  # [programs] float32, sums of dlogits e, or None
    num_sentences,
    N: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,  # batch statistics, of no more sentences than a program takes
):
    BLOCK_B: tl.constexpr = TILE.sentences
    BLOCK_D: tl.constexpr = TILE.block_d
    BLOCK_K: tl.constexpr = TILE.block_k
    BLOCK_H: tl.constexpr = TILE.block_h
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    PADDED_N: tl.constexpr = triton.next_power_of_2(N)
    COLUMNS: tl.constexpr = PADDED_N * BLOCK_D
    index = tl.program_id(0).to(tl.int64)
    i_tile = (index % TILES).to(tl.int32)
    o_b = index // TILES * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B] sentence
    m_b = o_b < num_sentences
    o_h = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    m_h = o_h < H
    o_column = tl.arange(0, COLUMNS)  # [COLUMNS], n major
    n = o_column // BLOCK_D
    d = i_tile * BLOCK_D + o_column % BLOCK_D
    m_nd = (n < N) & (d < D)
    o_nd = n * D + d  # row of W2
    m_bnd = m_b[:, None] & m_nd[None, :]  # [BLOCK_B, COLUMNS]
    o_bnd = o_b[:, None] * (N * D) + o_nd[None, :]
    # All loads are issued before the products, which wait at barriers.
    if p_pooled is not None:
        do = tl.load(p_grad + o_b[:, None] * D + d[None, :], mask=m_bnd, other=0.0).to(tl.float32)
        dg = do * tl.load(p_pooled + o_bnd, mask=m_bnd, other=0.0)
    else:
        dg = tl.load(p_grad + o_bnd, mask=m_bnd, other=0.0)
    bias = tl.load(p_up_bias + o_nd, mask=m_nd, other=0.0).to(tl.float32)
    if p_norm_weight is not None:
        if p_rstd is None:
            variance = tl.load(p_running_var + o_nd, mask=m_nd, other=1.0).to(tl.float32)
        bias -= tl.load(p_mean + o_nd, mask=m_nd, other=0.0).to(tl.float32)
        if p_rstd is None:
            inv_std = 1.0 / tl.sqrt_rn(variance + EPS)
        else:
            inv_std = tl.load(p_rstd + o_nd, mask=m_nd, other=0.0)
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
        if WHOLE:
            # s comes from other sums than the forward's, and few sentences may lie so close that its rounding shows. Normalised
            # by their own sums, they are to each other as in PyTorch, which keeps z.
            count = num_sentences.to(tl.float32)
            z -= tl.div_rn(tl.sum(tl.where(m_bnd, z, 0.0), axis=0), count)[None, :]
            square = tl.div_rn(tl.sum(tl.where(m_bnd, z * z, 0.0), axis=0), count)  # var rstd^2
            z *= (1.0 / tl.sqrt_rn(square + EPS * inv_std * inv_std))[None, :]
        y = z * norm_weight[None, :] + norm_bias[None, :]
    else:
        y = z
    e = 1.0 / (1.0 + tl.exp(-y))
    logits = e
    if p_scale is not None:
        scale = tl.load(p_scale).to(tl.float32)
        logits = e * scale
    if p_prior is not None:
        o_n = tl.arange(0, PADDED_N)  # [PADDED_N]
        highest = tl.max(tl.load(p_prior + o_n, mask=o_n < N, other=float("-inf")).to(tl.float32), axis=0)
        prior = tl.load(p_prior + n, mask=n < N, other=0.0).to(tl.float32) - highest
        logits += prior[None, :]
    if p_scale is not None:  # tau is unbounded
        of_blocks = tl.reshape(tl.where(m_nd[None, :], logits, float("-inf")), [BLOCK_B, PADDED_N, BLOCK_D])
        highest_logit = tl.broadcast_to(tl.max(of_blocks, axis=1)[:, None, :], [BLOCK_B, PADDED_N, BLOCK_D])
        logits -= tl.reshape(highest_logit, [BLOCK_B, COLUMNS])
    weight = tl.where(m_nd[None, :], tl.exp(logits), 0.0)

    weight = tl.reshape(weight, [BLOCK_B, PADDED_N, BLOCK_D])
    dg = tl.reshape(dg, [BLOCK_B, PADDED_N, BLOCK_D])
    g = tl.div_rn(weight, tl.broadcast_to(tl.sum(weight, axis=1)[:, None, :], [BLOCK_B, PADDED_N, BLOCK_D]))
    dlogits = g * (dg - tl.sum(g * dg, axis=1)[:, None, :])
    if p_pooled is not None:
        tl.store(p_grad_pooled + o_bnd, tl.reshape(g, [BLOCK_B, COLUMNS]) * do, mask=m_bnd)

    # A NaN must not leave its sentence and column. Padded ones may hold NaN too, and the sums below include them.
    dlogits = tl.where(m_bnd, tl.reshape(dlogits, [BLOCK_B, COLUMNS]), 0.0)
    de = dlogits
    if p_scale is not None:
        de = dlogits * scale
    dy = tl.where(m_bnd, de * e * (1.0 - e), 0.0)  # [BLOCK_B, COLUMNS]
    tl.store(p_grad_y + o_bnd, dy, mask=m_bnd)
    if p_normed is not None:
        tl.store(p_normed + o_bnd, z, mask=m_bnd)
    dz = dy
    if p_norm_sums is not None:
        dz = dy * (norm_weight * inv_std)[None, :]
        sums = tl.sum(tl.where(m_bnd, dy * z, 0.0), axis=0)  # [COLUMNS]
        tl.store(p_norm_sums + index // TILES * (N * D) + o_nd, sums, mask=m_nd)
    if p_prior is not None:
        of_blocks = tl.sum(tl.reshape(tl.sum(dlogits, axis=0), [PADDED_N, BLOCK_D]), axis=1)  # [PADDED_N]
        tl.store(p_prior_sums + index * N + o_n, of_blocks, mask=o_n < N)
    if p_scale is not None:
        products = tl.where(m_bnd, dlogits * e, 0.0)
        tl.store(p_scale_sums + index, tl.sum(tl.sum(products, axis=0), axis=0))
    if p_grad_bottleneck is not None:
        # Loaded again, from the cache: kept until here, W2 would overflow the registers.
        w = tl.load(
            p_up_weight + o_nd.to(tl.int64)[:, None] * H + o_h[None, :], mask=m_nd[:, None] & m_h[None, :], other=0.0
        )  # [COLUMNS, BLOCK_H]
        ds = tl.dot(dz, w.to(tl.float32), input_precision=PRECISION)  # [BLOCK_B, BLOCK_H]
        p_ds = p_grad_bottleneck + (i_tile.to(tl.int64) * num_sentences + o_b[:, None]) * H + o_h[None, :]
        tl.store(p_ds, ds, mask=m_b[:, None] & m_h[None, :])


# ---------------------------------------------------------------- launchers

launch_gate_backward_bottleneck = direct(gate_backward_bottleneck_kernel)
launch_gate_backward = direct(gate_backward_kernel)


def fits(parameters: GateParameters, num_blocks: int) -> bool:
    """Whether the kernels hold this gate. If not, plain PyTorch computes its gradients, which is reported once."""
    if config.gate_backward(num_blocks, parameters.bottleneck) is not None:
        return True
    say_once(
        "s2sent_kernels computes the gate's gradients in plain PyTorch: backend 'triton': its kernels hold a bottleneck of up "
        f"to H = {config.MAX_BOTTLENECK} and N = 32 blocks (16 above H = 128), got H = {parameters.bottleneck} and "
        f"N = {num_blocks}"
    )
    return False


def _fresh(tensor: Tensor) -> Tensor:
    """Memory for the gradient of ``tensor``, in its dtype, so that nothing has to be cast; float32 for bfloat16 in the
    interpreter, which would truncate."""
    coarse = tensor.dtype == torch.bfloat16 and triton_interprets()
    dtype = torch.float32 if coarse else None
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


class Results(NamedTuple):
    """Memory for what a backward pass returns."""

    grad_pooled: Tensor | None  # dp [B, N, D], with p
    grad_squeezed: Tensor  # df [B, D]
    grads: GateParameters

    @staticmethod
    def of(squeezed: Tensor, pooled: Tensor | None, parameters: GateParameters) -> Results:
        """For no sentences already what it holds: zeros."""
        with_gradient = parameters._replace(running_mean=None, running_var=None)
        return Results(
            None if pooled is None else torch.empty_like(pooled),
            torch.empty_like(squeezed),
            with_gradient.each(_fresh if len(squeezed) else torch.zeros_like),
        )


def launch_gates(
    grad: Tensor,  # do [B, D] with p, dg [B, N, D] without
    squeezed: Tensor,
    pooled: Tensor | None,
    statistics: BatchStatistics | None,  # None: the running ones
    w: GateParameters,
    gating: Gating,
    results: Results,
) -> Work:
    """Recomputes the gates and writes dp, dy, and ds, or with batch statistics the normalised z. ``w``: contiguous."""
    num_sentences, hidden_size = squeezed.shape
    bottleneck, num_blocks, running = w.bottleneck, w.up_weight.shape[0] // hidden_size, statistics is None
    tile = config.gate_backward(num_blocks, bottleneck)
    assert tile is not None
    rows, tiles = cdiv(num_sentences, tile.sentences), cdiv(hidden_size, tile.block_d)
    t = config.GATE_BACKWARD
    work = Work.of((num_sentences, num_blocks, hidden_size), w, squeezed, rows, tiles, running)
    programs = cdiv(num_sentences, t.sentences) * cdiv(bottleneck, t.sentences)
    launch_gate_backward_bottleneck(
        programs,
        p_squeezed=squeezed,
        p_down_weight=w.down_weight,
        p_down_bias=w.down_bias,
        p_bottleneck=work.s,
        num_sentences=num_sentences,
        D=hidden_size,
        H=bottleneck,
        ACTIVATION=gating.activation,
        PRECISION=PRECISION,
        BLOCK_B=t.sentences,
        BLOCK_H=t.sentences,
        BLOCK_K=t.block_k,
        STAGES=t.stages,
        num_warps=t.num_warps,
    )
    launch_gate_backward(
        rows * tiles,
        p_grad=grad,
        p_pooled=pooled,
        p_bottleneck=work.s,
        p_up_weight=w.up_weight,
        p_up_bias=w.up_bias,
        p_norm_weight=w.norm_weight,
        p_norm_bias=w.norm_bias,
        p_mean=w.running_mean if statistics is None else statistics.mean,
        p_running_var=w.running_var if statistics is None else None,
        p_rstd=None if statistics is None else statistics.rstd,
        p_prior=w.block_prior,
        p_scale=w.gate_scale,
        p_grad_pooled=results.grad_pooled,
        p_grad_y=work.grad_y,
        p_normed=work.normed,
        p_grad_bottleneck=work.grad_bottleneck,
        p_norm_sums=work.norm_sums,
        p_prior_sums=work.prior_sums,
        p_scale_sums=work.scale_sums,
        num_sentences=num_sentences,
        N=num_blocks,
        D=hidden_size,
        H=bottleneck,
        EPS=gating.eps,
        PRECISION=PRECISION,
        TILE=tile,
        WHOLE=not running and num_sentences <= tile.sentences,
        num_warps=tile.num_warps,
        # A fused do p - sum_n g do p is not 0 for a single block, whose gate is 1. Without tau the kernel keeps its bits.
        enable_fp_fusion=w.gate_scale is None,
    )
    return work


def _launch(
    grad: Tensor,  # do [B, D] with p, dg [B, N, D] without
    pooled: Tensor | None,
    squeezed: Tensor,
    parameters: GateParameters,
    gating: Gating,
) -> Results:
    results = Results.of(squeezed, pooled, parameters)
    if len(squeezed) != 0:
        w = contiguous(parameters)
        work = launch_gates(grad, squeezed, pooled, None, w, gating, results)
        sum_up(work, w, results.grads, gating)
        sum_down(work.grad_down, squeezed, w, results.grads, results.grad_squeezed)
    return results


def gate_backward(
    grad_gates: Tensor, squeezed: Tensor, parameters: GateParameters, gating: Gating
) -> tuple[Tensor, GateParameters]:
    """df [B, D] and the parameters' gradients from dg [B, N, D]."""
    num_blocks = grad_gates.shape[1]
    if not fits(parameters, num_blocks):
        return reference.gate_backward(grad_gates, squeezed, parameters, gating)
    grad = grad_gates.to(torch.float32).contiguous()
    results = _launch(grad, None, squeezed.contiguous(), parameters, gating)
    return results.grad_squeezed, results.grads


def gate_pool_backward(
    grad_output: Tensor, squeezed: Tensor, pooled: Tensor, parameters: GateParameters, gating: Gating
) -> tuple[Tensor, Tensor, GateParameters]:
    """dp [B, N, D], df [B, D] and the parameters' gradients from do [B, D] and p [B, N, D]."""
    num_blocks = pooled.shape[1]
    if not fits(parameters, num_blocks):
        return reference.gate_pool_backward(grad_output, squeezed, pooled, parameters, gating)
    results = _launch(grad_output.contiguous(), pooled.contiguous(), squeezed.contiguous(), parameters, gating)
    assert results.grad_pooled is not None
    return results.grad_pooled, results.grad_squeezed, results.grads

"""The sums of gate_backward over sentences and over feature tiles: the gradients of the gate's parameters, and df.

The formulas and the order of the launches are in ``gate_backward``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...formula.call import GateParameters, Gating
from . import config
from .common import slope
from .direct import direct
from .launch import cdiv
from .limits import triton_interprets

# Three bf16 terms of a factor carry float32's 24 bits, in as many products as three of TF32, whose two terms carry 22. That
# is enough for the gates, which pass through a sigmoid, but not for gradients. The interpreter has no bf16x6.
PRECISION = "ieee" if triton_interprets() else "bf16x6"

_SLICE = 64  # elements: slices of an allocation begin at multiples of it, so that all loads are aligned


class Work(NamedTuple):
    """What one launch of gate_backward leaves in memory for the next: float32, flat, slices of one allocation."""

    shape: tuple[int, int, int]  # B, N, D
    programs: int  # of sentences * TILES
    s: Tensor  # [B, H]
    grad_y: Tensor  # dy [B, N, D]
    normed: Tensor | None  # (z - mean) rstd [B, N, D], with batch statistics
    grad_bottleneck: Tensor | None  # ds of each feature tile [TILES, B, H], with running statistics
    grad_down: Tensor  # ddown [B, H]
    norm_sums: Tensor | None  # [programs of sentences, N * D], sums of dy (z - mean) / sqrt(var + eps)
    prior_sums: Tensor | None  # [programs, N], sums of dlogits
    scale_sums: Tensor | None  # [programs], sums of dlogits e

    @staticmethod
    def of(shape: tuple[int, int, int], w: GateParameters, like: Tensor, rows: int, tiles: int, running: bool) -> Work:
        """For B, N, D and a gate ``w``, in one allocation; ``rows`` of programs for the sentences, ``tiles`` of features."""
        num_sentences, num_blocks, hidden_size = shape
        states, narrow = num_sentences * num_blocks * hidden_size, num_sentences * w.bottleneck
        sizes = {
            "s": narrow,
            "grad_y": states,
            "normed": 0 if running else states,
            "grad_bottleneck": tiles * narrow if running else 0,
            "grad_down": narrow,
            "norm_sums": rows * num_blocks * hidden_size if running and w.norm_weight is not None else 0,
            "prior_sums": 0 if w.block_prior is None else rows * tiles * num_blocks,
            "scale_sums": 0 if w.gate_scale is None else rows * tiles,
        }
        padded = [cdiv(size, _SLICE) * _SLICE for size in sizes.values()]
        slices = like.new_empty(sum(padded)).split_with_sizes(padded)
        named = {name: part if len(part) else None for name, part in zip(sizes, slices, strict=True)}
        return Work(shape, rows * tiles, **named)  # type: ignore[arg-type]

    @property
    def has_vectors(self) -> bool:
        """Whether one more program sums the gradient of the prior or of the scale."""
        return self.prior_sums is not None or self.scale_sums is not None


@triton.jit
def sum_rows(p_from, p_to, rows, N: tl.constexpr, BLOCK_R: tl.constexpr, UNROLL: tl.constexpr):
    """The sums of [rows, N] over the rows: of B D terms of either sign, or more. float32 would round their running sums by more
    than the terms' own errors."""
    PADDED_N: tl.constexpr = triton.next_power_of_2(N)
    o_n = tl.arange(0, PADDED_N)  # [PADDED_N]
    sums = tl.zeros([BLOCK_R, PADDED_N], tl.float64)
    for first in tl.range(0, rows, BLOCK_R, loop_unroll_factor=UNROLL):
        o_r = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        m_r = (o_r < rows)[:, None] & (o_n < N)[None, :]
        sums += tl.load(p_from + o_r[:, None] * N + o_n[None, :], mask=m_r, other=0.0).to(tl.float64)
    tl.store(p_to + o_n, tl.sum(sums, axis=0).to(p_to.dtype.element_ty), mask=o_n < N)


@triton.jit(do_not_specialize=["num_sentences"])
def gate_backward_up_kernel(
    p_grad_y,  # dy [B, N, D] float32
    p_norm_sums,  # [programs of sentences, N * D] float32, or None
    p_prior_sums,  # [programs of sentences * TILES, N] float32, or None
    p_scale_sums,  # [programs of sentences * TILES] float32, or None
    p_grad_bottleneck,  # ds [TILES, B, H] float32
    p_bottleneck,  # s [B, H] float32
    p_norm_weight,  # [N * D] or None, with the next
    p_running_var,
    p_grad_up_weight,  # dW2 [N * D, H]
    p_grad_up_bias,  # db2 [N * D]
    p_grad_norm_weight,  # [N * D] or None, with the next
    p_grad_norm_bias,
    p_grad_prior,  # dc [N] or None
    p_grad_scale,  # dtau, one number, or None
    p_grad_down,  # ddown [B, H] float32
    num_sentences,
    N: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    index = tl.program_id(0).to(tl.int64)
    sentence_programs = tl.cdiv(num_sentences, BLOCK_B)
    partial_sums = tl.cdiv(num_sentences, SENTENCES)
    o_h = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    m_h = o_h < H
    if index < ROW_PROGRAMS:  # dW2 and the vectors of its rows: the longest programs start first
        o_nd = index * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        m_nd = o_nd < N * D
        grad = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
        sums = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)
        for first in tl.range(0, num_sentences, BLOCK_S, num_stages=STAGES):
            o_s = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_S)  # [BLOCK_S]
            m_s = o_s < num_sentences
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
                for i in tl.static_range(BLOCK_T):  # loads in flight together
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
        m_bh = (o_b < num_sentences)[:, None] & m_h[None, :]
        o_bh = o_b[:, None] * H + o_h[None, :]
        ds = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        for first in tl.range(0, TILES, BLOCK_T):
            for i in tl.static_range(BLOCK_T):
                p_ds = p_grad_bottleneck + tl.cast(first + i, tl.int64) * num_sentences * H + o_bh
                ds += tl.load(p_ds, mask=m_bh & (first + i < TILES), other=0.0)
        s = tl.load(p_bottleneck + o_bh, mask=m_bh, other=0.0)
        act_slope = slope(s, ACTIVATION)
        tl.store(p_grad_down + o_bh, ds * act_slope, mask=m_bh)
    else:
        if p_prior_sums is not None:
            sum_rows(p_prior_sums, p_grad_prior, partial_sums * TILES, N, BLOCK_R, 1)
        if p_scale_sums is not None:
            sum_rows(p_scale_sums, p_grad_scale, partial_sums * TILES, 1, BLOCK_R, 1)


@triton.jit(do_not_specialize=["num_sentences"])
def gate_backward_down_kernel(
    p_grad_down,  # ddown [B, H] float32
    p_squeezed,  # f [B, D] float32
    p_down_weight,  # W1 [H, D]
    p_grad_down_weight,  # dW1 [H, D]
    p_grad_down_bias,  # db1 [H]
    p_grad_squeezed,  # df [B, D] float32
    num_sentences,
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
    if index < WEIGHT_TILES:  # dW1 and db1: the longest programs start first
        o_r = index // WEIGHT_COLUMNS * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R] row of W1
        o_w = index % WEIGHT_COLUMNS * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
        m_r, m_w = o_r < H, o_w < D
        grad = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
        sums = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)
        for first in tl.range(0, num_sentences, BLOCK_S, num_stages=STAGES):
            o_s = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_S)  # [BLOCK_S]
            m_s = o_s < num_sentences
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
        m_b, m_d = o_b < num_sentences, o_d < D
        df = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for k in tl.range(0, H, BLOCK_K, num_stages=STAGES):
            o_k = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            m_k = o_k < H
            ddown = tl.load(p_grad_down + o_b[:, None] * H + o_k[None, :], mask=m_b[:, None] & m_k[None, :], other=0.0)
            w = tl.load(p_down_weight + o_k[:, None] * D + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
            df = tl.dot(ddown, w.to(tl.float32), df, input_precision=PRECISION)  # [BLOCK_B, BLOCK_D]
        tl.store(p_grad_squeezed + o_b[:, None] * D + o_d[None, :], df, mask=m_b[:, None] & m_d[None, :])


# ---------------------------------------------------------------- launchers

launch_gate_backward_up = direct(gate_backward_up_kernel)
launch_gate_backward_down = direct(gate_backward_down_kernel)


def sum_up(work: Work, w: GateParameters, grads: GateParameters, gating: Gating) -> None:
    """Writes ddown, and the gradients of W2, b2, the norm, the prior and the scale. ``w``: contiguous parameters."""
    num_sentences, num_blocks, hidden_size = work.shape
    tile = config.gate_backward(num_blocks, w.bottleneck)
    assert tile is not None and work.grad_bottleneck is not None
    t = config.GATE_BACKWARD
    programs = cdiv(num_blocks * hidden_size, t.rows) + cdiv(num_sentences, t.sum_rows)
    programs += work.has_vectors
    launch_gate_backward_up(
        programs,
        p_grad_y=work.grad_y,
        p_norm_sums=work.norm_sums,
        p_prior_sums=work.prior_sums,
        p_scale_sums=work.scale_sums,
        p_grad_bottleneck=work.grad_bottleneck,
        p_bottleneck=work.s,
        p_norm_weight=w.norm_weight,
        p_running_var=w.running_var,
        p_grad_up_weight=grads.up_weight,
        p_grad_up_bias=grads.up_bias,
        p_grad_norm_weight=grads.norm_weight,
        p_grad_norm_bias=grads.norm_bias,
        p_grad_prior=grads.block_prior,
        p_grad_scale=grads.gate_scale,
        p_grad_down=work.grad_down,
        num_sentences=num_sentences,
        N=num_blocks,
        D=hidden_size,
        H=w.bottleneck,
        EPS=gating.eps,
        ACTIVATION=gating.activation,
        TILES=cdiv(hidden_size, tile.block_d),
        SENTENCES=tile.sentences,
        BLOCK_S=t.sentences_up,
        BLOCK_R=t.rows,
        BLOCK_B=t.sum_rows,
        BLOCK_H=tile.block_h,
        BLOCK_T=t.in_flight,
        STAGES=t.stages,
        num_warps=t.num_warps,
    )


def sum_down(grad_down: Tensor, squeezed: Tensor, w: GateParameters, grads: GateParameters, df: Tensor) -> None:
    """Writes df [B, D], and the gradients of W1 and b1."""
    num_sentences, hidden_size = squeezed.shape
    t = config.GATE_BACKWARD
    programs = cdiv(hidden_size, t.columns) * cdiv(w.bottleneck, t.rows)
    programs += cdiv(num_sentences, t.sentences) * cdiv(hidden_size, t.block_d)
    launch_gate_backward_down(
        programs,
        p_grad_down=grad_down,
        p_squeezed=squeezed,
        p_down_weight=w.down_weight,
        p_grad_down_weight=grads.down_weight,
        p_grad_down_bias=grads.down_bias,
        p_grad_squeezed=df,
        num_sentences=num_sentences,
        D=hidden_size,
        H=w.bottleneck,
        PRECISION=PRECISION,
        BLOCK_B=t.sentences,
        BLOCK_D=t.block_d,
        BLOCK_K=t.block_h,
        BLOCK_S=t.sentences_down,
        BLOCK_R=t.rows,
        BLOCK_W=t.columns,
        STAGES=t.stages,
        num_warps=t.num_warps,
    )

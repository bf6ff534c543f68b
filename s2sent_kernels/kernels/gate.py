"""gate: bottleneck, activation, folded batch norm, sigmoid, block prior and s-norm in one launch; with p, the pooled output.

    s = act(W1 f + b1),  z_n = W2_n s + b2_n,  e_n = sigmoid(BN_n(z_n)),  g_n = exp(e_n + c_n) / sum_n' exp(e_n' + c_n')
    o[b,d] = sum_n g[b,n,d] p[b,n,d]

For inference and for autograd's forward with running statistics (profile ``paper``). A program takes a few sentences and a
tile of features: it computes their bottleneck from all of f (again in every feature tile, since a second launch would cost
more), then takes the blocks several at a time. A row of a matrix product does not depend on the rows beside it, so a
sentence's bits are its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import GateParameters
from . import config
from .launch import device_of

# TF32 alone would round the operands to 10 bits; three products of it carry float32's.
PRECISION = "tf32x3"


@triton.jit
def tanh(x):
    """tanh to about 2 ulp: a polynomial near 0, where 1 - exp would cancel, and the exponential elsewhere."""
    s = x * x
    q = -5.59978503728e-3
    q = q * s + 2.05369719979e-2
    q = q * s - 5.37042774388e-2
    q = q * s + 0.133309171694
    q = q * s - 0.333332514473
    q = q * s + 0.999999995461
    t = tl.exp(-2.0 * tl.abs(x))
    far = tl.div_rn(1.0 - t, 1.0 + t)
    return tl.where(s < 0.4, x * q, tl.where(x < 0.0, -far, far))


@triton.jit(do_not_specialize=["batch"])
def gate_kernel(
    p_groups,  # [B, G, D] float32, partial sums of f
    p_down_weight,  # [H, D]
    p_down_bias,  # [H]
    p_up_weight,  # [N * D, H]
    p_up_bias,  # [N * D]
    p_norm_weight,  # [N * D] or None, with the next three
    p_norm_bias,
    p_running_mean,
    p_running_var,
    p_prior,  # [N] or None
    p_pooled,  # [B, N, D] float32, or None: then the gates are the output
    p_output,  # o [B, D], or g [B, N, D] float32
    p_squeezed,  # f [B, D] float32, written where G > 1; else None
    batch,
    N: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    COLUMNS: tl.constexpr = BLOCK_N * BLOCK_D
    PADDED_N: tl.constexpr = triton.next_power_of_2(N)
    index = tl.program_id(0).to(tl.int64)
    i_tile = (index % TILES).to(tl.int32)
    o_b = index // TILES * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B] sentence
    m_b = o_b < batch
    o_h = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    m_h = o_h < H
    o_d = i_tile * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_d = o_d < D

    # f from its groups, ascending. Every feature tile's program writes all of it, the same values, and reads back its own: one
    # read of finished rows is what the product below can stream, and a launch of its own would cost more.
    p_f = p_groups
    if G > 1:
        p_f = p_squeezed
        for k in range(0, D, BLOCK_F):
            o_k = k + tl.arange(0, BLOCK_F)  # [BLOCK_F]
            m_f = m_b[:, None] & (o_k < D)[None, :]
            f = tl.zeros([BLOCK_B, BLOCK_F], tl.float32)
            for group in tl.static_range(G):
                f += tl.load(p_groups + (o_b[:, None] * G + group) * D + o_k[None, :], mask=m_f, other=0.0)
            tl.store(p_squeezed + o_b[:, None] * D + o_k[None, :], f, mask=m_f)
        tl.debug_barrier()

    # s = act(W1 f + b1), over D in blocks of BLOCK_K
    s = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for k in tl.range(0, D, BLOCK_K, num_stages=STAGES + 1):
        o_k = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        m_k = o_k < D
        f = tl.load(p_f + o_b[:, None] * D + o_k[None, :], mask=m_b[:, None] & m_k[None, :], other=0.0)
        # Asked for as [BLOCK_K, BLOCK_H], which a transposed view of [BLOCK_H, BLOCK_K] is not to the compiler: that one goes
        # through shared memory with bank conflicts.
        w = tl.load(p_down_weight + o_k[:, None] + o_h[None, :] * D, mask=m_k[:, None] & m_h[None, :], other=0.0)
        s = tl.dot(f, w.to(tl.float32), s, input_precision=PRECISION)  # [BLOCK_B, BLOCK_H]
    s += tl.load(p_down_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    if RELU:
        s = tl.where(s < 0.0, 0.0, s)  # keeps NaN, as torch.relu does
    else:
        s = tanh(s)
    s = tl.where(m_h[None, :], s, 0.0)  # an inf in f meets the padding's zeros as NaN

    highest = 0.0
    if p_prior is not None:
        o_n = tl.arange(0, PADDED_N)  # [PADDED_N]
        highest = tl.max(tl.load(p_prior + o_n, mask=o_n < N, other=float("-inf")).to(tl.float32), axis=0)

    # BLOCK_N blocks at a time, their features side by side as the columns of one product
    total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    output = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    o_column = tl.arange(0, COLUMNS)  # [COLUMNS]
    d = i_tile * BLOCK_D + o_column % BLOCK_D
    for first in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        n = first + o_column // BLOCK_D
        m_nd = (n < N) & (d < D)
        o_nd = n * D + d  # [COLUMNS] row of W2
        m_bnd = m_b[:, None] & m_nd[None, :]  # [BLOCK_B, COLUMNS]
        o_bnd = o_b[:, None] * (N * D) + o_nd[None, :]
        # Everything is asked for before the product, which waits at barriers.
        w = tl.load(
            p_up_weight + o_h[:, None] + o_nd.to(tl.int64)[None, :] * H, mask=m_h[:, None] & m_nd[None, :], other=0.0
        )  # [BLOCK_H, COLUMNS]
        bias = tl.load(p_up_bias + o_nd, mask=m_nd, other=0.0).to(tl.float32)
        if p_norm_weight is not None:
            variance = tl.load(p_running_var + o_nd, mask=m_nd, other=1.0).to(tl.float32)
            mean = tl.load(p_running_mean + o_nd, mask=m_nd, other=0.0).to(tl.float32)
            scale = tl.load(p_norm_weight + o_nd, mask=m_nd, other=0.0).to(tl.float32) / tl.sqrt_rn(variance + EPS)
            shift = tl.load(p_norm_bias + o_nd, mask=m_nd, other=0.0).to(tl.float32)
        if p_prior is not None:
            prior = tl.load(p_prior + n, mask=n < N, other=0.0).to(tl.float32) - highest
        if p_pooled is not None:
            p = tl.load(p_pooled + o_bnd, mask=m_bnd, other=0.0)
        z = tl.dot(s, w.to(tl.float32), input_precision=PRECISION)  # [BLOCK_B, COLUMNS]
        z += bias[None, :]
        if p_norm_weight is not None:
            z = (z - mean[None, :]) * scale[None, :] + shift[None, :]
        e = 1.0 / (1.0 + tl.exp(-z))
        if p_prior is not None:
            e += prior[None, :]
        weight = tl.where(m_nd[None, :], tl.exp(e), 0.0)
        total += tl.sum(tl.reshape(weight, [BLOCK_B, BLOCK_N, BLOCK_D]), axis=1)
        if p_pooled is not None:
            output += tl.sum(tl.reshape(weight * p, [BLOCK_B, BLOCK_N, BLOCK_D]), axis=1)
        else:
            tl.store(p_output + o_bnd, weight, mask=m_bnd)
    m_o = m_b[:, None] & m_d[None, :]  # [BLOCK_B, BLOCK_D]
    if p_pooled is not None:
        o = tl.div_rn(output, total)
        tl.store(p_output + o_b[:, None] * D + o_d[None, :], o.to(p_output.dtype.element_ty), mask=m_o)
    else:
        tl.debug_barrier()  # the weights above are read back here
        for block in tl.static_range(N):
            p_g = p_output + (o_b[:, None] * N + block) * D + o_d[None, :]
            tl.store(p_g, tl.div_rn(tl.load(p_g, mask=m_o, other=0.0), total), mask=m_o)


# ---------------------------------------------------------------- launchers


def fits(parameters: GateParameters) -> bool:
    """Whether the fused kernel holds this gate. A wider bottleneck is computed in plain PyTorch."""
    return parameters.down_weight.shape[0] <= config.MAX_BOTTLENECK


def _launch(
    squeezed_groups: Tensor,
    parameters: GateParameters,
    num_blocks: int,
    activation: str,
    eps: float,
    pooled: Tensor | None,
    output: Tensor,
    squeezed: Tensor | None,
) -> None:
    batch, groups, size = squeezed_groups.shape
    if batch == 0:
        return
    bottleneck = parameters.down_weight.shape[0]
    tile = config.gate(num_blocks, bottleneck)
    w = parameters.each(lambda t: t.contiguous())
    with device_of(output):
        gate_kernel[(triton.cdiv(batch, tile.sentences) * triton.cdiv(size, tile.block_d),)](
            squeezed_groups, *w, pooled, output, squeezed, batch,
            N=num_blocks, D=size, H=bottleneck, G=groups, EPS=eps, RELU=activation == "relu", PRECISION=PRECISION,
            BLOCK_B=tile.sentences, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, BLOCK_K=tile.block_k, BLOCK_H=tile.block_h,
            BLOCK_F=config.GATE_FEATURES, STAGES=tile.stages, num_warps=tile.num_warps,
        )  # fmt: skip


def gate_groups(
    squeezed_groups: Tensor, parameters: GateParameters, num_blocks: int, activation: str, eps: float
) -> tuple[Tensor, Tensor]:
    """g [B, N, D] and f [B, D] from f's partial sums [B, G, D]: one launch."""
    from .squeeze import sum_groups

    batch, groups, size = squeezed_groups.shape
    if not fits(parameters):
        squeezed = sum_groups(squeezed_groups)
        return reference.gate(squeezed, parameters, num_blocks, activation, eps), squeezed
    gates = squeezed_groups.new_empty(batch, num_blocks, size)
    squeezed = squeezed_groups.new_empty(batch, size) if groups > 1 else squeezed_groups[:, 0]
    written = squeezed if groups > 1 else None
    _launch(squeezed_groups, parameters, num_blocks, activation, eps, None, gates, written)
    return gates, squeezed


def gate(squeezed: Tensor, parameters: GateParameters, num_blocks: int, activation: str, eps: float) -> Tensor:
    """g [B, N, D] from f [B, D]."""
    return gate_groups(squeezed.contiguous()[:, None], parameters, num_blocks, activation, eps)[0]


def gate_pool(
    squeezed_groups: Tensor, pooled: Tensor, parameters: GateParameters, activation: str, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """o [B, D] in ``dtype`` and f [B, D] from f's partial sums [B, G, D] and p [B, N, D]: one launch, no gates in memory."""
    from .squeeze import sum_groups

    batch, num_blocks, size = pooled.shape
    groups = squeezed_groups.shape[1]
    if not fits(parameters):
        squeezed = sum_groups(squeezed_groups)
        gates = reference.gate(squeezed, parameters, num_blocks, activation, eps)
        return reference.pool(gates, pooled, dtype), squeezed
    output = pooled.new_empty(batch, size, dtype=dtype)
    squeezed = pooled.new_empty(batch, size) if groups > 1 else squeezed_groups[:, 0]
    written = squeezed if groups > 1 else None
    _launch(squeezed_groups, parameters, num_blocks, activation, eps, pooled, output, written)
    return output, squeezed

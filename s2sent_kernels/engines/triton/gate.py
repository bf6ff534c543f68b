"""gate: activation, folded batch norm, sigmoid, block prior and s-norm in one launch; with p, the pooled output.

    s = act(W1 f + b1),  z_n = W2_n s + b2_n,  e_n = sigmoid(BN_n(z_n)),  g_n = exp(e_n + c_n) / sum_n' exp(e_n' + c_n')
    o[b,d] = sum_n g[b,n,d] p[b,n,d]

For inference and for autograd's forward with running statistics (profile ``paper``). A program takes a few sentences and a
tile of features of every block: the blocks' features lie side by side as the columns of one product, in PIECES of a power of
two of blocks. It asks for its slice of W2 and all else that squeeze does not write before it waits for squeeze. W1 f comes
from squeeze's launch as sums over its feature tiles (t), added up here in ascending order: every program would have to read
all of W1. A row of a matrix product does not depend on the rows beside it, so a sentence's bits are its own.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import GateParameters
from . import config
from .bottleneck import Squeezed, sum_groups_for_gate
from .common import allow_next_launch, wait_for_previous
from .launch import FUSE_MULTIPLY_ADD, device_of, early, launches_overlap
from .squeeze import squeeze_for_gate

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


@triton.jit
def up_weight(
    p_up_weight, o_h, m_h, i_tile, START: tl.constexpr, D: tl.constexpr, H: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows of W2 for one feature tile of PIECE blocks from START on, transposed: [BLOCK_H, PIECE * BLOCK_D]."""
    o_column = tl.arange(0, PIECE * BLOCK_D)
    d = i_tile * BLOCK_D + o_column % BLOCK_D
    o_w = o_h[:, None] + ((START + o_column // BLOCK_D) * D + d).to(tl.int64)[None, :] * H
    return tl.load(p_up_weight + o_w, mask=m_h[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def folded_norm(
    p_up_bias, p_norm_weight, p_norm_bias, p_running_mean, p_running_var, p_prior, highest, i_tile, START: tl.constexpr,
    D: tl.constexpr, EPS: tl.constexpr, PIECE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(scale, shift, prior) of a piece's columns: BN(W2 s + b2) = W2 s scale + shift, and c - max c. [PIECE * BLOCK_D] each."""
    o_column = tl.arange(0, PIECE * BLOCK_D)
    n = START + o_column // BLOCK_D
    d = i_tile * BLOCK_D + o_column % BLOCK_D
    o_nd = n * D + d
    m_nd = d < D
    shift = tl.load(p_up_bias + o_nd, mask=m_nd, other=0.0).to(tl.float32)
    scale = tl.full([PIECE * BLOCK_D], 1.0, tl.float32)
    prior = tl.zeros([PIECE * BLOCK_D], tl.float32)
    if p_norm_weight is not None:
        variance = tl.load(p_running_var + o_nd, mask=m_nd, other=1.0).to(tl.float32)
        mean = tl.load(p_running_mean + o_nd, mask=m_nd, other=0.0).to(tl.float32)
        weight = tl.load(p_norm_weight + o_nd, mask=m_nd, other=0.0).to(tl.float32)
        scale = weight * tl.rsqrt(variance + EPS)
        shift = (shift - mean) * scale + tl.load(p_norm_bias + o_nd, mask=m_nd, other=0.0).to(tl.float32)
    if p_prior is not None:
        prior = tl.load(p_prior + n).to(tl.float32) - highest
    return scale, shift, prior


@triton.jit
def load_blocks(
    p_values, o_b, m_b, i_tile, START: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One feature tile of PIECE blocks from START on out of [B, N, D]: [BLOCK_B, PIECE * BLOCK_D]."""
    o_column = tl.arange(0, PIECE * BLOCK_D)
    d = i_tile * BLOCK_D + o_column % BLOCK_D
    o_bnd = o_b[:, None] * (N * D) + ((START + o_column // BLOCK_D) * D + d)[None, :]
    return tl.load(p_values + o_bnd, mask=m_b[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def sum_blocks(values, PIECE: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_B, PIECE * BLOCK_D] -> [BLOCK_B, BLOCK_D], half and half: sums of two have one order in every layout."""
    BLOCK_B: tl.constexpr = values.shape[0]
    for step in tl.static_range(PIECE.bit_length() - 1):
        values = tl.sum(tl.reshape(values, [BLOCK_B, 2, (PIECE >> (step + 1)) * BLOCK_D]), axis=1)
    return values


@triton.jit
def over_blocks(values, PIECE: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_B, BLOCK_D] -> [BLOCK_B, PIECE * BLOCK_D]"""
    spread = tl.broadcast_to(values[:, None, :], [values.shape[0], PIECE, BLOCK_D])
    return tl.reshape(spread, [values.shape[0], PIECE * BLOCK_D])


@triton.jit(do_not_specialize=["batch"])
def gate_kernel(
    p_bottleneck,  # t [B, T, H] float32, whose sum over T is W1 f
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
    batch,
    N: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PIECES: tl.constexpr,  # blocks side by side in one product; powers of two whose sum is N
    STARTS: tl.constexpr,  # the first block of each piece
    UNROLL: tl.constexpr,  # feature tiles of t in flight
    AHEAD: tl.constexpr,  # whether the registers hold all of the program's W2 at once
    OVERLAP: tl.constexpr,
):
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    PADDED_N: tl.constexpr = triton.next_power_of_2(N)
    index = tl.program_id(0).to(tl.int64)
    i_tile = (index % TILES).to(tl.int32)
    o_b = index // TILES * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B] sentence
    m_b = o_b < batch
    o_h = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    m_h = o_h < H
    o_d = i_tile * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    if OVERLAP:
        allow_next_launch()

    bias1 = tl.load(p_down_bias + o_h, mask=m_h, other=0.0).to(tl.float32)
    highest = 0.0
    if p_prior is not None:
        o_n = tl.arange(0, PADDED_N)  # [PADDED_N]
        highest = tl.max(tl.load(p_prior + o_n, mask=o_n < N, other=float("-inf")).to(tl.float32), axis=0)
    up_weights = ()
    norms = ()
    if AHEAD:
        for i in tl.static_range(len(PIECES)):
            up_weights = up_weights + (up_weight(p_up_weight, o_h, m_h, i_tile, STARTS[i], D, H, PIECES[i], BLOCK_D),)
            norms = norms + (
                folded_norm(
                    p_up_bias, p_norm_weight, p_norm_bias, p_running_mean, p_running_var, p_prior, highest, i_tile,
                    STARTS[i], D, EPS, PIECES[i], BLOCK_D,
                ),
            )  # fmt: skip
    if OVERLAP:
        wait_for_previous()
    pools = ()
    if AHEAD and p_pooled is not None:
        for i in tl.static_range(len(PIECES)):
            pools = pools + (load_blocks(p_pooled, o_b, m_b, i_tile, STARTS[i], N, D, PIECES[i], BLOCK_D),)

    # s = act(W1 f + b1)
    s = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    p_t = p_bottleneck + o_b[:, None] * (T * H) + o_h[None, :]
    for tile in tl.range(0, T, loop_unroll_factor=UNROLL):
        s += tl.load(p_t + tile * H, mask=m_b[:, None] & m_h[None, :], other=0.0)
    s += bias1[None, :]
    if RELU:
        s = tl.where(s < 0.0, 0.0, s)  # keeps NaN, as torch.relu does
    else:
        s = tanh(s)
    s = tl.where(m_h[None, :], s, 0.0)  # an inf in f meets the padding's zeros as NaN

    weights = ()  # exp(e + c), [BLOCK_B, PIECES[i] * BLOCK_D] each
    total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    output = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for i in tl.static_range(len(PIECES)):
        if AHEAD:
            w = up_weights[i]
            norm = norms[i]
        else:
            w = up_weight(p_up_weight, o_h, m_h, i_tile, STARTS[i], D, H, PIECES[i], BLOCK_D)
            norm = folded_norm(
                p_up_bias, p_norm_weight, p_norm_bias, p_running_mean, p_running_var, p_prior, highest, i_tile,
                STARTS[i], D, EPS, PIECES[i], BLOCK_D,
            )  # fmt: skip
        if p_pooled is not None:
            if AHEAD:
                p = pools[i]
            else:
                p = load_blocks(p_pooled, o_b, m_b, i_tile, STARTS[i], N, D, PIECES[i], BLOCK_D)
        z = tl.dot(s, w.to(tl.float32), input_precision=PRECISION)  # [BLOCK_B, PIECES[i] * BLOCK_D]
        e = 1.0 / (1.0 + tl.exp(-(z * norm[0][None, :] + norm[1][None, :])))
        if p_prior is not None:
            e += norm[2][None, :]
        weight = tl.exp(e)
        total += sum_blocks(weight, PIECES[i], BLOCK_D)
        if p_pooled is not None:
            output += sum_blocks(weight * p, PIECES[i], BLOCK_D)
        else:
            weights = weights + (weight,)

    if p_pooled is not None:
        o = tl.div_rn(output, total)
        m_o = m_b[:, None] & (o_d < D)[None, :]  # [BLOCK_B, BLOCK_D]
        tl.store(p_output + o_b[:, None] * D + o_d[None, :], o.to(p_output.dtype.element_ty), mask=m_o)
    else:
        for i in tl.static_range(len(PIECES)):
            o_column = tl.arange(0, PIECES[i] * BLOCK_D)
            d = i_tile * BLOCK_D + o_column % BLOCK_D
            o_bnd = o_b[:, None] * (N * D) + ((STARTS[i] + o_column // BLOCK_D) * D + d)[None, :]
            g = tl.div_rn(weights[i], over_blocks(total, PIECES[i], BLOCK_D))
            tl.store(p_output + o_bnd, g, mask=m_b[:, None] & (d < D)[None, :])


# ---------------------------------------------------------------- launchers


def fits(parameters: GateParameters) -> bool:
    """Whether the fused kernel holds this gate. A wider bottleneck is computed in plain PyTorch."""
    return parameters.down_weight.shape[0] <= config.MAX_BOTTLENECK


def _launch(
    bottleneck: Tensor,
    parameters: GateParameters,
    num_blocks: int,
    activation: str,
    eps: float,
    pooled: Tensor | None,
    output: Tensor,
) -> None:
    batch, size = output.shape[0], output.shape[-1]
    if batch == 0:
        return
    width = parameters.down_weight.shape[0]
    tile = config.gate(num_blocks, width, size, batch)
    overlap = launches_overlap(output.device)
    w = parameters.each(lambda t: t.contiguous())
    with device_of(output):
        gate_kernel[(triton.cdiv(batch, tile.sentences) * triton.cdiv(size, tile.block_d),)](
            bottleneck, *w[1:], pooled, output, batch,
            N=num_blocks, D=size, H=width, T=bottleneck.shape[1], EPS=eps,
            RELU=activation == "relu", PRECISION=PRECISION, BLOCK_B=tile.sentences, BLOCK_D=tile.block_d,
            BLOCK_H=tile.block_h, PIECES=tile.pieces, STARTS=tile.starts, UNROLL=tile.unroll,
            AHEAD=tile.ahead, OVERLAP=overlap,
            num_warps=tile.num_warps, enable_fp_fusion=FUSE_MULTIPLY_ADD, **early(overlap),
        )  # fmt: skip


def gate(squeezed: Tensor, parameters: GateParameters, num_blocks: int, activation: str, eps: float) -> Tensor:
    """g [B, N, D] from f [B, D]: a launch for W1 f, which here no squeeze has left behind, and the gate's."""
    if not fits(parameters):
        return reference.gate(squeezed, parameters, num_blocks, activation, eps)
    done = sum_groups_for_gate(squeezed.contiguous()[:, None], 1, squeezed.dtype, parameters.down_weight)
    return _gates(done, parameters, num_blocks, activation, eps)


def _gates(done: Squeezed, parameters: GateParameters, num_blocks: int, activation: str, eps: float) -> Tensor:
    if done.bottleneck is None:
        return reference.gate(done.f, parameters, num_blocks, activation, eps)
    gates = done.f.new_empty(done.f.shape[0], num_blocks, done.f.shape[1])
    _launch(done.bottleneck, parameters, num_blocks, activation, eps, None, gates)
    return gates


def _pool(
    done: Squeezed, pooled: Tensor, parameters: GateParameters, activation: str, eps: float, dtype: torch.dtype
) -> Tensor:
    """o [B, D] in ``dtype``, no gates in memory."""
    num_blocks = pooled.shape[1]
    if done.bottleneck is None:
        return reference.pool(reference.gate(done.f, parameters, num_blocks, activation, eps), pooled, dtype)
    output = done.f.new_empty(done.f.shape, dtype=dtype)
    _launch(done.bottleneck, parameters, num_blocks, activation, eps, pooled, output)
    return output


def squeeze_and_gate(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    parameters: GateParameters,
    frequencies: int,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """g [B, N, D] and f [B, D]: two launches."""
    w1 = parameters.down_weight if fits(parameters) else None
    done = squeeze_for_gate(hidden_states, attention_mask, cu_seqlens, frequencies, "paper", None, w1)
    return _gates(done, parameters, len(hidden_states), activation, eps), done.f


def squeeze_and_pool(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    parameters: GateParameters,
    frequencies: int,
    pooling: str,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, D], f [B, D] and p [B, N, D]: two launches."""
    w1 = parameters.down_weight if fits(parameters) else None
    done = squeeze_for_gate(hidden_states, attention_mask, cu_seqlens, frequencies, "paper", pooling, w1)
    assert done.pooled is not None
    return _pool(done, done.pooled, parameters, activation, eps, hidden_states[0].dtype), done.f, done.pooled


def gate_pool(
    squeezed_groups: Tensor,
    pooled: Tensor,
    parameters: GateParameters,
    frequencies: int,
    activation: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """o [B, D] in ``dtype`` and f [B, D] from what ``squeeze_block`` left, f's partial sums [B, G, D] and p [B, N, D]."""
    w1 = parameters.down_weight if fits(parameters) else None
    done = sum_groups_for_gate(squeezed_groups, frequencies, dtype, w1)
    return _pool(done, pooled, parameters, activation, eps, dtype), done.f

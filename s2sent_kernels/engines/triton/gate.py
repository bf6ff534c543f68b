"""gate: activation, folded batch norm, sigmoid, block prior, gate scale and s-norm in one launch; with p, the pooled output.

    s = act(W1 f + b1),  z_n = W2_n s + b2_n,  e_n = sigmoid(BN_n(z_n))
    g_n = exp(tau e_n + c_n) / sum_n' exp(tau e_n' + c_n')
    o[b,d] = sum_n g[b,n,d] p[b,n,d]

For inference and for autograd's forward (profile ``paper``); with batch statistics after the launches of ``gate_training``,
which leave s - mean s in place of t. A program computes a few sentences and a
tile of features of every block: the blocks' features lie side by side as the columns of one product, cut into PIECES of a
power of two of blocks. It loads its slice of W2, and all else that squeeze does not write, before it waits for squeeze. W1 f
arrives from squeeze's launch as sums over its feature tiles (t), which are added here in ascending order; otherwise every
program would have to read all of W1. A row of a matrix product does not depend on the other rows, so a sentence's bits do not
depend on its batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formula import reference
from ...formula.call import Batch, GateParameters, Gating, PartialSums, Reading
from ..interface import say_once
from . import config
from .bottleneck import Squeezed, sum_groups_for_gate
from .common import activate, allow_next_launch, wait_for_previous
from .direct import direct
from .fuse import fuse_laid_out
from .launch import FUSE_MULTIPLY_ADD, cdiv, contiguous, launches_overlap
from .squeeze import laid_out, squeeze_for_gate

# A single TF32 product would round the operands to 10 bits; three of them keep 22, close to float32's 24.
PRECISION = "tf32x3"


@triton.jit
def up_weight(
    p_up_weight,
    o_h,
    m_h,
    i_tile,
    D: tl.constexpr,
    H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    START: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The rows of W2 for one feature tile of PIECE blocks from START on, transposed: [BLOCK_H, PIECE * BLOCK_D]."""
    o_column = tl.arange(0, PIECE * BLOCK_D)
    d = i_tile * BLOCK_D + o_column % BLOCK_D
    o_w = o_h[:, None] + ((START + o_column // BLOCK_D) * D + d).to(tl.int64)[None, :] * H
    return tl.load(p_up_weight + o_w, mask=m_h[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def folded_norm(
    p_up_bias,
    norm,  # pointers to (weight, bias, running mean, running variance), or Nones
    p_rstd,  # of a batch whose s is centred; None for the running statistics
    prior_and_highest,  # (pointer to c or None, max c)
    i_tile,
    D: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    START: tl.constexpr,
    PIECE: tl.constexpr,
):
    """(scale, shift, prior) of a piece's columns: BN(W2 s + b2) = W2 s scale + shift, and c - max c. [PIECE * BLOCK_D] each."""
    p_norm_weight, p_norm_bias, p_running_mean, p_running_var = norm
    p_prior, highest = prior_and_highest
    o_column = tl.arange(0, PIECE * BLOCK_D)
    n = START + o_column // BLOCK_D
    d = i_tile * BLOCK_D + o_column % BLOCK_D
    o_nd = n * D + d
    m_nd = d < D
    scale = tl.full([PIECE * BLOCK_D], 1.0, tl.float32)
    prior = tl.zeros([PIECE * BLOCK_D], tl.float32)
    if p_rstd is not None:
        weight = tl.load(p_norm_weight + o_nd, mask=m_nd, other=0.0).to(tl.float32)
        scale = weight * tl.load(p_rstd + o_nd, mask=m_nd, other=0.0)
        shift = tl.load(p_norm_bias + o_nd, mask=m_nd, other=0.0).to(tl.float32)
    else:
        shift = tl.load(p_up_bias + o_nd, mask=m_nd, other=0.0).to(tl.float32)
    if p_running_mean is not None:
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
    p_values,
    o_b,
    m_b,
    i_tile,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    START: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One feature tile of PIECE blocks from START on out of [B, N, D]: [BLOCK_B, PIECE * BLOCK_D]."""
    o_column = tl.arange(0, PIECE * BLOCK_D)
    d = i_tile * BLOCK_D + o_column % BLOCK_D
    o_bnd = o_b[:, None] * (N * D) + ((START + o_column // BLOCK_D) * D + d)[None, :]
    return tl.load(p_values + o_bnd, mask=m_b[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def sum_blocks(values, PIECE: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_B, PIECE * BLOCK_D] -> [BLOCK_B, BLOCK_D], by halving: a sum of two terms has the same order in every layout."""
    BLOCK_B: tl.constexpr = values.shape[0]
    for step in tl.static_range(PIECE.bit_length() - 1):
        values = tl.sum(tl.reshape(values, [BLOCK_B, 2, (PIECE >> (step + 1)) * BLOCK_D]), axis=1)
    return values


@triton.jit
def max_blocks(values, PIECE: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_B, PIECE * BLOCK_D] -> [BLOCK_B, BLOCK_D]."""
    return tl.max(tl.reshape(values, [values.shape[0], PIECE, BLOCK_D]), axis=1)


@triton.jit
def over_blocks(values, PIECE: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_B, BLOCK_D] -> [BLOCK_B, PIECE * BLOCK_D]."""
    spread = tl.broadcast_to(values[:, None, :], [values.shape[0], PIECE, BLOCK_D])
    return tl.reshape(spread, [values.shape[0], PIECE * BLOCK_D])


@triton.jit(do_not_specialize=["num_sentences"])
def gate_kernel(
    p_bottleneck,  # t [B, T, H] float32, whose sum over T is W1 f; with p_rstd s - mean s [B, H], T = 1
    p_down_bias,  # b1 [H], None with p_rstd
    p_up_weight,  # W2 [N * D, H]
    p_up_bias,  # b2 [N * D]
    p_norm_weight,  # [N * D] or None, with the next three
    p_norm_bias,
    p_running_mean,  # None with p_rstd, as the next
    p_running_var,
    p_rstd,  # [N * D] float32 of the batch, or None
    p_prior,  # c [N] or None
    p_scale,  # tau, one number, or None
    p_pooled,  # p [B, N, D] float32; None if the gates are the output
    p_output,  # o [B, D], or g [B, N, D] float32
    num_sentences,
    N: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    BLOCK_B: tl.constexpr = TILE.sentences
    BLOCK_D: tl.constexpr = TILE.block_d
    BLOCK_H: tl.constexpr = TILE.block_h
    PIECES: tl.constexpr = TILE.pieces  # blocks side by side in one product; powers of two whose sum is N
    STARTS: tl.constexpr = TILE.starts  # the first block of each piece
    UNROLL: tl.constexpr = TILE.unroll
    AHEAD: tl.constexpr = TILE.ahead  # load all of the program's W2 before waiting for squeeze
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    PADDED_N: tl.constexpr = triton.next_power_of_2(N)
    index = tl.program_id(0).to(tl.int64)
    i_tile = (index % TILES).to(tl.int32)
    o_b = index // TILES * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B] sentence
    m_b = o_b < num_sentences
    o_h = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    m_h = o_h < H
    o_d = i_tile * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    if OVERLAP:
        allow_next_launch()

    if p_down_bias is not None:
        bias1 = tl.load(p_down_bias + o_h, mask=m_h, other=0.0).to(tl.float32)
    highest = 0.0
    if p_prior is not None:
        o_n = tl.arange(0, PADDED_N)  # [PADDED_N]
        highest = tl.max(tl.load(p_prior + o_n, mask=o_n < N, other=float("-inf")).to(tl.float32), axis=0)
    prior = (p_prior, highest)
    if p_scale is not None:
        scale_of_gate = tl.load(p_scale).to(tl.float32)
    norm = (p_norm_weight, p_norm_bias, p_running_mean, p_running_var)
    up_weights = ()
    folded = ()
    if AHEAD:
        for i in tl.static_range(len(PIECES)):
            up_weights = up_weights + (up_weight(p_up_weight, o_h, m_h, i_tile, D, H, BLOCK_D, STARTS[i], PIECES[i]),)
            if p_rstd is None:
                shifts = folded_norm(p_up_bias, norm, None, prior, i_tile, D, EPS, BLOCK_D, STARTS[i], PIECES[i])
                folded = folded + (shifts,)
    if OVERLAP:
        wait_for_previous()
    if AHEAD and p_rstd is not None:  # the previous launch wrote it
        for i in tl.static_range(len(PIECES)):
            shifts = folded_norm(p_up_bias, norm, p_rstd, prior, i_tile, D, EPS, BLOCK_D, STARTS[i], PIECES[i])
            folded = folded + (shifts,)
    pools = ()
    if AHEAD and p_pooled is not None:
        for i in tl.static_range(len(PIECES)):
            pools = pools + (load_blocks(p_pooled, o_b, m_b, i_tile, N, D, BLOCK_D, STARTS[i], PIECES[i]),)

    # s = act(W1 f + b1)
    s = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    p_t = p_bottleneck + o_b[:, None] * (T * H) + o_h[None, :]
    for tile in tl.range(0, T, loop_unroll_factor=UNROLL):
        s += tl.load(p_t + tile * H, mask=m_b[:, None] & m_h[None, :], other=0.0)
    if p_down_bias is not None:
        s += bias1[None, :]
        s = activate(s, ACTIVATION)
    s = tl.where(m_h[None, :], s, 0.0)  # an inf in f times the padding's zeros would be NaN

    weights = ()  # exp(tau e + c), [BLOCK_B, PIECES[i] * BLOCK_D] each
    # With tau, which is unbounded, the largest logit of the pieces so far is subtracted from each piece's.
    highest_logit = tl.full([BLOCK_B, BLOCK_D], float("-inf"), tl.float32)
    subtracted = ()  # [BLOCK_B, BLOCK_D] each
    total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    output = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for i in tl.static_range(len(PIECES)):
        if AHEAD:
            w = up_weights[i]
            scale, shift, c = folded[i]
        else:
            w = up_weight(p_up_weight, o_h, m_h, i_tile, D, H, BLOCK_D, STARTS[i], PIECES[i])
            scale, shift, c = folded_norm(p_up_bias, norm, p_rstd, prior, i_tile, D, EPS, BLOCK_D, STARTS[i], PIECES[i])
        if p_pooled is not None:
            if AHEAD:
                p = pools[i]
            else:
                p = load_blocks(p_pooled, o_b, m_b, i_tile, N, D, BLOCK_D, STARTS[i], PIECES[i])
        z = tl.dot(s, w.to(tl.float32), input_precision=PRECISION)  # [BLOCK_B, PIECES[i] * BLOCK_D]
        logit = 1.0 / (1.0 + tl.exp(-(z * scale[None, :] + shift[None, :])))
        if p_scale is not None:
            logit *= scale_of_gate
        if p_prior is not None:
            logit += c[None, :]
        if p_scale is not None:
            higher = tl.maximum(highest_logit, max_blocks(logit, PIECES[i], BLOCK_D))
            total *= tl.exp(highest_logit - higher)
            output *= tl.exp(highest_logit - higher)
            highest_logit = higher
            subtracted = subtracted + (higher,)
            logit -= over_blocks(higher, PIECES[i], BLOCK_D)
        weight = tl.exp(logit)
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
            weight = weights[i]
            if p_scale is not None:
                weight *= over_blocks(tl.exp(subtracted[i] - highest_logit), PIECES[i], BLOCK_D)
            g = tl.div_rn(weight, over_blocks(total, PIECES[i], BLOCK_D))
            tl.store(p_output + o_bnd, g, mask=m_b[:, None] & (d < D)[None, :])


# ---------------------------------------------------------------- launchers

launch_gate_kernel = direct(gate_kernel)


def fits(parameters: GateParameters) -> bool:
    """Whether the kernel holds this gate. If not, plain PyTorch computes it, which is reported once."""
    bottleneck = parameters.down_weight.shape[0]
    if bottleneck <= config.MAX_BOTTLENECK:
        return True
    say_once(
        "s2sent_kernels computes the gate in plain PyTorch: backend 'triton': its kernel holds a bottleneck of up to "
        f"H = {config.MAX_BOTTLENECK}, got H = {bottleneck}"
    )
    return False


def launch_gate(
    bottleneck: Tensor,  # t [B, T, H], or with rstd s - mean s [B, 1, H]
    parameters: GateParameters,
    gating: Gating,
    pooled: Tensor | None,
    output: Tensor,
    rstd: Tensor | None = None,  # of the batch
) -> None:
    """Writes o, or without p the gates."""
    num_sentences, hidden_size = output.shape[0], output.shape[-1]
    if num_sentences == 0:
        return
    num_blocks = parameters.up_weight.shape[0] // hidden_size
    tile = config.gate(num_blocks, parameters.bottleneck, hidden_size, num_sentences)
    overlap = launches_overlap(output.device)
    w = contiguous(parameters)
    launch_gate_kernel(
        cdiv(num_sentences, tile.sentences) * cdiv(hidden_size, tile.block_d),
        p_bottleneck=bottleneck,
        p_down_bias=w.down_bias if rstd is None else None,
        p_up_weight=w.up_weight,
        p_up_bias=w.up_bias,
        p_norm_weight=w.norm_weight,
        p_norm_bias=w.norm_bias,
        p_running_mean=w.running_mean if rstd is None else None,
        p_running_var=w.running_var if rstd is None else None,
        p_rstd=rstd,
        p_prior=w.block_prior,
        p_scale=w.gate_scale,
        p_pooled=pooled,
        p_output=output,
        num_sentences=num_sentences,
        N=num_blocks,
        D=hidden_size,
        H=w.bottleneck,
        T=bottleneck.shape[1],
        EPS=gating.eps,
        ACTIVATION=gating.activation,
        PRECISION=PRECISION,
        TILE=tile,
        OVERLAP=overlap,
        num_warps=tile.num_warps,
        enable_fp_fusion=FUSE_MULTIPLY_ADD,
        launch_pdl=overlap or None,
    )


def _gates(done: Squeezed, parameters: GateParameters, num_blocks: int, gating: Gating) -> Tensor:
    if done.bottleneck is None:
        return reference.gate(done.f, parameters, num_blocks, gating)
    gates = done.f.new_empty(done.f.shape[0], num_blocks, done.f.shape[1])
    launch_gate(done.bottleneck, parameters, gating, None, gates)
    return gates


def pool(done: Squeezed, pooled: Tensor, parameters: GateParameters, gating: Gating, dtype: torch.dtype) -> Tensor:
    """o [B, D] in ``dtype``, without writing gates to memory."""
    num_blocks = pooled.shape[1]
    if done.bottleneck is None:
        return reference.pool(reference.gate(done.f, parameters, num_blocks, gating), pooled, dtype)
    output = torch.empty_like(done.f, dtype=dtype)
    launch_gate(done.bottleneck, parameters, gating, pooled, output)
    return output


def gate(squeezed: Tensor, parameters: GateParameters, num_blocks: int, gating: Gating) -> Tensor:
    """g [B, N, D] from f [B, D] in two launches: W1 f, which no squeeze has computed here, and the gate."""
    if not fits(parameters):
        return reference.gate(squeezed, parameters, num_blocks, gating)
    done = sum_groups_for_gate(squeezed.contiguous()[:, None], 1, squeezed.dtype, parameters.down_weight)
    return _gates(done, parameters, num_blocks, gating)


def gate_pool(
    sums: PartialSums, parameters: GateParameters, frequencies: int, gating: Gating, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """o [B, D] in ``dtype`` and f [B, D], from the partial sums of ``squeeze_block``, which include p."""
    w1 = parameters.down_weight if fits(parameters) else None
    done = sum_groups_for_gate(sums.squeezed_groups, frequencies, dtype, w1)
    assert sums.pooled is not None
    return pool(done, sums.pooled, parameters, gating, dtype), done.f


def prepare(parameters: GateParameters, num_blocks: int, reading: Reading, gating: Gating) -> None:
    return None


def select_pool(
    batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, D], f [B, D] and p [B, N, D] in two launches."""
    w1 = parameters.down_weight if fits(parameters) else None
    done = squeeze_for_gate(laid_out(batch, reading), batch, reading, w1)
    assert done.pooled is not None
    return pool(done, done.pooled, parameters, gating, batch.dtype), done.f, done.pooled


def select(batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating) -> tuple[Tensor, Tensor, Tensor]:
    """v like a hidden state, f [B, D] and g [B, N, D] in three launches."""
    hidden = laid_out(batch, reading)
    done = squeeze_for_gate(hidden, batch, reading, parameters.down_weight if fits(parameters) else None)
    gates = _gates(done, parameters, batch.num_blocks, gating)
    return fuse_laid_out(hidden.for_parts(1, batch.packed), batch, gates), done.f, gates

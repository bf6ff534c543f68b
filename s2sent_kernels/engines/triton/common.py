"""What the kernels of several stages share: DCT factors, a sentence's real tokens, pointers to blocks, activations.

Prefixes: ``p_`` pointer, ``o_`` offset, ``m_`` mask, ``i_`` index; upper case is constexpr, and a constexpr record is one of
``config``. Comments give the shapes of Triton's tiles.
"""

import triton
import triton.language as tl

from . import config

RUN = tl.constexpr(config.RUN)
FLOAT32_RUN = tl.constexpr(config.FLOAT32_RUN)
SCAN = tl.constexpr(config.SCAN)


# ---------------------------------------------------------------- DCT


@triton.jit
def quotient(a, b, inverse):
    """a / b from ``inverse``, about 1 / b. One Newton step makes the product round as the quotient would, in three instructions;
    a division needs ten and a branch."""
    q = a * inverse
    return tl.fma(tl.fma(-q, b, a), inverse, q)


@triton.jit
def quarter_cosine(half_steps, period, DTYPE: tl.constexpr):
    """cos(pi * half_steps / (2 * period)) for integers 0 <= half_steps < 2^31, to about 2 ulp even near its zeros.

    The angle is reduced in integers to a quarter wave t = k / period in [0, 1], where
    cos(pi t / 2) = (1 - t)(1 + t) Q(t^2), with Q a polynomial that fits to 1.1e-9. ``tl.cos`` would add a range reduction
    for huge arguments, with its local stack. In float64 only the error of the fit remains, which float32 rounding hides.
    """
    turn = 4 * period
    p = period.to(DTYPE)
    inverse = 1.0 / p
    turns = (half_steps.to(DTYPE) * (0.25 * inverse)).to(tl.int32)  # exact or one off
    k = half_steps - turns * turn
    k = tl.where(k < 0, k + turn, k)
    k = tl.where(k >= turn, k - turn, k)
    k = tl.minimum(k, turn - k)  # cos is even around a whole turn
    sign = tl.where(k > period, -1.0, 1.0).to(DTYPE)
    k = tl.minimum(k, 2 * period - k)  # and odd around a quarter
    t = quotient(k.to(DTYPE), p, inverse)
    s = t * t
    q = s * 2.36006895813e-5 - 8.93535501463e-4
    q = s * q + 1.99686062068e-2
    q = s * q - 0.233700506255
    q = s * q + 0.999999999123
    ends = quotient((period - k).to(DTYPE), p, inverse) * quotient((period + k).to(DTYPE), p, inverse)
    return sign * (ends * q)


@triton.jit
def frequency_of(part, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The frequency of a part, from words of 16 parts with 3 bits each (see ``config.Dct``)."""
    word = tl.where(part < 16, tl.full((), LOW, tl.int64), tl.full((), HIGH, tl.int64))
    return ((word >> (3 * (part % 16)).to(tl.int64)) & 7).to(tl.int32)


@triton.jit
def block_factor(x, n, STRIDE: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr, ALPHA: tl.constexpr):
    """alpha[m, n] = ALPHA[x * N + n] for a part's block frequency x and blocks n among FIRST, FIRST + STRIDE, ...; 0 for n >= N.

    A table of constants, because the factor scales a whole sum and must be exact: a cosine in float64 would cost as much as
    hundreds of products."""
    factor = n.to(tl.float32) * 0.0
    for k in tl.static_range(FIRST, N, STRIDE):
        for i in tl.static_range(len(ALPHA) // N):
            factor = tl.where((n == k) & (x == i), ALPHA[i * N + k], factor)
    return factor


@triton.jit
def grid_factor(frequency, position, num_tokens):
    """beta[m, l] of profile ``official``: the DCT over 6 cells, mapped back to tokens by adaptive average pooling."""
    factor = position.to(tl.float32) * 0.0
    for cell in tl.static_range(6):
        start = (cell * num_tokens) // 6
        end = ((cell + 1) * num_tokens + 5) // 6
        share = cell_cosine(frequency, cell) / tl.maximum(end - start, 1).to(tl.float64)
        factor += tl.where((position >= start) & (position < end), share.to(tl.float32), 0.0)
    return factor


@triton.jit
def cell_cosine(frequency, CELL: tl.constexpr):
    """c(k, CELL, 6) = cos(pi k (CELL + 1/2) / 6) (sqrt 2 if k > 0 else 1) / sqrt 6 in float64."""
    six = frequency * 0 + 6
    wave = quarter_cosine(frequency * (2 * CELL + 1), six, tl.float64)
    return wave * tl.sqrt(tl.where(frequency > 0, 2.0, 1.0).to(tl.float64) / 6)


@triton.jit
def token_scale(y, length, SCALE: tl.constexpr):
    """6 / sqrt(N l) (sqrt 2 if y > 0 else 1) / sqrt l: beta[b, m, l] for y = 0, and otherwise the cosine's factor; 0 if the
    sentence has no such frequency. SCALE: 6 / sqrt N. y and ``length`` are scalars."""
    one = tl.full((), SCALE, tl.float64)
    two = tl.full((), SCALE * 1.4142135623730951, tl.float64)
    scale = tl.where(y > 0, two, one) / tl.maximum(length, 1).to(tl.float64)
    return tl.where(y < length, scale, 0.0).to(tl.float32)


@triton.jit
def token_factor(y, rank, position, length, num_tokens, scale, OFFICIAL: tl.constexpr):
    """beta[b, m, l] for one part's token frequency. rank, position: per token; length (real tokens), num_tokens (L), scale:
    scalars."""
    if OFFICIAL:
        return grid_factor(y, position, num_tokens)
    else:
        factor = rank.to(tl.float32) * 0.0 + scale
        if y != 0:  # about half of the parts have y = 0, and a cosine is a third of the instructions per token
            factor = quarter_cosine(y * (2 * rank + 1), length, tl.float32) * scale
        return factor


# ---------------------------------------------------------------- blocks dealt to warps


@triton.jit
def row_pointers(p_hidden, j: tl.constexpr, i_g, DEAL: tl.constexpr):
    """The pointer to block i_g * per_group + j, for each row's i_g. A tuple of pointers has no address to index, so the
    pointer is selected."""
    NUM: tl.constexpr = DEAL.num_blocks
    GROUPS: tl.constexpr = DEAL.groups
    PER: tl.constexpr = DEAL.per_group
    pointers = tl.broadcast_to(p_hidden[j], i_g.shape)
    for g in tl.static_range(1, GROUPS):
        pointers = tl.where(i_g == g, p_hidden[min(g * PER + j, NUM - 1)], pointers)
    return pointers


@triton.jit
def sum_slots(values, GROUPS: tl.constexpr, SLOTS: tl.constexpr):
    """[GROUPS * SLOTS, BLOCK_D] -> [GROUPS, BLOCK_D], inside a warp."""
    return tl.sum(tl.reshape(values, [GROUPS, SLOTS, values.shape[1]]), axis=1)


@triton.jit
def run_ends(start, first, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Whether the tile at token ``start`` holds the last terms of each slot's run. The first run began at ``first``."""
    return tl.cast(start - first, tl.int32) % (FLOAT32_RUN * SLOTS) == (FLOAT32_RUN - ROWS) * SLOTS


@triton.jit
def end_run(ends, sums, totals, PER: tl.constexpr):
    """(sums, totals), ``per_group`` tensors [GROUPS * SLOTS, BLOCK_D] each: where a run ``ends``, its sums are added to the
    totals and begin anew. Selected, so that the loop whose loads are prefetched has no branch."""
    new_sums = ()
    new_totals = ()
    for j in tl.static_range(PER):
        new_totals = new_totals + (tl.where(ends, totals[j] + sums[j], totals[j]),)
        new_sums = new_sums + (tl.where(ends, 0.0, sums[j]),)
    return new_sums, new_totals


@triton.jit
def add_runs(sums, totals, PER: tl.constexpr):
    """totals + sums, of ``per_group`` tensors each."""
    added = ()
    for j in tl.static_range(PER):
        added = added + (totals[j] + sums[j],)
    return added


@triton.jit
def across_groups(tokens, GROUPS: tl.constexpr):
    """[SLOTS] -> [GROUPS * SLOTS]: every group of blocks reads the same tokens."""
    SLOTS: tl.constexpr = tokens.shape[0]
    return tl.reshape(tl.broadcast_to(tokens[None, :], [GROUPS, SLOTS]), [GROUPS * SLOTS])


# ---------------------------------------------------------------- real tokens


@triton.jit
def real_span(p_mask, stride_mask, num_tokens):
    """(first, end, count) of a mask row: its ``count`` real tokens lie in [first, end)."""
    first = num_tokens
    end = num_tokens * 0
    count = num_tokens * 0
    for start in range(0, num_tokens, SCAN):
        o_l = start + tl.arange(0, SCAN)  # [SCAN]
        real = tl.load(p_mask + o_l.to(tl.int64) * stride_mask, mask=o_l < num_tokens, other=0) != 0
        count += tl.sum(real.to(tl.int32), axis=0)
        first = tl.minimum(first, tl.min(tl.where(real, o_l, num_tokens), axis=0))
        end = tl.maximum(end, tl.max(tl.where(real, o_l + 1, 0), axis=0))
    return first, end, count


@triton.jit
def real_before(p_mask, stride_mask, stop):
    """How many of a mask row's first ``stop`` tokens are real."""
    count = stop * 0
    for start in range(0, stop, SCAN):
        o_l = start + tl.arange(0, SCAN)  # [SCAN]
        real = tl.load(p_mask + o_l.to(tl.int64) * stride_mask, mask=o_l < stop, other=0) != 0
        count += tl.sum(real.to(tl.int32), axis=0)
    return count


@triton.jit
def sentence_at(p_cu_seqlens, num_sentences, token):
    """The packed sentence that holds ``token``: the number of sentences that have ended by then."""
    ended = num_sentences * 0
    for start in range(0, num_sentences, SCAN):
        o_b = start + tl.arange(0, SCAN)  # [SCAN]
        m_b = o_b < num_sentences
        ends = tl.load(p_cu_seqlens + 1 + o_b, mask=m_b, other=0)
        ended += tl.sum((m_b & (ends <= token)).to(tl.int32), axis=0)
    return ended


@triton.jit
def pooling_weight(position, first, end, length, POOLING: tl.constexpr):
    """w[b, l] at real tokens. position: per token; first, end: the sentence's real span; length: its real tokens."""
    if POOLING == "mean":
        return tl.div_rn(1.0, length.to(tl.float32)) + position.to(tl.float32) * 0.0
    elif POOLING == "cls":
        return (position == first).to(tl.float32)
    elif POOLING == "last":
        return (position == end - 1).to(tl.float32)
    else:
        tl.static_assert(False, "unknown pooling")


# ---------------------------------------------------------------- activations


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
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "tanh":
        return tanh(x)
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # keeps NaN, as torch.relu does
    else:
        tl.static_assert(False, "unknown activation")


@triton.jit
def slope(s, ACTIVATION: tl.constexpr):
    """The activation's derivative, from its output s."""
    if ACTIVATION == "tanh":
        return 1.0 - s * s
    elif ACTIVATION == "relu":
        return tl.where(s > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(False, "unknown activation")


# ---------------------------------------------------------------- the mean of s over a batch


@triton.jit
def store_sum(p_sums, s, m_b, o_h, m_h):
    """The float64 sum of these sentences' s. s: [BLOCK_B, BLOCK_H]."""
    tl.store(p_sums + o_h, tl.sum(tl.where(m_b[:, None], s, 0.0).to(tl.float64), axis=0), mask=m_h)


@triton.jit
def mean_of_sums(p_sums, num_sentences, o_h, m_h, H: tl.constexpr, SENTENCES: tl.constexpr, BLOCK_P: tl.constexpr):
    """The mean of s over all sentences [BLOCK_H] in float64, from the sums of SENTENCES each."""
    partials = tl.cdiv(num_sentences, SENTENCES)
    total = tl.zeros([BLOCK_P, o_h.shape[0]], tl.float64)
    for first in tl.range(0, partials, BLOCK_P):
        o_p = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        m_p = (o_p < partials)[:, None] & m_h[None, :]
        total += tl.load(p_sums + o_p[:, None] * H + o_h[None, :], mask=m_p, other=0.0)
    return tl.sum(total, axis=0) / num_sentences.to(tl.float64)


@triton.jit
def two_floats(x):
    """A float64 as the sum of two float32."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def centred(p_bottleneck, mean, o_b, m_b, o_h, m_h, H: tl.constexpr):
    """s - mean s of some sentences, [BLOCK_B, BLOCK_H]; 0 where there is no sentence. mean: ``two_floats``, because rounded to
    one it would shift a column of z by more than columns of little variance allow."""
    high, low = mean
    m_bh = m_b[:, None] & m_h[None, :]
    s = tl.load(p_bottleneck + o_b[:, None] * H + o_h[None, :], mask=m_bh, other=0.0)
    return tl.where(m_bh, (s - high[None, :]) - low[None, :], 0.0)


# ---------------------------------------------------------------- programmatic dependent launch


@triton.jit
def allow_next_launch():
    """Lets the next kernel start once every program of this one has called this or ended."""
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    """Waits until the previous kernel has ended and its stores are visible. Before this, load nothing that it writes, and
    store nothing."""
    tl.extra.cuda.gdc_wait()

"""What the three stages share inside their kernels: the DCT factors, the real tokens of a sentence, a block's pointer.

Prefixes: ``p_`` pointer, ``o_`` offset, ``m_`` mask, ``i_`` program index; upper case is constexpr. Shapes stand behind each
block.
"""

import triton
import triton.language as tl


@triton.jit
def quotient(a, b, inverse):
    """a / b from ``inverse``, about 1 / b: one Newton step brings the product to the quotient's rounding, in three
    instructions where a division takes ten and a branch."""
    q = a * inverse
    return tl.fma(tl.fma(-q, b, a), inverse, q)


@triton.jit
def quarter_cosine(half_steps, period, DTYPE: tl.constexpr):
    """cos(pi * half_steps / (2 * period)) for integers 0 <= half_steps < 2^31, to about 2 ulp near its zeros too.

    The angle is reduced in integers to a quarter wave t = k / period in [0, 1], where
    cos(pi t / 2) = (1 - t)(1 + t) Q(t^2), with Q a polynomial that fits to 1.1e-9. ``tl.cos`` would bring a range reduction
    for huge arguments and its local stack. In float64 the fit's error is what remains: enough for a rounded float32.
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
def root_norm(frequency, period):
    """(sqrt 2 if k > 0 else 1) / sqrt P in float64."""
    return tl.sqrt(tl.where(frequency > 0, 2.0, 1.0).to(tl.float64) / period.to(tl.float64))


@triton.jit
def cosine(frequency, index, period):
    """c(k, i, P) = cos(pi k (i + 1/2) / P) * (sqrt 2 if k > 0 else 1) / sqrt P in float64, as ``dct.cosine``: for factors
    that a whole sum shares, whose rounding would not average out."""
    return quarter_cosine(frequency * (2 * index + 1), period, tl.float64) * root_norm(frequency, period)


@triton.jit
def grid_factor(frequency, position, size):
    """The DCT over 6 cells carried back to ``size`` positions by adaptive average pooling (profile ``official``)."""
    factor = position.to(tl.float64) * 0.0
    six = size * 0 + 6
    for cell in tl.static_range(6):
        start = (cell * size) // 6
        end = ((cell + 1) * size + 5) // 6
        share = cosine(frequency, six * 0 + cell, six) / tl.maximum(end - start, 1).to(tl.float64)
        factor += tl.where((position >= start) & (position < end), share, 0.0)
    return factor.to(tl.float32)


@triton.jit
def frequency_of(part, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The frequency of a part: 3 bits each, 16 parts a word (see ``config.frequency_words``)."""
    word = tl.where(part < 16, tl.full((), LOW, tl.int64), tl.full((), HIGH, tl.int64))
    return ((word >> (3 * (part % 16)).to(tl.int64)) & 7).to(tl.int32)


@triton.jit
def block_factor(frequency, block, N: tl.constexpr, OFFICIAL: tl.constexpr):
    """alpha[m, n] for one part's block frequency and one block."""
    n = tl.full((), N, tl.int32)
    if OFFICIAL:
        return grid_factor(frequency, block, n)
    else:
        return cosine(frequency, block, n).to(tl.float32)


@triton.jit
def token_factor(frequency, rank, position, length, size, N: tl.constexpr, OFFICIAL: tl.constexpr):
    """beta[b, m, l] for one part's token frequency. rank, position: tokens; length (real tokens), size (L): scalars."""
    if OFFICIAL:
        return grid_factor(frequency, position, size)
    else:
        # A scalar, like ``length``: once for all tokens.
        scale = 6.0 / tl.sqrt((N * length).to(tl.float64)) * root_norm(frequency, length)
        scale = tl.where(frequency < length, scale, 0.0).to(tl.float32)
        return quarter_cosine(frequency * (2 * rank + 1), length, tl.float32) * scale


@triton.jit
def block_pointer(p_blocks, block, NUM: tl.constexpr):
    """p_blocks[block] for a block known at run time: a tuple of pointers has no address, so the pointer is selected."""
    pointer = p_blocks[0]
    for n in tl.static_range(1, NUM):
        pointer = tl.where(block == n, p_blocks[n], pointer)
    return pointer


@triton.jit
def sum_rows(values, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """[ROWS * SLOTS, BLOCK_D] -> [SLOTS, BLOCK_D]: token i of a tile goes to slot i % SLOTS. Loaded in two dimensions, a
    slot's tokens lie in the registers of one thread, whichever way a Triton version lays out three."""
    return tl.sum(tl.reshape(values, [ROWS, SLOTS, values.shape[1]]), axis=0)


@triton.jit
def real_span(p_mask, stride_mask, size, SCAN: tl.constexpr):
    """(first, end, count) of a mask row of ``size`` tokens: real tokens lie in [first, end), ``count`` of them."""
    first = size
    end = size * 0
    count = size * 0
    for start in range(0, size, SCAN):
        o_l = start + tl.arange(0, SCAN)  # [SCAN]
        real = tl.load(p_mask + o_l.to(tl.int64) * stride_mask, mask=o_l < size, other=0) != 0
        count += tl.sum(real.to(tl.int32), axis=0)
        first = tl.minimum(first, tl.min(tl.where(real, o_l, size), axis=0))
        end = tl.maximum(end, tl.max(tl.where(real, o_l + 1, 0), axis=0))
    return first, end, count


@triton.jit
def real_before(p_mask, stride_mask, stop, SCAN: tl.constexpr):
    """How many of a mask row's first ``stop`` tokens are real."""
    count = stop * 0
    for start in range(0, stop, SCAN):
        o_l = start + tl.arange(0, SCAN)  # [SCAN]
        real = tl.load(p_mask + o_l.to(tl.int64) * stride_mask, mask=o_l < stop, other=0) != 0
        count += tl.sum(real.to(tl.int32), axis=0)
    return count


@triton.jit
def sentence_at(p_cu_seqlens, num_sentences, token, SCAN: tl.constexpr):
    """The packed sentence that holds ``token``: as many sentences have ended by then."""
    ended = num_sentences * 0
    for start in range(0, num_sentences, SCAN):
        o_b = start + tl.arange(0, SCAN)  # [SCAN]
        m_b = o_b < num_sentences
        ends = tl.load(p_cu_seqlens + 1 + o_b, mask=m_b, other=0)
        ended += tl.sum((m_b & (ends <= token)).to(tl.int32), axis=0)
    return ended


@triton.jit
def pooling_weight(position, first, end, length, POOLING: tl.constexpr):
    """w[b, l] at real tokens. position: tokens; first, end: the sentence's real span; length: its real tokens."""
    if POOLING == "mean":
        return tl.div_rn(1.0, length.to(tl.float32)) + position.to(tl.float32) * 0.0
    elif POOLING == "cls":
        return (position == first).to(tl.float32)
    else:
        return (position == end - 1).to(tl.float32)

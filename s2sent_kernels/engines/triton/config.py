"""The kernels' configurations: one small table, a function of N, D, M, H and dtype.

Most entries fix the order of summation: changing one changes bits, and they must not depend on B or L. The gate's tile is
the exception: no sum crosses it.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

from ...formula import dct
from ...formula.call import Profile

RUN = 256  # terms of a slot in a chunk, which bounds their sum's rounding; a multiple of every tile's rows
FLOAT32_RUN = 16  # of them in a running sum in float32, whose inputs hide no rounding; likewise, and a divisor of RUN
SCAN = 256  # mask tokens, or sentence ends, that are loaded at once
BACKWARD_AHEAD = 4  # blocks whose rows of g and dp squeeze's backward loads before it stores
GATE_PROGRAMS = 132  # fewer would leave multiprocessors of the largest GPUs idle
MAX_BOTTLENECK = 256  # H, the widest bottleneck that the gate kernel keeps on chip


class Tile(NamedTuple):
    """Tokens x features that a program writes at once."""

    tokens: int
    block_d: int
    num_warps: int


class SumTile(NamedTuple):
    """rows x slots tokens x features that a warp adds to its running sums at once."""

    rows: int
    slots: int  # tokens side by side in a warp's threads
    block_d: int
    stages: int  # tiles in flight or in use

    @property
    def chunk(self) -> int:
        """Tokens whose running sums are added up on their own."""
        return RUN * self.slots


class Deal(NamedTuple):
    """N blocks dealt to the warps of a program that sums over tokens."""

    num_blocks: int  # N
    groups: int  # warps, a power of two
    per_group: int  # neighbouring blocks of a warp; the last group may have fewer


class Dct(NamedTuple):
    """The DCT of a profile, N and M as constants in the kernels."""

    x_low: int  # block frequencies of parts 0 to 15, 3 bits each (none is over 6)
    x_high: int  # of parts 16 to 31
    y_low: int  # token frequencies, likewise
    y_high: int
    alpha: tuple[float, ...]  # of every x and n, x major
    scale: float  # of beta, without the sentence's length
    official: bool  # profile "official": beta over a grid of all positions, padding included

    def __hash__(self) -> int:  # every launch hashes it, and ``alpha`` is long
        return hash((self.x_low, self.x_high, self.y_low, self.y_high, self.scale, self.official))


class GateTile(NamedTuple):
    sentences: int
    block_d: int  # features of every block
    block_h: int  # bottleneck, padded
    pieces: tuple[int, ...]  # blocks side by side in one product
    starts: tuple[int, ...]  # the first block of each piece
    unroll: int  # feature tiles of t, W1's products with f, in flight
    ahead: bool  # load all of the program's W2 before squeeze has ended
    num_warps: int


class GateBackwardTile(NamedTuple):
    sentences: int
    block_d: int  # features of every block
    block_k: int  # of the bottleneck at a time
    block_h: int  # bottleneck, padded
    num_warps: int


class GateBackwardTiles(NamedTuple):
    """Of the smaller kernels beside the one that GateBackwardTile configures."""

    sentences: int = 16  # x features of f (block_k at a time) or of df
    block_k: int = 64
    block_d: int = 64
    block_h: int = 32  # of the bottleneck at a time, for df
    rows: int = 32  # of dW2 or dW1, whose products sum over as many sentences at once:
    sentences_up: int = 32
    sentences_down: int = 64
    columns: int = 16  # of dW1
    sum_rows: int = 4  # of ds
    in_flight: int = 8  # partial sums
    num_warps: int = 4
    stages: int = 3


GATE_BACKWARD = GateBackwardTiles()


class ColumnTile(NamedTuple):
    """Columns of z that a program owns, over all sentences, ``sentences`` at a time."""

    sentences: int
    columns: int
    block_h: int  # bottleneck, padded
    num_warps: int
    stages: int  # tiles of sentences in flight, of the loop with products
    unroll: int  # the same of the loop without, if there is one


class GateTrainingTiles(NamedTuple):
    """Of the smaller kernels of the gate with batch statistics."""

    sentences: int = 16  # x bottleneck whose s a program computes; as many enter a partial sum of s
    block_h: int = 16
    sum_rows: int = 2  # of ds
    in_flight: int = 16  # partial sums of ds
    unroll: int = 4
    prior_rows: int = 128  # partial sums of the prior's gradient
    num_warps: int = 4


GATE_TRAINING = GateTrainingTiles()


def _features(part: int, widest: int) -> int:
    """Features of a tile inside a part of ``part`` features: ``widest``, or fewer if that wastes fewer lanes. Rows under
    64 bytes would waste memory transactions instead."""
    candidates = [width for width in (128, 64, 32) if width <= widest]
    return 16 if part <= 16 else min(candidates, key=lambda width: (-(-part // width) * width, -width))


@functools.cache
def deal(num_blocks: int) -> Deal:
    """Three blocks a warp, or the fewest with which sixteen warps cover all."""
    groups = min(16, 1 << (max(1, -(-num_blocks // 3)) - 1).bit_length())
    return Deal(num_blocks, groups, -(-num_blocks // groups))


def _sum_tile(width: int, vector: int, groups: int, loads: int, stages: int) -> SumTile:
    """A tile with ``loads`` loads of ``vector`` elements a thread, or fewer if there are so many warps that the tiles in
    flight would exceed the smallest GPUs' shared memory, 99 KB. Its slots fill a warp with rows of ``block_d`` features."""
    block_d = _features(width, 64)
    return SumTile(max(1, min(loads, 16 // groups)), max(1, 32 * vector // block_d), block_d, stages)


@functools.cache
def squeeze(part: int, vector: int, groups: int) -> SumTile:
    return _sum_tile(part, vector, groups, 2, 4)


@functools.cache
def num_tiles(hidden_size: int, frequencies: int, vector: int) -> int:
    """Feature tiles of squeeze: those of a part, for every part."""
    part = hidden_size // frequencies
    return frequencies * -(-part // squeeze(part, vector, 1).block_d)


def bottleneck_rows(groups: int) -> int:
    """Rows of W1 that ``groups`` warps of squeeze multiply with f at a time."""
    return min(64, 32 * groups)


@functools.cache
def fuse_backward(hidden_size: int, vector: int, groups: int) -> SumTile:
    return _sum_tile(hidden_size, vector, groups, 4, 3)


@functools.cache
def squeeze_backward(part: int, num_blocks: int, vector: int) -> Tile:
    loads = 4 if num_blocks <= 6 else 2
    block_d = _features(part, 64)
    return Tile(max(1, loads * 32 * vector // block_d), block_d, 1)


@functools.cache
def fuse(hidden_size: int, num_blocks: int, vector: int) -> Tile:
    """A program has loads of every block in flight. With more blocks each gets fewer, or registers would spill."""
    loads = 4 if num_blocks <= 6 else 2 if num_blocks <= 12 else 1
    block_d = _features(hidden_size, 128)
    return Tile(max(1, loads * 128 * vector // block_d), block_d, 4)


@functools.lru_cache(maxsize=4096)  # the number of sentences is unbounded
def gate(num_blocks: int, bottleneck: int, hidden_size: int, num_sentences: int) -> GateTile:
    """Few sentences: many programs of few features, because a program's latency is the kernel's time. Many sentences: few
    programs, so that W2 is read less often.

    The choice does not change bits: no sum crosses features or sentences, and the sum over blocks is halved piece by piece.
    """
    block_h = max(16, 1 << (bottleneck - 1).bit_length())
    ahead = block_h * num_blocks <= 64 * 24  # fits the register file
    widest_by_shared_memory = max(1, 512 // block_h)
    widest = 1 << (num_blocks if ahead else widest_by_shared_memory).bit_length() - 1
    pieces: list[int] = []
    while sum(pieces) < num_blocks:
        pieces.append(min(1 << (num_blocks - sum(pieces)).bit_length() - 1, widest))
    starts = tuple(sum(pieces[:i]) for i in range(len(pieces)))
    sentences = 16
    # The narrowest product needs more columns than rows, or the compiler gives every warp all of it.
    few, many = max(4, 32 // pieces[-1]), max(4, min(32, 64 // pieces[-1]))
    if -(-num_sentences // sentences) * -(-hidden_size // many) < GATE_PROGRAMS:
        return GateTile(sentences, few, block_h, tuple(pieces), starts, 12, ahead, 4)
    return GateTile(sentences, many, block_h, tuple(pieces), starts, 4, False, 4)


@functools.cache
def gate_backward(num_blocks: int, bottleneck: int) -> GateBackwardTile | None:
    """All blocks' features side by side are the columns of one product. None if so many columns do not fit on chip.

    The bottleneck is padded to at least two steps of block_k: without a loop the compiler sees one product feed another,
    makes every warp compute all columns, and spills.
    """
    block_h = max(32, 1 << (bottleneck - 1).bit_length())
    columns = 128 if block_h <= 128 else 64
    block_d = min(64, columns >> (num_blocks - 1).bit_length())
    if bottleneck > MAX_BOTTLENECK or block_d < 4:  # rows of p under 16 bytes
        return None
    return GateBackwardTile(16, block_d, 16, block_h, 8)


@functools.cache
def gate_statistics(bottleneck: int) -> ColumnTile:
    """Of the kernel that computes the statistics of the batch."""
    block_h = max(16, 1 << (bottleneck - 1).bit_length())
    if block_h <= 64:
        return ColumnTile(64, 32, block_h, 4, 2, 1)
    return ColumnTile(4096 // block_h, 16, block_h, 8, 1, 1)


@functools.cache
def gate_training_backward(bottleneck: int) -> ColumnTile:
    """Of the kernel that takes from dy what moves a column's mean and variance."""
    block_h = max(16, 1 << (bottleneck - 1).bit_length())
    if block_h <= 64:
        return ColumnTile(32, 32, block_h, 4, 2, 4)
    return ColumnTile(16, 16, block_h, 4, 2, 4)


@functools.cache
def dct_constants(num_blocks: int, frequencies: int, profile: Profile) -> Dct:
    """The constants of a ``profile``, which is validated here."""
    pairs = dct.frequency_pairs(num_blocks, frequencies, profile)
    x, y = zip(*pairs, strict=True)
    alpha = dct.block_basis(num_blocks, frequencies, profile, torch.device("cpu")).tolist()
    by_frequency = dict(zip(x, alpha, strict=True))
    absent = [0.0] * num_blocks
    table = [by_frequency.get(frequency, absent) for frequency in range(max(x) + 1)]
    return Dct(
        *(_packed(x[:16]), _packed(x[16:]), _packed(y[:16]), _packed(y[16:])),
        alpha=tuple(itertools.chain(*table)),
        scale=dct.GRID / num_blocks**0.5,
        official=profile == "official",
    )


def _packed(frequencies: tuple[int, ...]) -> int:
    return sum(frequency << 3 * i for i, frequency in enumerate(frequencies))

"""The kernels' configurations: one small table, a function of N, D, M, H and dtype. Most of what stands here decides the order of
summation too, so a change of it changes bits, and none of that may depend on B or L; the gate's tile, over which nothing is
summed, may.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

from .. import dct

CHUNK = 512  # tokens that one running sum takes, a multiple of every tile: longer sentences sum chunks of it
SCAN = 256  # mask tokens, or sentence ends, looked at at once
BACKWARD_AHEAD = 4  # blocks whose rows of g and dp squeeze's backward asks for at once
GATE_PROGRAMS = 132  # fewer would leave multiprocessors of the largest GPUs idle
MAX_BOTTLENECK = 256  # the widest bottleneck that the fused gate holds on chip


class Tile(NamedTuple):
    """Tokens x features that a program writes at once."""

    tokens: int
    block_d: int
    num_warps: int


class SumTile(NamedTuple):
    """rows x slots tokens x features that a warp sums at once; ``slots`` tokens lie side by side in its threads. ``stages``
    tiles are in flight or in use."""

    rows: int
    slots: int
    block_d: int
    stages: int


class Deal(NamedTuple):
    """N blocks dealt to the warps of a program that sums over tokens."""

    groups: int  # warps, a power of two
    per_group: int  # neighbouring blocks of a warp; the last group may have fewer


class GateTile(NamedTuple):
    sentences: int
    block_d: int  # features of every block
    block_h: int  # bottleneck, padded
    pieces: tuple[int, ...]  # blocks side by side in one product
    starts: tuple[int, ...]
    unroll: int  # feature tiles of t, W1's products with f, in flight
    ahead: bool  # all of the program's W2 at once, asked for before squeeze has ended
    num_warps: int


class GateBackwardTile(NamedTuple):
    sentences: int
    block_d: int  # features, of every block
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


def _features(part: int, widest: int) -> int:
    """Features of a tile inside a part of ``part`` features: as many as ``widest``, or fewer where that wastes fewer lanes;
    rows under 64 bytes waste memory transactions instead."""
    candidates = [width for width in (128, 64, 32) if width <= widest]
    return 16 if part <= 16 else min(candidates, key=lambda width: (-(-part // width) * width, -width))


def deal(num_blocks: int) -> Deal:
    """Three blocks a warp, or the fewest that sixteen warps manage."""
    groups = min(16, 1 << (max(1, -(-num_blocks // 3)) - 1).bit_length())
    return Deal(groups, -(-num_blocks // groups))


def _sum_tile(width: int, vector: int, groups: int, loads: int, stages: int) -> SumTile:
    """``loads`` loads of ``vector`` elements a thread, fewer for so many warps that the tiles in flight would not fit the shared
    memory of the smallest GPUs, 99 KB; as many slots as rows of ``block_d`` features fill a warp."""
    block_d = _features(width, 64)
    return SumTile(max(1, min(loads, 16 // groups)), max(1, 32 * vector // block_d), block_d, stages)


def squeeze(part: int, vector: int, groups: int) -> SumTile:
    return _sum_tile(part, vector, groups, 2, 4)


def num_tiles(size: int, frequencies: int, vector: int) -> int:
    """Feature tiles of squeeze: those of a part for every part."""
    part = size // frequencies
    return frequencies * -(-part // squeeze(part, vector, 1).block_d)


def bottleneck_rows(groups: int) -> int:
    """Rows of W1 that so many warps of squeeze multiply at a time with their features' f."""
    return min(64, 32 * groups)


def fuse_backward(size: int, vector: int, groups: int) -> SumTile:
    return _sum_tile(size, vector, groups, 4, 3)


def squeeze_backward(part: int, num_blocks: int, vector: int) -> Tile:
    loads = 4 if num_blocks <= 6 else 2
    block_d = _features(part, 64)
    return Tile(max(1, loads * 32 * vector // block_d), block_d, 1)


def fuse(size: int, num_blocks: int, vector: int) -> Tile:
    """A program has a load of every block in flight: more blocks, fewer loads of each, or the registers spill."""
    loads = 4 if num_blocks <= 6 else 2 if num_blocks <= 12 else 1
    block_d = _features(size, 128)
    return Tile(max(1, loads * 128 * vector // block_d), block_d, 4)


def gate(num_blocks: int, bottleneck: int, size: int, batch: int) -> GateTile:
    """Few sentences want many programs of few features: a program's instructions, one after another, are its time. Many
    sentences want W2 read by few. Bits do not depend on it: no sum runs over features or sentences, and the one over blocks is
    halved piece by piece."""
    block_h = max(16, 1 << (bottleneck - 1).bit_length())
    ahead = block_h * num_blocks <= 64 * 24  # registers
    widest = 1 << (num_blocks if ahead else max(1, 512 // block_h)).bit_length() - 1  # by shared memory
    pieces: list[int] = []
    while sum(pieces) < num_blocks:
        pieces.append(min(1 << (num_blocks - sum(pieces)).bit_length() - 1, widest))
    starts = tuple(sum(pieces[:i]) for i in range(len(pieces)))
    sentences = 16
    # The narrowest product needs more columns than rows, or the compiler gives every warp all of it.
    few, many = max(4, 32 // pieces[-1]), max(4, min(32, 64 // pieces[-1]))
    if -(-batch // sentences) * -(-size // many) < GATE_PROGRAMS:
        return GateTile(sentences, few, block_h, tuple(pieces), starts, 12, ahead, 4)
    return GateTile(sentences, many, block_h, tuple(pieces), starts, 4, False, 4)


def gate_backward(num_blocks: int, bottleneck: int) -> GateBackwardTile | None:
    """All blocks' features side by side are the columns of one product. None where so many columns do not fit on chip.

    The bottleneck is padded to two steps of block_k at least: without a loop the compiler sees one product feed another, lets
    every warp compute all columns, and spills.
    """
    block_h = max(32, 1 << (bottleneck - 1).bit_length())
    columns = 128 if block_h <= 128 else 64
    block_d = min(64, columns >> (num_blocks - 1).bit_length())
    if bottleneck > MAX_BOTTLENECK or block_d < 4:  # rows of p under 16 bytes
        return None
    return GateBackwardTile(16, block_d, 16, block_h, 8)


@functools.cache
def dct_constants(num_blocks: int, frequencies: int, profile: str) -> dict[str, object]:
    """The DCT as constants for the kernels. The parts' frequencies, 3 bits each (none is over 6), 16 parts a word; alpha of every
    x and n, x major; the token factor's scale without the sentence's length."""
    constants: dict[str, object] = {}
    pairs = dct.frequency_pairs(num_blocks, frequencies, profile)
    for axis, values in zip("XY", zip(*pairs, strict=True), strict=True):
        for half, first in (("LOW", 0), ("HIGH", 16)):
            constants[f"{axis}_{half}"] = sum(k << 3 * i for i, k in enumerate(values[first : first + 16]))
    alpha = dct.block_basis(num_blocks, frequencies, profile, torch.device("cpu")).tolist()
    by_frequency = {x: factors for (x, _), factors in zip(pairs, alpha, strict=True)}
    absent = [0.0] * num_blocks
    table = [by_frequency.get(x, absent) for x in range(max(by_frequency) + 1)]
    return constants | {"ALPHA": tuple(itertools.chain(*table)), "SCALE": dct.GRID / num_blocks**0.5}

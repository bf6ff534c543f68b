"""The kernels' configurations: one small table, a function of D, M and dtype (gate: of D and H), never of B or L.

Whatever stands here decides the order of summation too, so a change of it changes bits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from .. import dct

BLOCK_GROUP = 3  # blocks whose share of f one program sums: divides the usual N, and splits small batches
CHUNK = 512  # tokens that one running sum takes, a multiple of every tile: longer sentences sum chunks of it
SCAN = 256  # mask tokens, or sentence ends, looked at at once
SUM_GROUPS_BLOCK = 1024
GATE_FEATURES = 256  # of f that the gate sums from its groups at once
MAX_BOTTLENECK = 256  # the widest bottleneck that the fused gate holds on chip


class Tile(NamedTuple):
    """Tokens x features that a program writes at once."""

    tokens: int
    block_d: int
    num_warps: int


class SumTile(NamedTuple):
    """rows x slots tokens x features that a program sums at once; ``slots`` tokens lie side by side in its threads."""

    rows: int
    slots: int
    block_d: int
    num_warps: int


class GateTile(NamedTuple):
    sentences: int
    block_n: int  # blocks at a time
    block_d: int  # features of the output
    block_k: int  # features of f at a time
    block_h: int  # bottleneck, padded
    num_warps: int
    stages: int  # tiles of W2 in flight; one more of W1, which are smaller


def _features(part: int, widest: int) -> int:
    """Features of a tile inside a part of ``part`` features: as many as ``widest``, or fewer where that wastes fewer lanes;
    rows under 64 bytes waste memory transactions instead."""
    candidates = [width for width in (128, 64, 32) if width <= widest]
    return 16 if part <= 16 else min(candidates, key=lambda width: (-(-part // width) * width, -width))


def _sum_tile(width: int, vector: int, loads: int, num_warps: int) -> SumTile:
    """``loads`` loads of ``vector`` elements a thread; as many slots as rows of ``block_d`` features fill the warps."""
    block_d = _features(width, 64)
    slots = max(1, 32 * num_warps * vector // block_d)
    return SumTile(loads, slots, block_d, num_warps)


def squeeze(part: int, vector: int) -> SumTile:
    return _sum_tile(part, vector, 4, 1)


def fuse_backward(size: int, vector: int) -> SumTile:
    return _sum_tile(size, vector, 2, 2)  # beside as many of dv


def squeeze_backward(part: int, num_blocks: int, vector: int) -> Tile:
    loads = 4 if num_blocks <= 6 else 2
    block_d = _features(part, 64)
    return Tile(max(1, loads * 32 * vector // block_d), block_d, 1)


def fuse(size: int, num_blocks: int, vector: int) -> Tile:
    """A program has a load of every block in flight: more blocks, fewer loads of each, or the registers spill."""
    loads = 4 if num_blocks <= 6 else 2 if num_blocks <= 12 else 1
    block_d = _features(size, 128)
    return Tile(max(1, loads * 128 * vector // block_d), block_d, 4)


def gate(num_blocks: int, bottleneck: int) -> GateTile:
    """A tile of W2 in shared memory is block_n * block_d rows as wide as the padded bottleneck, ``stages`` of them at once."""
    block_h = max(16, 1 << (bottleneck - 1).bit_length())
    if block_h > 64:
        return GateTile(16, max(1, 256 // block_h) if num_blocks > 1 else 1, 32, 32, block_h, 4, 1)
    return GateTile(16, min(2, num_blocks), 32, 64, block_h, 4, 2)


@functools.cache
def frequency_words(num_blocks: int, frequencies: int, profile: str) -> dict[str, int]:
    """The parts' frequencies as constants for the kernels, 3 bits each (none is over 6), 16 parts a word."""
    words = {"X_LOW": 0, "X_HIGH": 0, "Y_LOW": 0, "Y_HIGH": 0}
    for part, (x, y) in enumerate(dct.frequency_pairs(num_blocks, frequencies, profile)):
        half = "LOW" if part < 16 else "HIGH"
        words[f"X_{half}"] |= x << 3 * (part % 16)
        words[f"Y_{half}"] |= y << 3 * (part % 16)
    return words

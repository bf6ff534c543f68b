"""What a safetensors file says that it holds, before anything is read or allocated for it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

LARGEST = 100_000_000  # bytes of a header, as in the library
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FLOATING, INTEGER = ("F64", "F32", "BF16", "F16"), ("I64", "I32")


class Entry(NamedTuple):
    """A tensor in such a file."""

    dtype: str  # in the file's words, as F32
    shape: list[int]


def entries(path: Path) -> dict[str, Entry]:
    """The tensors of a file, by name, from its header. The header is compared with the file's size.

    Raises:
        ValueError: it is no such file, or not a whole one; names it.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LARGEST, size - 8):
                raise ValueError("is no safetensors file, or only its beginning")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found, end = {}, 0
    for name, about in header.items() if isinstance(header, dict) else [("header", None)]:
        if name == "__metadata__":
            continue
        try:
            found[name], stop = _entry(about)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read: its header is broken at {name!r}") from error
        end = max(end, stop)
    if 8 + length + end != size:
        raise ValueError(f"{path}: cannot be read: expected {8 + length + end} bytes, got {size}")
    return found


def _entry(about: Any) -> tuple[Entry, int]:
    shape, (start, stop) = about["shape"], about["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError
    if (stop - start) * 8 != math.prod(shape) * BITS[about["dtype"]]:
        raise ValueError
    return Entry(about["dtype"], shape), stop


def check(path: Path, expected: Mapping[str, Tensor], remedy: str) -> None:
    """Compare a file's header with the tensors that a module has, by names, shapes and kinds of numbers.

    Raises:
        ValueError: they differ, or the file cannot be read; names it, and ends with ``remedy``.
    """
    try:
        found = entries(path)
        for name, tensor in expected.items():
            if name not in found:
                raise ValueError(f"{path}: expected a tensor {name!r}, and it is not there")
            dtype, shape = found[name]
            if shape != list(tensor.shape):
                raise ValueError(f"{path}: {name}: expected shape {list(tensor.shape)}, got {shape}")
            kinds = FLOATING if tensor.is_floating_point() else INTEGER
            if dtype not in kinds:
                raise ValueError(f"{path}: {name}: expected numbers of type {' or '.join(kinds)}, got {dtype}")
        if extra := sorted(set(found) - set(expected)):
            raise ValueError(f"{path}: expected no tensors but the selector's, got {', '.join(extra)}")
    except ValueError as error:
        raise ValueError(f"{error}: {remedy}") from error

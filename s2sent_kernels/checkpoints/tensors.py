"""What a safetensors file says that it holds, before anything is read or allocated for it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

LARGEST = 100_000_000  # bytes of a header, as in the library
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


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

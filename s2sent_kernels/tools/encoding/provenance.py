"""What a file of embeddings says of its origin: in a Parquet file's schema metadata, in a file beside an array, in a folder's
manifest. Programs that read the embeddings find the model there with which they compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

KEY = b"s2sent"  # of the metadata


def metadata(about: dict[str, Any] | None) -> dict[bytes, bytes]:
    """The entry of a Parquet file's metadata; none where nothing is known."""
    return {} if about is None else {KEY: json.dumps(about, sort_keys=True).encode()}


def sidecar(path: Path) -> Path:
    """The file beside an array."""
    return path.with_name(f"{path.name}.json")


def sidecar_of(about: dict[str, Any] | None, path: Path) -> bytes | None:
    """The content of the file beside the array ``path``, with the array's shape and type, by which a reader sees that both belong
    together. None for other files, and where nothing is known."""
    if about is None or path.suffix.lower() != ".npy":
        return None
    array = np.load(path, mmap_mode="r")
    return (json.dumps({**about, "shape": array.shape, "type": str(array.dtype)}, indent=1) + "\n").encode()

"""The files of a cache that is being filled, by one process or by the ranks of several: arrays, and how far each rank has come.

Ranks write rows of the same files at the same time, possibly from several machines. The files are therefore written and not
mapped into memory: a mapped file is written back in whole pages, which on a network file system would overwrite rows that another
machine has written meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import locked, write_atomically


class Unfinished:
    """The hidden folder that is renamed to ``parent / name`` once it is complete.

    Args:
        world: how many ranks fill it; None for one process without ranks.
    """

    def __init__(self, parent: Path, name: str, world: int | None = None) -> None:
        self.world = world
        self.folder = parent / (f".{name}.part" if world is None else f".{name}.part.of-{world}")
        self._lock = parent / f"{self.folder.name}.lock"

    @classmethod
    def begun_by_ranks(cls, parent: Path, name: str) -> list[Unfinished]:
        found = (path.name.rpartition("-")[2] for path in parent.glob(f".{name}.part.of-*") if path.is_dir())
        return [cls(parent, name, int(world)) for world in sorted(found)]

    @contextmanager
    def taken_by(self, rank: int) -> Iterator[None]:
        """Hold the rank.

        Raises:
            ValueError: another process holds it.
        """
        with locked(self._lock.with_name(f"{self.folder.name}.{rank}.lock"), wait=False):
            yield

    def share(self, batches: Sequence[list[int]], rank: int) -> Sequence[list[int]]:
        """The rank's batches. They are dealt out, since the first ones are the longest."""
        return batches[rank :: self.world]

    def _record(self, rank: int) -> Path:
        return self.folder / ("progress.json" if self.world is None else f"progress-{rank}.json")

    def done(self, rank: int) -> int:
        """How many of the rank's batches are on the disk."""
        record = self._record(rank)
        return json.loads(record.read_text(encoding="utf-8"))["batches"] if record.exists() else 0

    def note(self, rank: int, done: int) -> None:
        write_atomically(self._record(rank), json.dumps({"batches": done}).encode())

    def missing(self, batches: Sequence[list[int]]) -> list[str]:
        """What ranks have still to do, in words."""
        found = []
        for rank in range(self.world or 1):
            done, all_of_it = self.done(rank), len(self.share(batches, rank))
            if done < all_of_it:
                found.append(f"rank {rank} ({done} of {all_of_it} batches)")
        return found

    def finish(self, about: Mapping[str, Any], target: Path) -> None:
        write_atomically(self.folder / "about.json", (json.dumps(about, indent=1) + "\n").encode())
        os.replace(self.folder, target)
        for record in target.glob("progress*.json"):
            record.unlink()

    @contextmanager
    def arrays(self, rows: int) -> Iterator[Arrays]:
        self.folder.mkdir(exist_ok=True)
        arrays = Arrays(self.folder, self._lock, rows)
        try:
            yield arrays
        finally:
            arrays.close()


class Arrays:
    """Numpy files of ``rows`` rows in a folder, each created by whoever first has something to write to it."""

    def __init__(self, folder: Path, lock: Path, rows: int) -> None:
        self._folder, self._lock, self._rows = folder, lock, rows
        self._files: dict[str, tuple[Any, int, int]] = {}  # the open file, where its rows begin, bytes a row

    def write(self, rows: Sequence[int], values: Mapping[str, Any]) -> None:
        """Rows of each array [B, ...]."""
        for name, array in values.items():
            if name not in self._files:
                self._files[name] = self._opened(name, array)
            file, start, size = self._files[name]
            for row, value in zip(rows, array, strict=True):
                file.seek(start + row * size)
                file.write(value.tobytes())

    def flush(self) -> None:
        """Everything written is on the disk afterwards."""
        for file, _, _ in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file, _, _ in self._files.values():
            file.close()

    def _opened(self, name: str, like: Any) -> tuple[Any, int, int]:
        from numpy.lib.format import open_memmap

        path, new = self._folder / f"{name}.npy", self._folder / f"{name}.npy.new"
        with locked(self._lock, wait=True):  # other ranks wait until the file is there as a whole
            if not path.exists():
                open_memmap(new, "w+", like.dtype, (self._rows, *like.shape[1:]))
                _allocate(new)
                os.replace(new, path)
        found = open_memmap(path, "r")
        return open(path, "r+b"), found.offset, found.strides[0]


def _allocate(path: Path) -> None:
    """Reserve the file's disk space, so that a full disk is an error now and not after hours of encoding."""
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

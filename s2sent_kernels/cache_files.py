"""The files of a cache that is being filled, by one process or by the ranks of several: arrays, and how far each rank has come.
Checksums say whether they hold what was written: while the cache is filled, of the batches between two records of progress; once
it is complete, of so many rows each.

Ranks write rows of the same files at the same time, possibly from several machines. The files are therefore written and not
mapped into memory: a mapped file is written back in whole pages, which on a network file system would overwrite rows that another
machine has written meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from . import waiting
from .files import first_line, locked, sync_folder, write_atomically

ABOUT = "about.json"
ROWS_OF_A_SUM = 4096
# What a killed process leaves in the folder of a complete cache: records of progress, and files before they got their names.
_LEFTOVER = r"progress(-\d+)?\.json|\..+\.[0-9a-f]{32}|\w+\.npy\.new"


class DamagedCache(ValueError):
    """A file of a cache is not what was written. The message names the file and says what to do."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}: remove {path.parent}, and the cache is made again")


def opened(path: Path, expected: Any = None) -> Any:
    """A numpy file, mapped into memory.

    Args:
        expected: its {"dtype": ..., "shape": ...}, if they are known.

    Raises:
        DamagedCache: it cannot be opened, or is another array.
    """
    import numpy

    try:
        array = numpy.load(path, mmap_mode="r")
        if not isinstance(array, numpy.memmap):
            raise ValueError("is no array of numpy's")
    except Exception as error:  # numpy raises errors of many kinds for what is no array
        raise DamagedCache(path, f"cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from error
    size = array.offset + array.nbytes
    if path.stat().st_size != size:
        raise DamagedCache(path, f"expected {size} bytes, got {path.stat().st_size}")
    if expected is not None and (str(array.dtype), list(array.shape)) != (expected["dtype"], expected["shape"]):
        wanted = f"{expected['dtype']} {expected['shape']}"
        raise DamagedCache(path, f"expected an array of {wanted}, got {array.dtype} {list(array.shape)}")
    return array


def summary(path: Path) -> dict[str, Any]:
    """What a complete cache says of one of its arrays."""
    array = opened(path)
    return {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": sums(path, array)}


def sums(path: Path, array: Any) -> list[str]:
    """SHA-256 of each ROWS_OF_A_SUM rows, with the file's header before the first."""
    with open(path, "rb") as file:
        before = file.read(array.offset)
    found = []
    for start in range(0, len(array), ROWS_OF_A_SUM):
        found.append(hashlib.sha256(before + array[start : start + ROWS_OF_A_SUM].tobytes()).hexdigest())
        before = b""
    return found


def check_rows(path: Path, expected: Mapping[str, Any]) -> None:
    """Raises DamagedCache where the array holds other numbers than its ``summary``."""
    array, wanted = opened(path, expected), expected.get("sha256")
    found = sums(path, array)
    for number, one in enumerate(found):
        if not isinstance(wanted, list) or len(wanted) != len(found) or one != wanted[number]:
            first = number * ROWS_OF_A_SUM
            raise DamagedCache(path, f"rows {first} to {min(first + ROWS_OF_A_SUM, len(array)) - 1} are damaged")


def sweep(folder: Path) -> None:
    """Remove what a process that was killed left in a complete cache."""
    for path in folder.iterdir():
        if re.fullmatch(_LEFTOVER, path.name):
            path.unlink(missing_ok=True)


def size_of(texts: int, blocks: int, features: int, frequencies: int, pooled: bool) -> int:
    """Bytes of a cache's arrays: C [texts, blocks, frequencies, features] and, if it is stored, p [texts, blocks, features], both
    in float32, and the lengths."""
    return texts * (blocks * features * (frequencies + pooled) * 4 + 8)


def in_words(size: int) -> str:
    """Bytes as "311 MB"."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.{0 if size >= 100 * scale else 1}f} {unit}"
    return f"{size} bytes"


def announce(target: Path, shape: tuple[int, int, int, int | None], pooled: bool, found: bool) -> None:
    """The size of C [texts, blocks, frequencies, features] and what goes with it, on stderr, before anything is computed; of an
    encoder that does not tell its features nothing. Where it is ``found``, that nothing is."""
    texts, blocks, frequencies, features = shape
    if found:
        waiting.say(f"cache: all {texts:,} texts are in {target} already")
    elif features is not None:
        size = in_words(size_of(texts, blocks, features, frequencies, pooled))
        waiting.say(f"cache: {texts:,} texts x {blocks} blocks x {features} features, {size}, in {target}")


class Kept(NamedTuple):
    """A cache in a folder of caches, complete or not."""

    folder: Path
    name: str  # without what marks one that is not complete
    complete: bool
    size: int  # bytes on the disk
    about: Mapping[str, Any]  # empty where it is not complete, or cannot be read

    @property
    def texts(self) -> int | None:
        try:
            return int(self.about["arrays"]["lengths"]["shape"][0])
        except (KeyError, TypeError, IndexError, ValueError):
            return None


_NAME = r"[0-9a-f]{20}"  # a digest


def kept(parent: Path) -> list[Kept]:
    """The caches in a folder, by name; nothing else that may be there. Raises OSError where it cannot be read."""
    found = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        match = re.fullmatch(rf"({_NAME})|\.({_NAME})\.part(\.of-\d+)?", path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        size = sum(file.stat().st_blocks * 512 for file in path.iterdir() if file.is_file())
        about = {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            about = dict(json.loads((path / ABOUT).read_text(encoding="utf-8")))
        found.append(Kept(path, match[1] or match[2], match[1] is not None, size, about))
    return found


def remove(one: Kept) -> None:
    """Remove a cache and the files of its locks.

    Raises:
        ValueError: a process fills it.
    """
    parent = one.folder.parent
    locks = [path for path in parent.glob(f".{one.name}*.lock") if one.complete == (path.name == f".{one.name}.lock")]
    with contextlib.ExitStack() as held:
        for path in locks if one.complete else [*locks, parent / f".{one.name}.lock"]:
            held.enter_context(locked(path, wait=False))
        shutil.rmtree(one.folder)
        for path in locks:
            path.unlink(missing_ok=True)


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

    def recorded(self, rank: int) -> Progress:
        """How many of the rank's batches were written, by its own word."""
        record = self._record(rank)
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
            pieces = [(int(stop), str(found)) for stop, found in known["sha256"]]
            return Progress(max((stop for stop, _ in pieces), default=0), pieces, list(known["arrays"]))
        except FileNotFoundError:
            return Progress()
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{record}: the batches that it tells of are encoded again: {error}", stacklevel=2)
            return Progress()

    def done(self, batches: Sequence[list[int]], rank: int) -> Progress:
        """How many of the rank's batches are on the disk, as they were written: those before the first that is not."""
        _, pieces, names = self.recorded(rank)
        try:
            arrays = [opened(self.folder / f"{name}.npy") for name in names]
            if any(len(array) != sum(map(len, batches)) for array in arrays):
                raise ValueError("the arrays have another number of rows")
        except ValueError as error:
            warnings.warn(
                f"{self._record(rank)}: the batches that it tells of are encoded again: {error}", stacklevel=2
            )
            return Progress()
        mine, done = self.share(batches, rank), Progress(arrays=names)
        for stop, wanted in pieces:
            total = hashlib.sha256()
            for rows in mine[done.batches : stop]:
                for array in arrays:
                    total.update(array[rows].tobytes())
            if total.hexdigest() != wanted:
                what = f"batches {done.batches} to {stop - 1} of rank {rank} are damaged"
                warnings.warn(f"{self.folder}: {what}: they and those after them are encoded again", stacklevel=2)
                break
            done = Progress(stop, [*done.sha256, (stop, wanted)], names)
        return done

    def note(self, rank: int, done: Progress) -> None:
        write_atomically(self._record(rank), json.dumps(done._asdict()).encode(), sync=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def missing(self, batches: Sequence[list[int]]) -> list[str]:
        """What ranks have still to do, in words. Everything is read only if all say that they are done."""
        by_word = self._missing(batches, lambda rank: self.recorded(rank).batches)
        return by_word or self._missing(batches, lambda rank: self.done(batches, rank).batches)

    def _missing(self, batches: Sequence[list[int]], of: Callable[[int], int]) -> list[str]:
        found = []
        for rank in range(self.world or 1):
            done, all_of_it = of(rank), len(self.share(batches, rank))
            if done < all_of_it:
                found.append(f"rank {rank} ({done} of {all_of_it} batches)")
        return found

    def finish(self, about: Mapping[str, Any], target: Path, progress: bool) -> None:
        with waiting.told("computing the checksums of the cache", progress):
            arrays = {path.stem: summary(path) for path in sorted(self.folder.glob("*.npy"))}
        write_atomically(
            self.folder / ABOUT, (json.dumps({**about, "arrays": arrays}, indent=1) + "\n").encode(), sync=True
        )
        os.replace(self.folder, target)
        sync_folder(target.parent)
        sweep(target)

    @contextmanager
    def arrays(self, rows: int) -> Iterator[Arrays]:
        self.folder.mkdir(exist_ok=True)
        arrays = Arrays(self.folder, self._lock, rows)
        try:
            yield arrays
        finally:
            arrays.close()


class Progress(NamedTuple):
    """What of a rank's share is on the disk."""

    batches: int = 0
    sha256: Sequence[tuple[int, str]] = ()  # of the batches before each record, since the one before
    arrays: Sequence[str] = ()

    def after(self, batches: int, arrays: Arrays) -> Progress:
        """When all that was written into ``arrays`` is on the disk."""
        return Progress(batches, [*self.sha256, (batches, arrays.taken_sum())], arrays.names)


class Arrays:
    """Numpy files of ``rows`` rows in a folder, each created by whoever first has something to write to it."""

    def __init__(self, folder: Path, lock: Path, rows: int) -> None:
        self._folder, self._lock, self._rows = folder, lock, rows
        self._files: dict[str, tuple[Any, int, int]] = {}  # the open file, where its rows begin, bytes a row
        self._sum = hashlib.sha256()
        self.names: list[str] = []

    def taken_sum(self) -> str:
        """SHA-256 of all rows that were written since the last call, batch by batch."""
        found, self._sum = self._sum.hexdigest(), hashlib.sha256()
        return found

    def write(self, rows: Sequence[int], values: Mapping[str, Any]) -> None:
        """Rows of each array [B, ...]."""
        self.names = sorted(values)
        for name in self.names:
            array = values[name]
            if name not in self._files:
                self._files[name] = self._opened(name, array)
            file, start, size = self._files[name]
            self._sum.update(array.tobytes())
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
                sync_folder(self._folder)
        found = opened(path, {"dtype": str(like.dtype), "shape": [self._rows, *like.shape[1:]]})
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


# ---------------------------------------------------------------- shares


def rank_and_world(shard: Any) -> tuple[int, int]:
    if not isinstance(shard, tuple) or len(shard) != 2 or not all(type(number) is int for number in shard):
        raise TypeError(f"shard: expected two integers (rank, world), got {shard!r}")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard: expected (rank, world) with 0 <= rank < world, got {shard}")
    return shard


def done_by_all(by_ranks: Sequence[Unfinished], batches: Sequence[list[int]]) -> Unfinished:
    """The first whose ranks have all done their share: the last of them ended before it could complete the cache."""
    missing = {str(part.folder): part.missing(batches) for part in by_ranks}
    for part in by_ranks:
        if not missing[str(part.folder)]:
            return part
    (folder, ranks), *_ = missing.items()
    raise ValueError(
        f"shard: ranks have begun to fill {folder}, expected all to be done, still missing {', '.join(ranks)}: "
        "run these, or remove that folder"
    )

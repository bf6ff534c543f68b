"""What is kept of a part in work: the embeddings of its batches, added to a file beside the part every few seconds, so that an
interruption costs seconds whatever the part's size and the encoder's speed. A part's bytes do not depend on it: a batch is looked
up by its tokens, so what is found are the numbers that encoding the same batch again would give. A part that is finished in fewer
seconds than these never has such a file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...batches import Tokens
from .plan import Part, Plan, load

RECORD_SECONDS = 5.0  # between two additions
MOST_BYTES = 128 << 20  # of embeddings that wait to be added
MARK = b"s2sbatch"
# MARK, the plan's digest, the batch's key, then its rows, features, and the texts that begin in it. The numbers, float32, and a
# SHA-256 of all follow.
HEAD = struct.Struct("<8s32s32sIII")
SUM = hashlib.sha256().digest_size
NAME = ".{part}.{any}.begun"  # a name that run's clean-up knows as its own


class Place(NamedTuple):
    """Where the embeddings of a batch are."""

    path: Path
    offset: int
    shape: tuple[int, int]


class Begun:
    """The batches of a part in work; of one that may have been begun before.

    Args:
        path: the part's, once it is whole.
        digest: the plan's, in hexadecimal.
        recipe: all that an embedding depends on beside its text; batches of another recipe are not found.
        files: what earlier runs left of this part.
        clock: seconds.
    """

    def __init__(
        self,
        path: Path,
        digest: str,
        recipe: str,
        files: list[Path],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._digest, self._recipe, self._clock = bytes.fromhex(digest), recipe.encode(), clock
        self._files, self._own = files, path.with_name(NAME.format(part=path.name, any=uuid.uuid4().hex))
        self._known = {key: place for file in files for key, place in _read(file)}
        self._waiting: list[tuple[Tokens, np.ndarray, int, np.ndarray]] = []
        self._bytes, self._added = 0, clock()
        self.found = False  # whether the last batch that was looked for is known

    def find(self, tokens: Tokens, rows: np.ndarray, skip: int) -> np.ndarray | None:
        """The embeddings [B, D] of a batch that an earlier run encoded."""
        self.found = False
        if not self._known:
            return None
        place = self._known.get(self._key(tokens, rows, skip))
        if place is None or place.shape[0] != len(rows):
            return None
        with contextlib.suppress(OSError, ValueError), open(place.path, "rb") as file:
            file.seek(place.offset)
            values = np.frombuffer(file.read(4 * place.shape[0] * place.shape[1]), "<f4").reshape(place.shape)
            self.found = True
            return values.astype(np.float32)
        return None

    def add(self, tokens: Tokens, rows: np.ndarray, skip: int, values: np.ndarray) -> None:
        """Keep the embeddings of a batch. Raises OSError where they cannot be written."""
        self._waiting.append((tokens, rows, skip, values))
        self._bytes += values.nbytes
        if self._clock() - self._added >= RECORD_SECONDS or self._bytes > MOST_BYTES:
            self.write()

    def write(self) -> None:
        """Add what waits to the file."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if waiting:
            with open(self._own, "ab") as file:
                for tokens, rows, skip, values in waiting:
                    texts = np.count_nonzero((rows == 0) | (tokens.text[rows] != tokens.text[rows - 1]))
                    head = HEAD.pack(MARK, self._digest, self._key(tokens, rows, skip), *values.shape, texts)
                    data = np.ascontiguousarray(values, "<f4").tobytes()
                    file.write(head + data + hashlib.sha256(head + data).digest())
                file.flush()
                os.fsync(file.fileno())
        self._added = self._clock()

    def remove(self) -> None:
        """The part is whole."""
        self._waiting = []
        for path in (*self._files, self._own):
            path.unlink(missing_ok=True)

    def _key(self, tokens: Tokens, rows: np.ndarray, skip: int) -> bytes:
        """A digest of all that a batch's embeddings depend on. A call of one batch, and one whose tokens have types, may be
        computed in another way than others."""
        ids = [tokens.ids[row] for row in rows]
        types = [] if tokens.types is None else [tokens.types[row] for row in rows]
        total = hashlib.sha256(self._recipe)
        total.update(f" {len(ids) == len(tokens.ids)} {tokens.types is not None} {skip} ".encode())
        total.update(" ".join(str(len(one)) for one in ids).encode())
        total.update(b"".join(one.tobytes() for one in (*ids, *types, tokens.uncounted(skip)[rows])))
        return total.digest()


def left(folder: Path) -> dict[str, list[Path]]:
    """What earlier runs left of parts that they had begun, by the parts' names."""
    found: dict[str, list[Path]] = {}
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder)):
            if is_begun(name):
                found.setdefault(name[1:].rsplit(".", 2)[0], []).append(folder / name)
    return found


def is_begun(name: str) -> bool:
    """Whether a file has this name because it holds batches of a part in work."""
    return name.startswith(".part-") and name.endswith(".begun")


def texts(folder: Path, plan: Plan, parts: list[Part]) -> int:
    """How many texts of the plan's ``parts`` are kept although their parts are not whole."""
    there, digest, count = left(folder), bytes.fromhex(plan.digest), 0
    for part in parts:
        known: dict[bytes, int] = {}
        for file in there.get(part.name, ()):
            for head, _ in _heads(file):
                if head[1] == digest:
                    known[head[2]] = head[5]
        count += min(part.rows, sum(known.values()))
    return count


def kept(folder: Path) -> int:
    """How many texts of the run in ``folder`` are encoded, in parts that are whole and in others; 0 where no run can be read."""
    try:
        plan = load(folder)
    except (OSError, ValueError):
        return 0
    if plan is None:
        return 0
    names = set(os.listdir(folder))
    whole = sum(part.rows for part in plan.parts if part.name in names)
    return whole + texts(folder, plan, [part for part in plan.parts if part.name not in names])


def _heads(path: Path) -> Iterator[tuple[Any, bytes]]:
    """Head and numbers of each batch in a file, up to the first that is not whole: a process may have been killed there."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        while len(head := file.read(HEAD.size)) == HEAD.size:
            known = HEAD.unpack(head)
            size = 4 * known[3] * known[4]
            if known[0] != MARK or file.tell() + size > end:  # a broken head may ask for more than there is memory
                return
            data = file.read(size)
            if file.read(SUM) != hashlib.sha256(head + data).digest():
                return
            yield known, data


def _read(path: Path) -> Iterator[tuple[bytes, Place]]:
    offset = 0
    for head, data in _heads(path):
        yield head[2], Place(path, offset + HEAD.size, (head[3], head[4]))
        offset += HEAD.size + len(data) + SUM

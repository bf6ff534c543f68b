"""What there is of a run in its folder. A part is known by its content, not by its name: other programs give such names, too, and
a disk may return half a file, or another one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ...files import first_line, importing
from .plan import COPY, PLAN, Part, Plan

with importing(None, "encode"):
    import pyarrow as pa
    from pyarrow import parquet

# In a part's metadata: its plan, its number in it, how many of its texts were too long, and for how many tokens.
DIGEST, NUMBER, CUT, LIMIT = b"s2sent_plan", b"s2sent_part", b"s2sent_cut", b"s2sent_limit"
# And what tells whether a part of another plan will do: how its texts were encoded, and a checksum of its rows as they were read.
RECIPE, ROWS = b"s2sent_recipe", b"s2sent_rows"
SKIPPED = b"s2sent_skipped"  # JSON: the number of each row that could not be encoded, and why
SEAL = b"s2sent seal"  # and the SHA-256 of all other bytes: between the data and the footer, where no reader of Parquet looks
MANIFEST, FAILED, LOCK = "manifest.json", "failed.jsonl", ".lock"
JOINED = ".joined.json"  # size and time of the whole file that the parts became
PART = r"part-(\d{6}|[1-9]\d{6,})\.parquet"
NOTE = r"failed(-\d+-of-\d+)?\.jsonl"
TAIL = 8  # bytes after a Parquet file's footer
PIECE = 1 << 20  # bytes read at once
READERS, AT_ONCE = 4, 256  # threads, and parts handed to them
SHARD_OR_PLAN = r"(-plan|-\d+-of-\d+)?"
# What a run writes into a folder; with a dot and more behind it while it is written.
OURS = re.compile(
    rf"{PART}|{NOTE}|{PLAN}|{MANIFEST}|{COPY}|{JOINED}|{LOCK}{SHARD_OR_PLAN}|whole\.[\w.]+"
    rf"|\.({PART}|{PLAN}|{MANIFEST}|stdin|{JOINED}|whole\.\w+\.json)\..*"
)


def is_ours(name: str) -> bool:
    return OURS.fullmatch(name) is not None


class Found(NamedTuple):
    """A part that was read from its first byte to its last."""

    about: Any  # pyarrow's FileMetaData
    sha256: str  # of the file

    @property
    def cut(self) -> int:
        return int(self.about.metadata.get(CUT, 0))

    @property
    def limit(self) -> int | None:
        """The tokens at which texts were cut; None where the encoder does not tell."""
        found = self.about.metadata.get(LIMIT)
        return None if found is None else int(found)

    @property
    def skipped(self) -> list[tuple[int, str]]:
        """Rows whose embeddings are NaN: their numbers, and why."""
        return [(int(row), str(why)) for row, why in json.loads(self.about.metadata.get(SKIPPED, b"[]"))]


def read(folder: Path, part: Part, digest: str) -> Found:
    """The part, of which every byte is checked.

    Raises:
        ValueError: it cannot be read, is damaged, or is not this part of the plan ``digest``.
    """
    path = folder / part.name
    try:
        whole = _checked(path)
        about = parquet.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read: {first_line(error)}: run the command again") from error
    known = about.metadata or {}
    if known.get(DIGEST) != digest.encode():
        raise ValueError(f"{path}: is of another plan: run the command again")
    if known.get(NUMBER) != str(part.number).encode():
        number = known.get(NUMBER, b"none").decode(errors="replace")
        raise ValueError(f"{path}: expected part {part.number}, got {number}: run the command again")
    if about.num_rows != part.rows:
        raise ValueError(f"{path}: expected {part.rows} rows, got {about.num_rows}: run the command again")
    return Found(about, whole)


def footer_length(end: bytes) -> int:
    """Of a Parquet file that ends in ``end``: the bytes from the footer to the file's end."""
    return int.from_bytes(end[-TAIL:-4], "little") + TAIL


def _checked(path: Path) -> str:
    """The SHA-256 of a file whose bytes are those that were sealed. OSError, ValueError where they are not."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        left = size - footer_length(file.read()) - len(SEAL) - total.digest_size
        file.seek(0)
        while left > 0 and (piece := file.read(min(left, PIECE))):
            total.update(piece)
            left -= len(piece)
        whole = total.copy()
        sealed, footer = (file.read(len(SEAL) + total.digest_size), file.read()) if left == 0 else (b"", b"")
    total.update(footer)
    whole.update(sealed + footer)
    if sealed != SEAL + total.digest():
        raise ValueError(f"{path}: is damaged, its checksum is that of other bytes: run the command again")
    return whole.hexdigest()


def is_there(folder: Path, part: Part, digest: str, skip: bool = False) -> bool:
    """Whether the part need not be encoded. Rows that could not be are tried again, unless they are to be skipped."""
    try:
        found = read(folder, part, digest)
        return skip or not found.skipped
    except ValueError:
        return False


def is_of_another(folder: Path, part: Part, digest: str) -> bool:
    """Whether the file of this part names another plan than ``digest``."""
    try:
        known = parquet.read_metadata(folder / part.name).metadata or {}
    except (OSError, pa.ArrowException):
        return False
    return known.get(DIGEST, digest.encode()) != digest.encode()


def each(function: Any, parts: Sequence[Part]) -> Iterator[Any]:
    """``function`` of each of the parts, in order; of a few at once, since reading waits for a disk."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(parts), AT_ONCE):  # a run may have a million
            yield from pool.map(function, parts[start : start + AT_ONCE])


def check_extra(folder: Path, plan: Plan) -> None:
    """ValueError if there is a part that is not the plan's: whoever reads all parts would take it for one."""
    planned = {part.name for part in plan.parts}
    extra = [path.name for path in folder.iterdir() if re.fullmatch(PART, path.name) and path.name not in planned]
    if extra:
        raise ValueError(
            f"{folder / min(extra)}: expected {len(planned)} parts, of which this is none: remove it, or --force"
        )


def of_plan(folder: Path, digest: str) -> list[str]:
    """The files that call themselves parts of the plan ``digest``."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError, pa.ArrowException):
            if re.fullmatch(PART, path.name):
                known = parquet.read_metadata(path).metadata or {}
                found += [path.name] if known.get(DIGEST) == digest.encode() else []
    return found


def strangers(folder: Path) -> list[str]:
    """The visible files in a ``folder`` without a plan that no run wrote, as far as can be told. Names are believed only if there
    are parts, and each has a plan's name in its footer."""
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    parts = [path for path in visible if re.fullmatch(r"part-.*\.parquet", path.name)]
    known = bool(parts) and all(map(_has_a_plan, parts))
    return sorted(path.name for path in visible if not (known and is_ours(path.name)))


def _has_a_plan(path: Path) -> bool:
    try:
        return DIGEST in (parquet.read_metadata(path).metadata or {})
    except (OSError, pa.ArrowException):
        return False

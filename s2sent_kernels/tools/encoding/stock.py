"""What there is of a run in its folder. A part is known by its footer, not by its name: other programs give such names, too, and
a disk may return half a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...files import first_line, importing
from .plan import COPY, PLAN, Part

with importing(None, "encode"):
    import pyarrow as pa
    from pyarrow import parquet

DIGEST = b"s2sent_plan"  # in a part's metadata: its plan
MANIFEST, LOCK = "manifest.json", ".lock"
JOINED = ".joined.json"  # size and time of the whole file that the parts became
PART = r"part-(\d{6}|[1-9]\d{6,})\.parquet"
NOTE = r"failed(-\d+-of-\d+)?\.jsonl"
SHARD_OR_PLAN = r"(-plan|-\d+-of-\d+)?"
# What a run writes into a folder; with a dot and more behind it while it is written.
OURS = re.compile(
    rf"{PART}|{NOTE}|{PLAN}|{MANIFEST}|{COPY}|{JOINED}|{LOCK}{SHARD_OR_PLAN}|whole\.\w+"
    rf"|\.({PART}|{PLAN}|{MANIFEST}|stdin|{JOINED})\..*"
)


def is_ours(name: str) -> bool:
    return OURS.fullmatch(name) is not None


def footer(folder: Path, part: Part, digest: str) -> Any:
    """The part's metadata, as pyarrow's FileMetaData.

    Raises:
        ValueError: it cannot be read, or is not the part of the plan ``digest``.
    """
    path = folder / part.name
    try:
        about = parquet.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read: {first_line(error)}: run the command again") from error
    if (about.metadata or {}).get(DIGEST) != digest.encode():
        raise ValueError(f"{path}: is of another plan: run the command again")
    if about.num_rows != part.rows:
        raise ValueError(f"{path}: expected {part.rows} rows, got {about.num_rows}: run the command again")
    return about


def is_there(folder: Path, part: Part, digest: str) -> bool:
    """Whether the part need not be encoded."""
    try:
        footer(folder, part, digest)
    except ValueError:
        return False
    return True


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

"""What a run has written, read again: a file of embeddings, or a finished folder of parts, in constant memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from ...files import first_line, importing
from .begin import hidden
from .join import OUTPUTS
from .plan import PLAN
from .provenance import KEY, sidecar
from .stock import MANIFEST, PART

with importing(None, "encode"):
    import pyarrow as pa
    from pyarrow import parquet

WANTED = "what encode wrote, a file of .parquet or .npy or a finished folder of parts"
ROWS = 16384  # of a block
FLOATS = ("float16", "float32", "float64")  # numbers that can be compared with those of a query


class Item(NamedTuple):
    """A row beside its embedding."""

    id: Any
    text: str | None  # None where texts were not kept


class Stored(Protocol):
    """
    Attributes:
        about: what the run recorded (provenance.py); None if nothing.
        rows, size: embeddings, and features of one.
    """

    about: Any
    rows: int
    size: int

    def blocks(self) -> Iterator[np.ndarray]:
        """[n, D] float32, in order, ROWS rows at most."""
        ...

    def items(self, rows: Sequence[int]) -> dict[int, Item]:
        """By the rows' numbers."""
        ...


def open_stored(path: str) -> Stored:
    """The embeddings of a .parquet, a .npy or a folder that ``s2sent encode`` wrote.

    Raises:
        ValueError: it cannot be read, or holds no embeddings that can be compared with those of a query; names the file.
    """
    place = Path(path)
    try:
        if place.is_dir():
            return _folder(place)
    except OSError as error:  # what is in it cannot be seen
        raise ValueError(f"{path}: cannot be read: {error.strerror or first_line(error)}") from error
    if not place.is_file():
        begun = place.name and hidden(place).is_dir()
        hint = ", but the work of an `s2sent encode` that was to write it: the same command goes on" if begun else ""
        raise ValueError(f"{path}: there is no such file or folder{hint}")
    if place.suffix.lower() == ".npy":
        return _Array(place)
    if place.suffix.lower() == ".parquet":
        return _Tables([place])
    raise ValueError(f"{path}: expected {WANTED}, got a file of suffix {place.suffix!r}")


def _folder(folder: Path) -> Stored:
    if not (folder / MANIFEST).is_file() and not (folder / PLAN).is_file():
        raise ValueError(f"{folder}: expected {WANTED}, got {_kind(folder)}")
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder}: expected a finished folder of parts, got one without {MANIFEST}: the command that writes it finishes it"
        )
    manifest = _json(folder / MANIFEST)
    try:
        names = [(str(part["file"]), int(part["rows"])) for part in manifest["parts"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / MANIFEST}: cannot be read: it lists no parts") from error
    wrong = [name for name, _ in names if not re.fullmatch(PART, name)]  # a name may not lead out of the folder
    if wrong or not names:
        raise ValueError(f"{folder / MANIFEST}: expected names of parts, got {wrong[0] if wrong else 'none'}")
    found = _Tables([folder / name for name, _ in names])
    for one, (_, rows) in zip(found.tables, names, strict=True):
        if one.rows != rows:
            raise ValueError(f"{one.path}: expected {rows} rows, as {MANIFEST} says, got {one.rows}")
    return found


def _kind(folder: Path) -> str:
    """What there is where a folder of parts was expected."""
    names = sorted(os.listdir(folder))
    files = [name for name in names if Path(name).suffix.lower() in OUTPUTS and not name.startswith(".")]
    if "config.json" in names or "modules.json" in names:
        what = "the folder of a model or selector"
    else:
        what = "an empty folder" if not names else f"a folder without {MANIFEST}"
    return what + (f": name the file in it, as {folder / files[0]}" if files else "")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def _check_type(path: Path, name: str, about: Any) -> None:
    if name not in FLOATS:
        options = about.get("options") if isinstance(about, dict) else None
        recorded = options.get("precision") if isinstance(options, dict) else None  # binary is stored as int8
        name = name if recorded in (None, name) else f"{recorded}, stored as {name}"
        raise ValueError(
            f"{path}: expected embeddings of {', '.join(FLOATS)}, got {name}, which a query's cannot be compared with: "
            "encode with --precision float32, and --output-dtype float16 for less space"
        )


class _Array:
    """A .npy; a row's number is its id."""

    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                if file.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:  # numpy would advise to unpickle it
                    raise ValueError("it is no array of numpy's, although its suffix is .npy")
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise ValueError(f"{path}: cannot be read: {reason}") from error
        if array.ndim != 2 or not array.size:
            raise ValueError(f"{path}: expected embeddings [rows, D], got an array {list(array.shape)}")
        beside = sidecar(path)
        self.about = _json(beside) if beside.is_file() else None
        _check_type(path, str(array.dtype), self.about)
        if not array.flags.c_contiguous:
            raise ValueError(f"{path}: expected an array row by row, got one column by column (Fortran's order)")
        self._path, self._type, self._offset, (self.rows, self.size) = path, array.dtype, array.offset, array.shape
        if self.about is not None and self.about.get("shape") != [self.rows, self.size]:
            raise ValueError(
                f"{beside}: expected the shape of {path.name}, {[self.rows, self.size]}, got {self.about.get('shape')}: "
                "it tells of another array"
            )

    def blocks(self) -> Iterator[np.ndarray]:
        for start in range(0, self.rows, ROWS):
            # Read, not mapped: pages of a mapped file count as this process's memory until the system takes them back.
            count, place = min(ROWS, self.rows - start) * self.size, start * self.size * self._type.itemsize
            values = np.fromfile(self._path, self._type, count, offset=self._offset + place)
            yield values.reshape(-1, self.size).astype(np.float32)

    def items(self, rows: Sequence[int]) -> dict[int, Item]:
        return {row: Item(row, None) for row in rows}


class _Table:
    """One Parquet file, as its footer describes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.file() as file:
            schema, self.rows = file.schema_arrow, file.metadata.num_rows
            self.about = self._about(schema)
            if "embedding" not in schema.names:
                raise ValueError(
                    f"{path}: expected a column embedding, as encode writes, got {', '.join(schema.names)}"
                )
            kind = schema.field("embedding").type
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
                raise ValueError(f"{path}: expected a column embedding of lists, got {kind}")
            name = str(kind.value_type)
            known = {"halffloat": "float16", "float": "float32", "double": "float64"}
            _check_type(path, known.get(name, name), self.about)
            self.columns = [name for name in ("id", "text") if name in schema.names]
            if not self.rows:
                raise ValueError(f"{path}: expected embeddings, got an empty file")
            self.size = kind.list_size if pa.types.is_fixed_size_list(kind) else self._size(file)

    def _about(self, schema: Any) -> Any:
        about = (schema.metadata or {}).get(KEY)
        try:
            return None if about is None else json.loads(about)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: its metadata {KEY.decode()} cannot be read: {first_line(error)}") from error

    @staticmethod
    def _size(file: Any) -> int:
        return len(next(file.iter_batches(1, columns=["embedding"]))["embedding"][0] or ())

    def file(self) -> Any:
        try:
            return parquet.ParquetFile(self.path)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.path}: cannot be read: {first_line(error)}") from error

    def blocks(self) -> Iterator[np.ndarray]:
        with self.file() as file:
            try:
                for batch in file.iter_batches(ROWS, columns=["embedding"]):
                    column = batch["embedding"]
                    if column.null_count:
                        raise ValueError(
                            f"{self.path}: expected an embedding in each row, got {column.null_count} nulls"
                        )
                    column = column.cast(pa.list_(column.type.value_type, self.size))
                    values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), self.size)
                    yield values.astype(np.float32)
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{self.path}: cannot be read: {first_line(error)}") from error

    def items(self, rows: Sequence[int], first: int) -> dict[int, Item]:
        """``first``: the number of its first row; ``rows`` counts from there, too."""
        found, start = {}, first
        with self.file() as file:
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                here = [row for row in rows if start <= row < stop]
                if here:
                    table = file.read_row_group(group, self.columns).take([row - start for row in here])
                    ids = table["id"].to_pylist() if "id" in self.columns else here
                    texts = table["text"].to_pylist() if "text" in self.columns else [None] * len(here)
                    found.update({row: Item(*one) for row, *one in zip(here, ids, texts, strict=True)})
                start = stop
        return found


class _Tables:
    """Parquet files, one after the other."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.tables = [_Table(path) for path in paths]
        first = self.tables[0]
        for other in self.tables:
            if other.size != first.size:
                raise ValueError(
                    f"{other.path}: expected {first.size} features, as in {first.path.name}, got {other.size}"
                )
            if other.about != first.about:
                raise ValueError(f"{other.path}: expected embeddings of the model of {first.path.name}, got another's")
        self.about, self.size = first.about, first.size
        self.rows = sum(table.rows for table in self.tables)

    def blocks(self) -> Iterator[np.ndarray]:
        for table in self.tables:
            yield from table.blocks()

    def items(self, rows: Sequence[int]) -> dict[int, Item]:
        found: dict[int, Item] = {}
        start = 0
        for table in self.tables:
            here = [row for row in rows if start <= row < start + table.rows]
            if here:
                found |= table.items(here, start)
            start += table.rows
        return found

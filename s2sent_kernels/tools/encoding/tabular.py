"""CSV, TSV, Parquet and Arrow: rows in record batches, read by pyarrow in constant memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...files import TO_UTF8, first_line, importing
from .. import tables
from .rows import BLOCK, Block, Columns, DataError, Mark, Survey, numbered, remedy, storable
from .sources import PIECE, Source

with importing(None, "encode"):
    import pyarrow as pa
    from pyarrow import compute, csv, ipc, parquet

MAGIC = b"ARROW1"  # with which an Arrow file begins, and no Arrow stream
CSV_BLOCK = 16 << 20  # bytes; a row must fit


class Tabular(NamedTuple):
    """A ``rows.Format``."""

    source: Source
    columns: Columns

    def survey(self, every: int) -> Survey:
        with self._told():
            rows, schema = OPENERS[self.source.kind](self)
            return Survey(rows, self._check(schema), numbered(rows, every))

    def blocks(self, start: Mark) -> Iterator[Block]:
        with self._told():
            number = start.row
            for batch in READERS[self.source.kind](self, start.row):
                for place in range(0, len(batch), BLOCK):
                    some = batch.slice(place, BLOCK)
                    yield Block(range(number + 1, number + 1 + len(some)), some)
                    number += len(some)

    def decode(self, block: Block) -> tuple[list[str], Any]:
        column, batch = self.columns.text, block.content
        texts = _texts(_field(batch, column))
        for place, text in enumerate(texts):
            if isinstance(text, str):
                continue
            name, number = self.source.name, block.numbers[place]
            ids = self.columns.id
            identity = None if ids in (None, column) else _field(batch, ids)[place].as_py()
            if isinstance(text, bytes):
                byte = _bad_byte(text)
                raise DataError(
                    f"{name}: row {number} is not UTF-8 (byte 0x{byte:02x}): {TO_UTF8}", name, number, identity
                )
            raise DataError(
                f"{name}: row {number}: {column}: expected a text, got {tables.shown(text)}", name, number, identity
            )
        if self.columns.id is None:
            return texts, None
        if self.columns.id == column and self.source.kind in ("csv", "tsv"):
            return texts, pa.array(texts)  # the batch has their bytes
        ids = _field(batch, self.columns.id)
        return texts, ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids

    def check_nulls(self) -> None:
        """DataError where the footer of a Parquet file counts nulls among the texts."""
        if self.source.kind != "parquet":
            return
        with self._told(), self.seekable() as stream, parquet.ParquetFile(stream) as file:
            name, first = self.source.name, 0
            at = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)].index(
                self.columns.text
            )
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                counted = about.column(at).statistics
                if counted is not None and counted.has_null_count and counted.null_count:
                    for batch in file.iter_batches(BLOCK, row_groups=[group], columns=[self.columns.text]):
                        column = _field(batch, self.columns.text)
                        if column.null_count:
                            row = first + compute.index(column.is_null(), True).as_py() + 1
                            message = f"{name}: row {row}: {self.columns.text}: expected a text, got null"
                            raise DataError(message, name, row)
                        first += len(batch)
                else:
                    first += about.num_rows

    @property
    def wanted(self) -> list[str]:
        return list(dict.fromkeys(name for name in self.columns if name is not None))

    def _check(self, schema: Any) -> Any:
        """The ids' type, None without an id column. Raises ValueError if a column is missing, twice there or of a type that
        does not fit."""
        name, kind = self.source.name, _type(schema, self.columns.text)
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not _is_text(kind):
            raise ValueError(f"{name}: {self.columns.text}: expected texts, got {kind}")
        if self.columns.id is None:
            return None
        return storable(f"{name}: {self.columns.id}", _type(schema, self.columns.id))

    def find(self, schema: Any) -> list[str]:
        """The wanted columns. Raises ValueError if one is missing, or there twice."""
        names = schema if isinstance(schema, list) else schema.names
        missing = [name for name in self.wanted if name not in names and not _is_nested(schema, name)]
        if missing:
            raise ValueError(
                f"{self.source.name}: expected a column {' and '.join(missing)}, got {', '.join(map(str, names))}: "
                f"{remedy(self.columns, missing)}"
            )
        tables.unique(self.source.name, [name for name in names if name in self.wanted])
        return self.wanted

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns errors of pyarrow and of the system into a DataError that names the file."""
        name = self.source.name
        try:
            yield
        except DataError:
            raise
        except (OSError, pa.ArrowException) as error:
            if str(error).startswith(f"{name}: "):  # pyarrow's errors are ValueErrors, too
                raise
            number = getattr(error, "errno", None)  # of the system's, whose words pyarrow wraps in its own
            reason = first_line(error).rstrip(":") if number is None else os.strerror(number)
            raise DataError(f"{name}: cannot be read: {reason}", name) from error

    @contextlib.contextmanager
    def seekable(self) -> Iterator[Any]:
        """The file for formats with an index at the end; a compressed one is unpacked into a temporary file first."""
        if self.source.compression is None:
            # Mapped, an Arrow file's batches are counted without reading them.
            with (pa.memory_map if self.source.kind == "arrow" else pa.OSFile)(self.source.path, "r") as file:
                yield file
            return
        with tempfile.TemporaryFile() as copy:
            with self.source.stream() as stream:
                shutil.copyfileobj(stream, copy, PIECE)
            copy.seek(0)
            yield pa.PythonFile(copy, "r")


def _tops(names: list[str], wanted: list[str]) -> list[str]:
    """The columns that hold what is wanted: "doc" for the field "doc.text", unless a column has that name."""
    return list(dict.fromkeys(name if name in names else name.partition(".")[0] for name in wanted))


def _is_nested(schema: Any, name: str) -> bool:
    """Whether a dotted name leads to a field within structs."""
    if isinstance(schema, list) or "." not in name:
        return False
    try:
        _type(schema, name)
    except KeyError:
        return False
    return True


def _type(schema: Any, name: str) -> Any:
    """Of a column, or of a field within it. KeyError where there is none."""
    if name in schema.names:
        return schema.field(name).type
    first, *rest = name.split(".")
    kind = schema.field(first).type
    for part in rest:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            raise KeyError(name)
        kind = kind.field(part).type
    return kind


def _field(batch: Any, name: Any) -> Any:
    """A column, or a field within one, null where the struct is."""
    if name in batch.schema.names:
        return batch.column(name)
    first, *rest = name.split(".")
    column = batch.column(first)
    for part in rest:
        column = compute.struct_field(column, part)
    return column


def _is_text(kind: Any) -> bool:
    binary = pa.types.is_binary(kind)  # as CSV is read
    return binary or pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _texts(column: Any) -> list[Any]:
    """The values as strings; bytes where they are not UTF-8, which pyarrow does not check."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_binary(column.type):
        values = column.to_pylist()
    else:
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            values = column.cast(pa.large_binary()).to_pylist()
    return [_decoded(value) for value in values]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _bad_byte(value: bytes) -> int:
    try:
        value.decode()
    except UnicodeDecodeError as error:
        return value[error.start]
    raise AssertionError


# ---------------------------------------------------------------- Parquet


def _open_parquet(table: Tabular) -> tuple[int, Any]:
    with table.seekable() as stream, parquet.ParquetFile(stream) as file:
        table.find(file.schema_arrow)
        return file.metadata.num_rows, file.schema_arrow


def _read_parquet(table: Tabular, start: int) -> Iterator[Any]:
    with table.seekable() as stream, parquet.ParquetFile(stream) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        first = 0
        while first < len(sizes) and start >= sizes[first]:  # whole row groups are not read at all
            start -= sizes[first]
            first += 1
        batches = file.iter_batches(BLOCK, row_groups=list(range(first, len(sizes))), columns=table.wanted)
        yield from _without(batches, start)


def _without(batches: Any, rows: int) -> Iterator[Any]:
    """The batches but for so many rows at the beginning."""
    for batch in batches:
        left = min(rows, len(batch))
        rows -= left
        if left < len(batch):
            yield batch.slice(left)


# ---------------------------------------------------------------- Arrow


@contextlib.contextmanager
def _arrow(table: Tabular) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The schema, and the record batches of an Arrow file or an Arrow stream."""
    with table.seekable() as stream:
        magic = stream.read(len(MAGIC))
        stream.seek(0)
        if magic == MAGIC:
            with ipc.open_file(stream) as file:
                yield file.schema, map(file.get_batch, range(file.num_record_batches))
        else:
            with ipc.open_stream(stream) as batches:
                yield batches.schema, iter(batches)


def _open_arrow(table: Tabular) -> tuple[int, Any]:
    with _arrow(table) as (schema, batches):
        table.find(schema)
        return sum(map(len, batches)), schema


def _read_arrow(table: Tabular, start: int) -> Iterator[Any]:
    with _arrow(table) as (_, batches):
        yield from (batch.select(_tops(batch.schema.names, table.wanted)) for batch in _without(batches, start))


# ---------------------------------------------------------------- CSV and TSV


@contextlib.contextmanager
def _csv(table: Tabular, wanted: list[str] | None, behind: bytes = b"") -> Iterator[Any]:
    """All columns are read as what they are in the file, text: an id 007 stays 007. The texts' bytes are decoded by ``decode``,
    which names the row of one that is not UTF-8. ``behind`` is read after the file's end."""
    tabs = table.source.kind == "tsv"  # without quoting, as everywhere in this package
    types = {name: pa.string() for name in table.wanted} | {table.columns.text: pa.binary()}
    with table.source.stream() as stream:
        yield csv.open_csv(
            pa.PythonFile(_Followed(stream, behind), "r") if behind else stream,
            csv.ReadOptions(block_size=CSV_BLOCK),
            csv.ParseOptions(delimiter="\t", quote_char=False) if tabs else csv.ParseOptions(newlines_in_values=True),
            csv.ConvertOptions(column_types=types, include_columns=wanted, strings_can_be_null=False),
        )


def _open_csv(table: Tabular) -> tuple[int, Any]:
    try:
        with _csv(table, None) as reader:
            names = reader.schema.names
    except pa.ArrowInvalid as error:
        if "Empty CSV file" in str(error):
            return 0, pa.schema([(name, pa.string()) for name in table.wanted])
        raise
    wanted = table.find(names)
    place = wanted.index(table.columns.text)
    schema = pa.schema([(name, pa.string()) for name in wanted])  # of the texts, too, once they are decoded
    if table.source.kind == "tsv":
        with _csv(table, wanted) as reader:
            return sum(map(len, reader)), schema
    # The parser takes a quote that is never closed for a text up to the file's end. It would swallow this row, too.
    mark = uuid.uuid4().hex.encode()
    rows, last = 0, None
    with _csv(table, wanted, b"\n" + b",".join([mark] * len(names)) + b"\n") as reader:
        for batch in reader:
            if len(batch):
                rows, last = rows + len(batch), batch.column(place)[-1].as_py()
    if last != mark:
        raise ValueError(f"{table.source.name}: row {rows}: a quote is opened and not closed before the file's end")
    return rows - 1, schema


class _Followed:
    """A stream, and a few bytes behind it."""

    closed = False

    def __init__(self, stream: Any, behind: bytes) -> None:
        self.stream, self.behind = stream, behind

    def read(self, size: int) -> bytes:
        if piece := self.stream.read(size):
            return piece
        rest, self.behind = self.behind, b""
        return rest

    def close(self) -> None:
        """The stream is closed by its owner."""


def _read_csv(table: Tabular, start: int) -> Iterator[Any]:
    with _csv(table, table.wanted) as reader:
        yield from _without(reader, start)


OPENERS = {"parquet": _open_parquet, "arrow": _open_arrow, "csv": _open_csv, "tsv": _open_csv}
READERS = {"parquet": _read_parquet, "arrow": _read_arrow, "csv": _read_csv, "tsv": _read_csv}

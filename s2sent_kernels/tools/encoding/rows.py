"""The nouns of reading: which columns, where a reader can begin, what is in a file, a block of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from ...files import first_line, importing
from .sources import Source

with importing(None, "encode"):
    import pyarrow as pa
    from pyarrow import parquet

BLOCK = 1024  # rows that a reader holds undecoded


class Columns(NamedTuple):
    text: str
    id: str | None  # None: an id is the row's number over all inputs


class Mark(NamedTuple):
    """A place in a file at which reading can begin."""

    row: int  # the rows before it
    offset: int  # the bytes before it; 0 where the format has no use for them
    line: int  # the lines before it; 0 likewise


class Survey(NamedTuple):
    """What is known of a file before anything is encoded."""

    rows: int
    id_type: Any  # pyarrow's type; None without an id column
    marks: list[Mark]  # one before every so many rows


class Block(NamedTuple):
    """Consecutive rows, not decoded."""

    numbers: Sequence[int]  # of their lines or rows, counted from 1, for messages
    content: Any  # list of bytes, or pyarrow's RecordBatch

    def cut(self, start: int, stop: int) -> Block:
        content = self.content
        rows = content[start:stop] if isinstance(content, list) else content.slice(start, stop - start)
        return Block(self.numbers[start:stop], rows)


class Format(Protocol):
    """How the files of a kind are read."""

    @property
    def source(self) -> Source: ...

    def survey(self, every: int) -> Survey:
        """Raises ValueError if the file cannot be read, or lacks a column, or holds ids that cannot be written."""
        ...

    def blocks(self, start: Mark) -> Iterator[Block]:
        """The rows from ``start`` to the file's end. Raises DataError if the file cannot be read on."""
        ...

    def decode(self, block: Block) -> tuple[list[str], Any]:
        """Texts, and ids as a list or pyarrow's array; without an id column None. Raises DataError if a row has no text."""
        ...


class DataError(ValueError):
    """An input is broken at a place; the message names both."""

    def __init__(self, message: str, file: str, row: int | None = None, identity: Any = None) -> None:
        super().__init__(message)
        self.file, self.row = file, row  # the row or line, counted from 1; None if it is not known
        self.identity = identity  # the row's id, where it can be read


def remedy(columns: Columns, missing: Sequence[str]) -> str:
    """What names a column that is missing, in the words of the command."""
    option, what = ("--column", "texts") if columns.text in missing else ("--id-column", "ids")
    return f"{option} NAME says which one holds the {what}"


def numbered(rows: int, every: int) -> list[Mark]:
    """Marks of a format that finds its rows by their numbers."""
    return [Mark(row, 0, 0) for row in range(0, rows, every)]


def storable(place: str, kind: Any) -> Any:
    """The type in which ids of the type ``kind`` are written: the same, but for a dictionary that of its values.

    Raises:
        ValueError: Parquet cannot hold it. Starts with ``place``.
    """
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    schema = pa.schema([("id", kind)])
    sink = pa.BufferOutputStream()
    try:
        parquet.write_table(schema.empty_table(), sink)
        found = parquet.read_schema(pa.BufferReader(sink.getvalue())).field("id").type
    except pa.ArrowException as error:
        raise ValueError(f"{place}: ids of type {kind} cannot be written: {first_line(error)}") from error
    if found != kind:
        raise ValueError(f"{place}: ids of type {kind} cannot be written: they would be read back as {found}")
    return kind


def one_type(known: Any, kind: Any, place: str) -> Any:
    """The type of ids of which some have the type ``known`` and some the type ``kind``.

    Raises:
        ValueError: there is none. Names ``place``.
    """
    if known is None or known == kind or pa.types.is_null(known):
        return kind
    if pa.types.is_null(kind):
        return known
    raise ValueError(f"{place}: ids: expected values of one type, got {known} before and {kind} there")

"""Reads ranges of rows, each file at most once if they are asked for in ascending order, and all rows of some files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .. import tables
from ..tables import STDIN
from .lines import Lines
from .rows import Block, Columns, DataError, Format, Mark
from .sources import Source, source
from .tabular import Tabular


class Row(NamedTuple):
    id: Any
    text: str


class Rows(NamedTuple):
    """Consecutive rows."""

    texts: list[str | None]  # None: a row that is passed over, since it has no text
    ids: list[Any] | None  # lists or pyarrow's arrays, one each block; None without an id column
    numbers: list[int]  # of their lines or rows, counted from 1
    errors: list[tuple[int, str]]  # the number of each row that is passed over, and why


def format_of(source: Source, columns: Columns) -> Format:
    """Who reads ``source``."""
    return (Lines if source.unit == "line" else Tabular)(source, columns)


class Reader:
    """Rows of files. In a file without an index it goes on where it stopped. With ``skip`` it passes over rows without a text."""

    def __init__(self, columns: Columns, skip: bool = False) -> None:
        self.columns, self._skips = columns, skip
        self._format: Format | None = None
        self._blocks: Iterator[Block] = iter(())
        self._rest = Block([], [])  # read, and not given out
        self._next = 0  # the row that comes next

    def rows(self, source: Source, start: Mark, stop: int, most: int) -> Iterator[Rows]:
        """The rows from ``start`` to ``stop``, at most ``most`` at a time.

        Raises:
            DataError: a row cannot be read, or is no text.
        """
        where = format_of(source, self.columns)
        on = where == self._format and (
            start.row == self._next or (start.row > self._next and not where.source.indexed)
        )
        if not on:
            self._format, self._blocks, self._rest, self._next = where, where.blocks(start), Block([], []), start.row
        try:
            self._skip(start.row)
            while self._next < stop:
                texts: list[str | None] = []
                ids: list[Any] = []
                numbers: list[int] = []
                errors: list[tuple[int, str]] = []
                for block in self._take(min(most, stop - self._next)):
                    some, identities = self._decoded(where, block, errors)
                    texts += some
                    ids.append(identities)
                    numbers += block.numbers
                yield Rows(texts, None if self.columns.id is None else ids, numbers, errors)
        except BaseException:
            self._format = None  # a broken file is opened anew by the next call
            raise

    def _decoded(self, where: Format, block: Block, errors: list[tuple[int, str]]) -> tuple[Sequence[str | None], Any]:
        """As ``Format.decode``. Rows without a text are None, and are added to ``errors``, if this reader passes them over."""
        try:
            return where.decode(block)
        except DataError as error:
            if not self._skips or error.row is None:
                raise
        texts: list[str | None] = []
        ids: list[Any] = []
        for place in range(len(block.numbers)):
            try:
                some, identities = where.decode(block.cut(place, place + 1))
                texts += some
                ids += (
                    [None]
                    if identities is None
                    else identities
                    if isinstance(identities, list)
                    else identities.to_pylist()
                )
            except DataError as error:
                texts.append(None)
                ids.append(error.identity)
                errors.append((block.numbers[place], str(error)))
        return texts, ids

    def _skip(self, row: int) -> None:
        for _ in self._take(row - self._next):
            pass

    def _take(self, count: int) -> Iterator[Block]:
        while count:
            if not len(self._rest.numbers):
                self._rest = self._more()
            size = min(count, len(self._rest.numbers))
            some, self._rest = self._rest.cut(0, size), self._rest.cut(size, len(self._rest.numbers))
            self._next += size
            count -= size
            yield some

    def _more(self) -> Block:
        for block in self._blocks:
            return block
        assert self._format is not None
        name = self._format.source.name
        raise DataError(f"{name}: expected more than {self._next} rows: it has changed since the run began", name)


def read_texts(paths: Sequence[str], column: str = "text", id_column: str | None = None) -> Iterator[Row]:
    """The texts of files, in order: all lines of a text file or of standard input ("-"), or a column of the other kinds of
    ``sources.KINDS``. An id is the row's number, counted over all files, or the value in another column.

    Raises:
        ValueError: a file has another suffix, cannot be read, is broken, empty or not UTF-8, lacks a column, or holds a value
            that is no text; names the file and the line or row.
    """
    number = 0
    for path in paths:
        before = number
        for text, identity in _rows(path, Columns(column, id_column)):
            yield Row(number if id_column is None else identity, text)
            number += 1
        if number == before:
            raise ValueError(f"{path}: expected texts, got an empty file")


def _rows(path: str, columns: Columns) -> Iterator[tuple[str, Any]]:
    if path == STDIN:
        for number, line in tables.read_lines(path, keep_empty=True):
            yield tables.text(f"{path}: line {number}", line), None
        return
    where = format_of(source(path), columns)
    where.survey(1 << 40)
    if isinstance(where, Lines):
        where.check_columns()
    for block in where.blocks(Mark(0, 0, 0)):
        texts, ids = where.decode(block)
        if ids is None:
            ids = [None] * len(texts)
        yield from zip(texts, ids if isinstance(ids, list) else ids.to_pylist(), strict=True)

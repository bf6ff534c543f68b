"""Text and JSONL: a row is a line, found without decoding it, so that reading can begin at any."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...files import first_line, importing
from .. import tables
from ..columns import field
from .rows import BLOCK, Block, Columns, DataError, Mark, Survey, one_type, remedy, storable
from .sources import Source

with importing(None, "encode"):
    import pyarrow as pa

BOM = b"\xef\xbb\xbf"


class NoColumn(ValueError):
    """A row lacks a column. ``missing`` says so without the remedy for a file of which all rows do."""

    def __init__(self, missing: str, remedy: str) -> None:
        super().__init__(f"{missing}: {remedy}")
        self.missing = missing


class Lines(NamedTuple):
    """A ``rows.Format``."""

    source: Source
    columns: Columns

    def survey(self, every: int) -> Survey:
        """Also parses all of JSONL if it has an id column: nothing less tells the ids' type. What cannot be parsed is left to
        ``decode``."""
        source, ids = self.source, _Ids(self)
        if source.kind == "text" and self.columns.id is not None:
            raise ValueError(f"{source.name}: expected a table with the column {self.columns.id}, got lines of text")
        marks, rows, offset = [], 0, 0
        try:
            for line, raw in enumerate(source.lines()):
                if self._counts(line, raw):
                    if rows % every == 0:
                        marks.append(Mark(rows, offset, line))
                    rows += 1
                    if self.columns.id is not None:
                        ids.add(line + 1, raw)
                offset += len(raw)
        except OSError as error:
            raise ValueError(f"{source.name}: cannot be read: {error.strerror or first_line(error)}") from error
        return Survey(rows, ids.type(), marks)

    def blocks(self, start: Mark) -> Iterator[Block]:
        plain = self.source.indexed
        lines = enumerate(self.source.lines(start.offset if plain else 0), start.line if plain else 0)
        rows = ((line + 1, raw) for line, raw in lines if line >= start.line and self._counts(line, raw))
        try:
            while some := list(itertools.islice(rows, BLOCK)):
                yield Block([number for number, _ in some], [raw for _, raw in some])
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise DataError(f"{self.source.name}: cannot be read: {reason}", self.source.name) from error

    def check_columns(self) -> None:
        """ValueError where the first rows of JSONL all lack a column: it has another name, and no row of the file will do."""
        if self.source.kind == "text":
            return
        error = None
        for block in itertools.islice(self.blocks(Mark(0, 0, 0)), 1):
            for number, raw in zip(block.numbers, block.content, strict=True):
                try:
                    self._row(number, raw)
                    return
                except NoColumn as absent:
                    error = error or absent
                except ValueError:  # of this row alone: ``decode`` tells
                    return
        if error is not None:
            raise error

    def decode(self, block: Block) -> tuple[list[str], Any]:
        texts: list[str] = []
        ids: list[Any] | None = None if self.columns.id is None else []
        for number, raw in zip(block.numbers, block.content, strict=True):
            identity = None
            try:
                text, identity = self._row(number, raw)
                texts.append(tables.text(f"{self.source.name}: line {number}: {self.columns.text}", text))
            except NoColumn as error:
                raise DataError(error.missing, self.source.name, number, identity) from error
            except ValueError as error:
                raise DataError(str(error), self.source.name, number, identity) from error
            if ids is not None:
                ids.append(identity)
        return texts, ids

    def _counts(self, line: int, raw: bytes) -> bool:
        """Whether the line is a row: JSONL may have empty ones."""
        if self.source.kind == "text":
            return True
        return bool(raw.strip(b"\r\n") if line else raw.removeprefix(BOM).strip(b"\r\n"))

    def _row(self, number: int, raw: bytes) -> tuple[Any, Any]:
        line = tables.decode(self.source.name, number, raw)
        if self.source.kind == "text":
            return line, None
        row = tables.parse_json(self.source.name, number, line)
        wanted = [name for name in self.columns if name is not None]
        try:
            values = [field(row, name) for name in wanted]
        except KeyError:
            place, got = f"{self.source.name}: line {number}", ", ".join(row) or "none"
            missing = f"{place}: expected a column {' and '.join(wanted)}, got {got}"
            raise NoColumn(missing, remedy(self.columns, wanted)) from None
        return values[0], values[-1]


class _Ids:
    """Finds out the type of JSONL's ids, block by block."""

    def __init__(self, lines: Lines) -> None:
        self.lines, self.values, self.python, self.found = lines, [], set(), None  # type: ignore[var-annotated]
        self.number = 0

    def add(self, number: int, raw: bytes) -> None:
        try:
            value = self.lines._row(number, raw)[1]
        except ValueError:
            return
        self.number = number
        if isinstance(value, str):
            tables.text(f"{self.lines.source.name}: line {number}: {self.lines.columns.id}", value)
        if value is not None:
            self.python.add(type(value))
        if len(self.python) > 1:  # pyarrow would make 1 and 2.5 two floats, but only if they are in one block
            self.fail(" and ".join(sorted(kind.__name__ for kind in self.python)))
        self.values.append(value)
        if len(self.values) == BLOCK:
            self.type()

    def type(self) -> Any:
        """The type of all values so far."""
        if self.values:
            try:
                kind = pa.array(self.values).type
            # OverflowError: an integer of more than 64 bits. UnicodeEncodeError: half a character, within a list.
            except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
                self.fail(first_line(error))
            self.found = one_type(self.found, kind, f"{self.lines.source.name}: line {self.number}")
            self.values = []
        if self.lines.columns.id is None:
            return None
        return storable(self.lines.source.name, self.found if self.found is not None else pa.null())

    def fail(self, got: str) -> None:
        place = f"{self.lines.source.name}: line {self.number}"
        raise ValueError(f"{place}: ids: expected values of one type, got {got}")

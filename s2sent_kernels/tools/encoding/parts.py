"""One part: read, encode, write. The file is there whole or not at all, however often and by however many workers it is tried."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...batches import TextError
from ...files import first_line, importing, sync_folder
from .plan import Part, Plan
from .provenance import metadata
from .reading import Reader, Rows
from .rows import Columns, DataError
from .sources import Source
from .stock import CUT, DIGEST, NUMBER, SEAL, footer_length, is_there

with importing(None, "encode"):
    import pyarrow as pa
    from pyarrow import parquet

SLICE = 16384  # rows of a call of the encoder and of a row group: what a worker holds, and within which it may sort
EMBEDDING = "embedding.list.element"  # Parquet's name of the column of numbers


class Encoder(Protocol):
    """What a worker makes once. Of its attributes, if it has them, ``tokens`` counts the tokens that it has encoded, and ``cut``
    the texts that were longer than it takes. A ValueError of one text is a TextError, which knows its index."""

    def encode(self, texts: list[str]) -> np.ndarray:
        """[rows, D]"""
        ...


class Job(NamedTuple):
    """What workers know of a run; pickled."""

    folder: str
    sources: list[Source]
    columns: Columns
    id_type: Any
    keep_text: bool
    dtype: str | None
    digest: str
    about: dict[str, Any] | None

    @classmethod
    def of(cls, plan: Plan, folder: Path) -> Job:
        fields = {name: getattr(plan, name) for name in cls._fields if name != "folder"}
        return cls(str(folder.absolute()), **fields)


class Done(NamedTuple):
    """What became of a part."""

    part: Part
    rows: int = 0  # encoded just now
    tokens: int | None = None  # of them; None if the encoder does not count
    failure: str | None = None  # why its data could not be encoded; then nothing was written
    row: int | None = None  # the line or row of which ``failure`` speaks


class Worker:
    """Encodes parts, one after the other.

    Args:
        advance: told the rows and tokens of a slice once it is encoded.
    """

    def __init__(
        self, job: Job, encoder: Encoder, advance: Callable[[int, int | None], None] = lambda *_: None
    ) -> None:
        self.job, self.encoder, self.advance, self.reader = job, encoder, advance, Reader(job.columns)

    def part(self, part: Part) -> Done:
        """Write the part, unless it is there. One that is damaged, or of another plan, is replaced.

        Raises:
            OSError: it cannot be written.
        """
        target = Path(self.job.folder) / part.name
        if is_there(target.parent, part, self.job.digest):
            return Done(part)
        temporary = target.with_name(f".{part.name}.{uuid.uuid4().hex}")  # never that of another worker
        before = getattr(self.encoder, "tokens", None)
        try:
            self._write(part, temporary)
            os.replace(temporary, target)  # the later of two workers replaces equal rows
            sync_folder(target.parent)
        except DataError as error:
            return Done(part, failure=str(error), row=error.row)
        finally:
            temporary.unlink(missing_ok=True)
        return Done(part, part.rows, None if before is None else self.encoder.tokens - before)  # type: ignore[attr-defined]

    def _write(self, part: Part, path: Path) -> None:
        """While a slice is encoded, one thread reads the next slice and another writes the last."""
        rows = self.reader.rows(self.job.sources[part.source], part.start, part.stop, SLICE)
        first, writer, written = part.first, None, _nothing()
        cut = getattr(self.encoder, "cut", None)
        with open(path, "wb") as target:
            file = _Sealed(target)
            # The stack closes the writer, so it ends after the threads.
            with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
                ahead = reading.submit(next, rows, None)
                while (some := ahead.result()) is not None:
                    ahead = reading.submit(next, rows, None)
                    try:
                        embeddings = self._encode(some.texts)
                    except ValueError as error:
                        raise _located(error, self.job.sources[part.source], some) from error
                    table = self._table(part.number, first, some.texts, some.ids, embeddings)
                    written.result()  # at most one slice waits to be written
                    if writer is None:
                        writer = stack.enter_context(open_writer(file, table.schema))
                    written = writing.submit(writer.write_table, table)
                    first += len(some.texts)
                written.result()
                if writer is not None and cut is not None:
                    writer.add_key_value_metadata({CUT: str(self.encoder.cut - cut)})  # type: ignore[attr-defined]
                file.hold()  # all row groups are written: the footer comes
            file.seal()
            target.flush()
            os.fsync(target.fileno())

    def _encode(self, texts: list[str]) -> np.ndarray:
        before = getattr(self.encoder, "tokens", None)
        embeddings = np.asarray(self.encoder.encode(texts))
        if embeddings.ndim != 2 or len(embeddings) != len(texts):
            raise RuntimeError(f"the encoder gave an array {list(embeddings.shape)} for {len(texts)} texts")
        if self.job.dtype is not None:
            with np.errstate(over="ignore"):
                stored = embeddings.astype(self.job.dtype)
            beyond = np.isfinite(embeddings).all(axis=1) & ~np.isfinite(stored).all(axis=1)
            if beyond.any():
                text = int(beyond.argmax())
                largest = np.abs(embeddings[text]).max()
                raise TextError(text, f"the embedding has values beyond {self.job.dtype}: {largest}")
            embeddings = stored
        self.advance(len(texts), None if before is None else self.encoder.tokens - before)  # type: ignore[attr-defined]
        return embeddings

    def _table(self, number: int, first: int, texts: list[str], ids: list[Any] | None, embeddings: np.ndarray) -> Any:
        kind = self.job.id_type
        if ids is None:
            names = pa.array(np.arange(first, first + len(texts)))
        else:
            names = pa.chunked_array([_ids(some, kind) for some in ids], kind)
        values = pa.array(embeddings.reshape(-1))
        columns = {"id": names, "embedding": pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])}
        if self.job.keep_text:
            columns["text"] = pa.array(texts, pa.string())
        own = {DIGEST: self.job.digest, NUMBER: str(number)}
        return pa.table(columns).replace_schema_metadata({**own, **metadata(self.job.about)})


def _located(error: ValueError, source: Source, rows: Rows) -> DataError:
    """The encoder's error, with the text's line or row if the encoder says which text it is, else with those of the call."""
    reason = first_line(error)
    if isinstance(error, TextError):
        row = rows.numbers[error.text]
        # The index counts from the beginning of the call, which the user does not know.
        place, reason = f"{source.unit} {row}", reason.replace(f"text {error.text}", "a text")
    else:
        place, row = f"{source.unit}s {rows.numbers[0]} to {rows.numbers[-1]}", None
    return DataError(f"{source.name}: {place}: {reason}", source.name, row)


def _ids(values: Any, kind: Any) -> Any:
    return pa.array(values, kind) if isinstance(values, list) else values.cast(kind)


def _nothing() -> Future[None]:
    done: Future[None] = Future()
    done.set_result(None)
    return done


class _Sealed:
    """A Parquet file that is written from its beginning to its end, as pyarrow writes, and gets its seal before its footer. The
    footer finds the data by places counted from the beginning, and is itself found from the end."""

    closed = False

    def __init__(self, file: Any) -> None:
        self._file, self.flush = file, file.flush
        self._sum, self._place = hashlib.sha256(), 0
        self._held: list[bytes] | None = None

    def tell(self) -> int:
        return self._place

    def write(self, data: Any) -> int:
        piece = bytes(data) if self._held is not None else data
        if self._held is not None:
            self._held.append(piece)
        else:
            self._sum.update(piece)
            self._file.write(piece)
        self._place += len(piece)
        return len(piece)

    def hold(self) -> None:
        """Keep what is written from now on until ``seal``."""
        self._held = []

    def seal(self) -> None:
        end = b"".join(self._held or [])
        start = len(end) - footer_length(end)  # indices of the pages are before it
        self._sum.update(end)
        self._file.write(end[:start] + SEAL + self._sum.digest() + end[start:])


@contextlib.contextmanager
def open_writer(target: Any, schema: Any) -> Iterator[Any]:
    """A ParquetWriter of embeddings, to a path or a file: without a dictionary and statistics of numbers that do not repeat and
    have no order, their bytes apart so that zstd finds the exponents."""
    split = [EMBEDDING] if pa.types.is_floating(schema.field("embedding").type.value_type) else False
    with parquet.ParquetWriter(
        target, schema, compression="zstd", use_dictionary=False, use_byte_stream_split=split, write_statistics=["id"]
    ) as writer:
        yield writer

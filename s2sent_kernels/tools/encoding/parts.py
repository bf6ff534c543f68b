"""One part: read, encode, write. The file is there whole or not at all, however often and by however many workers it is tried."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...batches import TextError
from ...files import first_line, importing, sync_folder
from .begun import Begun, left
from .plan import Part, Plan
from .provenance import metadata
from .reading import Reader, Rows
from .reuse import RowSum
from .rows import Columns, DataError
from .sources import Source
from .stock import CUT, DIGEST, LIMIT, NUMBER, RECIPE, ROWS, SEAL, SKIPPED, footer_length, is_there

with importing(None, "encode"):
    import pyarrow as pa
    from pyarrow import parquet

SLICE = 16384  # rows of a call of the encoder and of a row group: what a worker holds, and within which it may sort
EMBEDDING = "embedding.list.element"  # Parquet's name of the column of numbers


class Encoder(Protocol):
    """What a worker makes once. Of its attributes, if it has them, ``tokens`` counts the tokens that it has encoded, ``cut`` the
    texts that were longer than it takes, and ``max_length`` says at how many tokens these were cut; ``told`` is set to what it
    calls with the texts and tokens of each batch; ``record`` is set to what keeps its batches, a ``batch_runner.Record``. A
    ValueError of one text is a TextError, which knows its index."""

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
    recipe: str
    skip: bool  # rows that cannot be encoded get NaN; else the first one fails its part

    @classmethod
    def of(cls, plan: Plan, folder: Path, skip: bool = False) -> Job:
        fields = {name: getattr(plan, name) for name in cls._fields if name not in ("folder", "skip")}
        return cls(str(folder.absolute()), **fields, skip=skip)

    def stamp(self, part: Part) -> dict[bytes, str | bytes]:
        """What a part's metadata begin with."""
        return {DIGEST: self.digest, NUMBER: str(part.number), RECIPE: self.recipe, **metadata(self.about)}


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
        advance: told the rows and tokens of a batch once it is encoded, or of a slice where the encoder tells of no batches. Not
            told of the batches that an earlier run encoded.
        again: called for each of those.
    """

    def __init__(
        self,
        job: Job,
        encoder: Encoder,
        advance: Callable[[int, int | None], None] = lambda *_: None,
        again: Callable[[], None] = lambda: None,
    ) -> None:
        self.job, self.encoder, self.advance, self.reader = job, encoder, advance, Reader(job.columns, job.skip)
        self.again = again
        self._told = (0, 0)  # rows and tokens of the slice in work
        self._again = (0, 0)  # of the part in work: those that an earlier run encoded
        self._left = left(Path(job.folder))  # looked for once: a folder may have a million parts
        self._begun: Begun | None = None  # the part in work, where the encoder tells of its batches
        if hasattr(encoder, "told"):
            encoder.told = self._batch

    def _batch(self, rows: int, tokens: int) -> None:
        self._told = (self._told[0] + rows, self._told[1] + tokens)
        if self._begun is not None and self._begun.found:
            self._again = (self._again[0] + rows, self._again[1] + tokens)
            self.again()
        else:
            self.advance(rows, tokens)

    def part(self, part: Part) -> Done:
        """Write the part, unless it is there. One that is damaged, or of another plan, is replaced.

        Raises:
            OSError: it cannot be written.
        """
        target = Path(self.job.folder) / part.name
        if is_there(target.parent, part, self.job.digest, self.job.skip):
            return Done(part)
        temporary = target.with_name(f".{part.name}.{uuid.uuid4().hex}")  # never that of another worker
        before = getattr(self.encoder, "tokens", None)
        self._again = (0, 0)
        try:
            with self._recorded(part, target):
                self._write(part, temporary)
                os.replace(temporary, target)  # the later of two workers replaces equal rows
                sync_folder(target.parent)
        except DataError as error:
            return Done(part, failure=str(error), row=error.row)
        finally:
            temporary.unlink(missing_ok=True)
        rows, tokens = self._again
        count = None if before is None else self.encoder.tokens - before - tokens  # type: ignore[attr-defined]
        return Done(part, part.rows - rows, count)

    @contextlib.contextmanager
    def _recorded(self, part: Part, target: Path) -> Iterator[None]:
        """The encoder's batches are kept until the part is whole, and longer if it does not become so."""
        if not hasattr(self.encoder, "record"):
            yield
            return
        self._begun = Begun(target, self.job.digest, self.job.recipe, self._left.pop(part.name, []))
        self.encoder.record = self._begun
        try:
            yield
            self._begun.remove()
        except BaseException:
            with contextlib.suppress(OSError):  # the error that is on its way says more
                self._begun.write()
            raise
        finally:
            self.encoder.record = self._begun = None

    def _write(self, part: Part, path: Path) -> None:
        """While a slice is encoded, one thread reads the next slice and another writes the last."""
        source = self.job.sources[part.source]
        rows = self.reader.rows(source, part.start, part.stop, SLICE)
        first, writer, written = part.first, None, _nothing()
        cut, total, skipped = getattr(self.encoder, "cut", None), RowSum(part.first), []
        with open(path, "wb") as target:
            file = _Sealed(target)
            # The stack closes the writer, so it ends after the threads.
            with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
                ahead = reading.submit(next, rows, None)
                while (some := ahead.result()) is not None:
                    ahead = reading.submit(next, rows, None)
                    total.add(some)
                    try:
                        embeddings, refused = self._encode(some.texts)
                    except ValueError as error:
                        raise _located(error, source, some) from error
                    skipped += some.errors
                    skipped += [
                        (some.numbers[one], str(_located(why, source, some, one))) for one, why in refused.items()
                    ]
                    table = self._table(part, first, some, embeddings)
                    written.result()  # at most one slice waits to be written
                    if writer is None:
                        writer = stack.enter_context(open_writer(file, table.schema))
                    written = writing.submit(writer.write_table, table)
                    first += len(some.texts)
                written.result()
                if writer is not None:
                    known = {} if cut is None else {CUT: str(self.encoder.cut - cut)}  # type: ignore[attr-defined]
                    if (limit := getattr(self.encoder, "max_length", None)) is not None:
                        known[LIMIT] = str(limit)
                    known[ROWS] = total.hexdigest()
                    if skipped:
                        known[SKIPPED] = json.dumps(sorted(skipped))
                    writer.add_key_value_metadata(known)
                file.hold()  # all row groups are written: the footer comes
            file.seal()
            target.flush()
            os.fsync(target.fileno())

    def _encode(self, texts: Sequence[str | None]) -> tuple[np.ndarray, dict[int, TextError]]:
        """[rows, D]; NaN where there is no text, and where the encoder refuses one, if such rows are skipped: these by their
        places, with its error."""
        before = getattr(self.encoder, "tokens", None)
        self._told = (0, 0)
        given = [place for place, text in enumerate(texts) if text is not None]
        refused: dict[int, TextError] = {}
        pieces: list[tuple[list[int], np.ndarray]] = []
        todo = [given]
        while todo:
            places = todo.pop()
            try:
                values, beyond = self._stored(self._embeddings([texts[place] for place in places]))
            except TextError as error:
                if not self.job.skip:
                    raise
                refused[places[error.text]] = error
                todo += [some for some in (places[error.text + 1 :], places[: error.text]) if some]
                continue
            if beyond and not self.job.skip:
                raise beyond[0]
            refused |= {places[error.text]: error for error in beyond}
            pieces.append((places, values))
        told, tokens = self._told  # what was refused and tried again was told twice, which the rest makes good
        count = None if before is None else self.encoder.tokens - before - tokens  # type: ignore[attr-defined]
        self.advance(len(texts) - told, count)
        if len(pieces) == 1 and len(given) == len(texts) and not refused:
            return pieces[0][1], refused
        like = pieces[0][1] if pieces else self._stored(self._embeddings([""]))[0]
        if not np.issubdtype(like.dtype, np.floating):
            raise ValueError(f"rows that cannot be encoded have no value in {like.dtype}, which has no NaN")
        whole = np.full((len(texts), like.shape[1]), np.nan, like.dtype)
        for places, values in pieces:
            whole[places] = values
        whole[list(refused)] = np.nan
        return whole, refused

    def _embeddings(self, texts: Sequence[str | None]) -> np.ndarray:
        embeddings = np.asarray(self.encoder.encode(list(texts)))  # type: ignore[arg-type]
        if embeddings.ndim != 2 or len(embeddings) != len(texts):
            raise RuntimeError(f"the encoder gave an array {list(embeddings.shape)} for {len(texts)} texts")
        return embeddings

    def _stored(self, embeddings: np.ndarray) -> tuple[np.ndarray, list[TextError]]:
        """The embeddings in the dtype in which they are stored, and an error for each that it cannot hold."""
        if self.job.dtype is None:
            return embeddings, []
        with np.errstate(over="ignore"):
            stored = embeddings.astype(self.job.dtype)
        beyond = np.isfinite(embeddings).all(axis=1) & ~np.isfinite(stored).all(axis=1)
        return stored, [
            TextError(int(text), f"the embedding has values beyond {self.job.dtype}: {np.abs(embeddings[text]).max()}")
            for text in np.flatnonzero(beyond)
        ]

    def _table(self, part: Part, first: int, rows: Rows, embeddings: np.ndarray) -> Any:
        kind = self.job.id_type
        if rows.ids is None:
            names = pa.array(np.arange(first, first + len(rows.texts)))
        else:
            names = pa.chunked_array([_ids(some, kind) for some in rows.ids], kind)
        values = pa.array(embeddings.reshape(-1))
        columns = {"id": names, "embedding": pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])}
        if self.job.keep_text:
            columns["text"] = pa.array(rows.texts, pa.string())
        return pa.table(columns).replace_schema_metadata(self.job.stamp(part))


def restamp(job: Job, part: Part) -> None:
    """Make a part of another plan, whose rows and recipe are those of ``job``'s, one of this plan: its bytes are then those that
    a worker would write. OSError, ValueError if it cannot be read or written."""
    target = Path(job.folder) / part.name
    temporary = target.with_name(f".{part.name}.{uuid.uuid4().hex}")
    try:
        with parquet.ParquetFile(target) as old, open(temporary, "wb") as new:
            file = _Sealed(new)
            tables = (_as_written(old.read_row_group(group), job) for group in range(old.num_row_groups))
            stamped = (table.replace_schema_metadata(job.stamp(part)) for table in tables)
            first = next(stamped)
            with open_writer(file, first.schema) as writer:
                for table in itertools.chain([first], stamped):
                    writer.write_table(table)
                known = old.metadata.metadata
                writer.add_key_value_metadata(
                    {name: known[name] for name in (CUT, LIMIT, ROWS, SKIPPED) if name in known}
                )
                file.hold()
            file.seal()
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _as_written(table: Any, job: Job) -> Any:
    """A part's rows with the types that a worker gives them: Parquet has names of its own for the fields within lists."""
    embeddings = table["embedding"].combine_chunks()
    size = embeddings.type.list_size
    columns = {name: table[name] for name in table.column_names}
    columns["id"] = table["id"].cast(job.id_type)
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(embeddings.flatten(), size)
    return pa.table(columns)


def _located(error: ValueError, source: Source, rows: Rows, at: int | None = None) -> DataError:
    """The encoder's error, with the text's line or row if the encoder says which text it is, else with those of the call. ``at``:
    the text's place among the rows, where it is not its number in the call."""
    reason = first_line(error)
    if isinstance(error, TextError):
        row = rows.numbers[error.text if at is None else at]
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

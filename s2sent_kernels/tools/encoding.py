"""Files of texts to one file of embeddings, in constant memory. The output appears when it is complete, and an interrupted run is
resumed. sentence-transformers does the encoding. Needs the extra encode."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import importing, locked, missing, remove_empty
from . import tables
from .tables import STDIN

with importing(None, "encode"):
    import pyarrow as pa
    from pyarrow import parquet
    from tqdm import tqdm

INPUTS, OUTPUTS = (".txt", ".jsonl", ".parquet"), (".parquet", ".npy")
Encode = Callable[[list[str]], np.ndarray]  # texts to [rows, D]


class Row(NamedTuple):
    id: Any
    text: str


def read_texts(paths: Sequence[str], column: str = "text", id_column: str | None = None) -> Iterator[Row]:
    """The texts of files, in order: all lines of a text file or of standard input ("-"), or a column of JSONL or Parquet. An
    id is the row's number, counted over all files, or the value in another column.

    Raises:
        ValueError: a file has another suffix, cannot be read, is broken, empty or not UTF-8, lacks a column, or holds a value
            that is no text; names the file and the line or row.
    """
    number = 0
    for path in paths:
        before = number
        for place, text, identity in _rows(path, column, id_column):
            tables.text(f"{path}: {place}: {column}", text)
            yield Row(number if id_column is None else identity, text)
            number += 1
        if number == before:
            raise ValueError(f"{path}: expected texts, got an empty file")


def _rows(path: str, column: str, id_column: str | None) -> Iterator[tuple[str, Any, Any]]:
    suffix = Path(path).suffix.lower()
    if id_column is not None and (path == STDIN or suffix == ".txt"):
        raise ValueError(f"{path}: expected columns, of which one is {id_column}, got lines of text")
    wanted = [column] if id_column is None else [column, id_column]
    if path == STDIN or suffix == ".txt":
        for number, line in tables.read_lines(path, keep_empty=True):
            yield f"line {number}", line, None
    elif suffix == ".jsonl":
        for number, row in tables.read_json(path):
            if any(name not in row for name in wanted):
                got = ", ".join(row)
                raise ValueError(f"{path}: line {number}: expected a column {' and '.join(wanted)}, got {got}")
            yield f"line {number}", row[column], row.get(id_column or "")
    elif suffix == ".parquet":
        yield from _parquet_rows(path, wanted)
    else:
        raise ValueError(f"{path}: expected a file of {', '.join(INPUTS)}, got suffix {suffix!r}")


def _parquet_rows(path: str, wanted: list[str]) -> Iterator[tuple[str, Any, Any]]:
    try:
        with parquet.ParquetFile(path) as file:
            missing = [name for name in wanted if name not in file.schema_arrow.names]
            if missing:
                got = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{path}: expected a column {' and '.join(missing)}, got {got}")
            tables.unique(path, [name for name in file.schema_arrow.names if name in wanted])
            number = 0
            for batch in file.iter_batches(columns=wanted, batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row[wanted[0]], row[wanted[-1]]
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def encode_texts(
    rows: Iterable[Row],
    encode: Encode,
    output: str | os.PathLike[str],
    *,
    chunk: int = 4096,
    key: Any = None,
    keep_text: bool = False,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Write ``output`` and return its number of rows. Parquet has columns ``id``, ``embedding`` (a list of D numbers) and, with
    ``keep_text``, ``text``; .npy is an array [rows, D].

    The embeddings of every ``chunk`` texts become a shard in a hidden folder beside the output. At the end the shards are joined.

    Args:
        key: everything that the result depends on, as JSON. A later call with an equal key continues after the last shard; shards
            of another key are deleted. None: start anew.

    Raises:
        ValueError: the output's suffix is not one of OUTPUTS; ids are of several types; another process writes the same output;
            what ``rows`` raises.
    """
    output = Path(output)
    if output.suffix.lower() not in OUTPUTS:
        raise ValueError(f"{output}: expected a file of {', '.join(OUTPUTS)}, got suffix {output.suffix!r}")
    if keep_text and output.suffix.lower() == ".npy":
        raise ValueError(f"{output}: an array holds no texts: expected .parquet")
    shards = _Shards(output)
    made = missing(shards.folder)
    shards.folder.mkdir(parents=True, exist_ok=True)
    with locked(shards.folder / "lock", wait=False):
        try:
            shards.begin({"key": key, "chunk": chunk, "keep_text": keep_text}, key is not None, say)
            stream = iter(rows)
            done = shards.rows()
            for _ in itertools.islice(stream, done):  # encoded already; read, because reading may raise
                pass
            with tqdm(total=None, initial=done, unit=" texts", disable=not progress, file=sys.stderr) as bar:
                while some := list(itertools.islice(stream, chunk)):
                    shards.add(some, np.asarray(encode([row.text for row in some])), keep_text)
                    bar.update(len(some))
        except BaseException:
            if not shards.count:
                shutil.rmtree(shards.folder)
                remove_empty(made)
            raise
        return shards.join()


class _Shards:
    """Parquet files with the embeddings of consecutive texts. A file exists only once it is complete."""

    def __init__(self, output: Path) -> None:
        self.output, self.folder, self.count = output, output.parent / f".{output.name}.parts", 0

    def begin(self, key: Any, resumable: bool, say: Callable[[str], None]) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        mark = self.folder / "key"
        known = mark.is_file() and mark.read_text() == digest
        if not (resumable and known):
            if self.files():
                say(f"{self.folder}: chunks of another run are thrown away")
            mark.unlink(missing_ok=True)  # first, so that a half-deleted set has no owner
            for path in self.files():
                path.unlink()
            mark.write_text(digest)
        elif self.files():
            say(f"{self.folder}: going on after {self.rows()} texts")
        self.count = len(self.files())

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.parquet"))

    def rows(self) -> int:
        return sum(parquet.read_metadata(path).num_rows for path in self.files())

    def add(self, rows: list[Row], embeddings: np.ndarray, keep_text: bool) -> None:
        values = pa.array(embeddings.reshape(-1))
        columns: dict[str, Any] = {
            "id": [row.id for row in rows],
            "embedding": pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1]),
        }
        if keep_text:
            columns["text"] = [row.text for row in rows]
        try:
            table = pa.table(columns)
        except (pa.ArrowException, OverflowError) as error:  # OverflowError: an integer of more than 64 bits
            raise ValueError(f"ids: expected values of one type: {str(error).splitlines()[0]}") from error
        place = self.folder / f"{self.count:08d}.parquet"
        parquet.write_table(table, place.with_suffix(".part"))
        os.replace(place.with_suffix(".part"), place)
        self.count += 1

    def join(self) -> int:
        """Join all shards into the output, and delete them."""
        whole = self.folder / f"whole{self.output.suffix}"
        count, files = self.rows(), self.files()
        if self.output.suffix.lower() == ".parquet":
            schema = parquet.read_schema(files[0])
            with parquet.ParquetWriter(whole, schema) as writer:
                for path in files:
                    table = parquet.read_table(path)
                    if table.schema != schema:
                        raise ValueError(f"ids: expected values of one type, got {schema.field('id').type} and another")
                    writer.write_table(table)
        else:
            # Not memory-mapped: writing to a mapped file on a full disk kills the process.
            with open(whole, "wb") as file:
                for place, path in enumerate(files):
                    column = parquet.read_table(path, columns=["embedding"])["embedding"].combine_chunks()
                    rows = column.values.to_numpy().reshape(len(column), -1)
                    if place == 0:
                        header = np.lib.format.header_data_from_array_1_0(rows)
                        np.lib.format.write_array_header_1_0(file, header | {"shape": (count, rows.shape[1])})
                    file.write(rows.tobytes())
        os.replace(whole, self.output)
        shutil.rmtree(self.folder)
        return count

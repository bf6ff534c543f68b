"""Parts into one file, slice by slice, in constant memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ...files import importing
from .parts import open_writer
from .plan import Plan
from .provenance import metadata

with importing(None, "encode"):
    from pyarrow import parquet

OUTPUTS = (".parquet", ".npy")


def join(plan: Plan, folder: Path, whole: Path) -> None:
    """Write the parts in ``folder``, in order, to ``whole``: Parquet or, of the embeddings alone, .npy."""
    if whole.suffix.lower() == ".parquet":
        schema = parquet.read_schema(folder / plan.parts[0].name).with_metadata(metadata(plan.about))
        with open_writer(whole, schema) as writer:
            for table in _slices(plan, folder):
                writer.write_table(table.replace_schema_metadata(schema.metadata))
    else:
        _join_array(plan, folder, whole)
    with open(whole, "rb") as file:
        os.fsync(file.fileno())


def _slices(plan: Plan, folder: Path, columns: list[str] | None = None) -> Iterator[Any]:
    """The row groups of all parts; one is read while the caller writes another."""

    def read() -> Iterator[Any]:
        for part in plan.parts:
            with parquet.ParquetFile(folder / part.name) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group, columns)

    rows = read()
    with ThreadPoolExecutor(1) as reading:
        ahead = reading.submit(next, rows, None)
        while (table := ahead.result()) is not None:
            ahead = reading.submit(next, rows, None)
            yield table


def _join_array(plan: Plan, folder: Path, whole: Path) -> None:
    count = sum(part.rows for part in plan.parts)
    with open(whole, "wb") as file:  # not memory-mapped: writing to a mapped file on a full disk kills the process
        begun = False
        for table in _slices(plan, folder, ["embedding"]):
            column = table["embedding"].combine_chunks()
            rows = column.flatten().to_numpy().reshape(len(column), -1)
            if not begun:
                header = np.lib.format.header_data_from_array_1_0(rows)
                np.lib.format.write_array_header_1_0(file, header | {"shape": (count, rows.shape[1])})
                begun = True
            file.write(rows.tobytes())

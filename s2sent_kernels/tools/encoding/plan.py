"""What a run is to do: its parts, from Parquet's footers and counted lines, before anything is encoded. The plan is a file beside
the parts, so that every process of a run, now or later, has the same one."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...files import importing, write_atomically
from ..progress import stepwise
from ..tables import STDIN
from .lines import Lines
from .reading import format_of
from .rows import Columns, Mark, one_type
from .sources import Source, source
from .tabular import Tabular

with importing(None, "encode"):
    import pyarrow as pa

PLAN = "_plan.json"
CHECKSUM = "sha256"  # in the plan's file: of all else in it
COPY = ".stdin.txt"  # of standard input
TEXT = "text"  # the column of texts, if no other is named
IN_A_FOLDER, IN_A_FILE = 65536, 4096  # rows of a part


class Request(NamedTuple):
    """What a caller asks for."""

    inputs: Sequence[str]  # files, or "-"
    columns: Columns = Columns(TEXT, None)
    keep_text: bool = False
    dtype: str | None = None  # in which floating embeddings are stored; None: as the encoder gives them
    part_rows: int = IN_A_FILE
    settings: Any = None  # all else that the result depends on, as JSON
    format: str | None = None  # of standard input: a value of tables.KINDS, or None for lines of text
    # What writes the embeddings, see provenance.py, asked for when all inputs have been judged; no part of the key.
    about: Callable[[], dict[str, Any]] | None = None


class Part(NamedTuple):
    """A range of rows of one input."""

    number: int
    source: int  # the index of the input
    start: Mark
    stop: int  # the row after the last
    first: int  # the number of the first row, counted over all inputs

    @property
    def name(self) -> str:
        return f"part-{self.number:06d}.parquet"

    @property
    def rows(self) -> int:
        return self.stop - self.start.row


class Plan(NamedTuple):
    key: dict[str, Any]  # the request, with the inputs' sizes and times: plans of equal keys are equal
    sources: list[Source]
    columns: Columns
    id_type: Any  # of pyarrow
    keep_text: bool
    dtype: str | None
    parts: list[Part]
    about: dict[str, Any] | None = None  # what the request which began the run said of who writes it

    @property
    def digest(self) -> str:
        """Names the plan in each of its parts."""
        return digest_of(self.key)

    @property
    def recipe(self) -> str:
        """Names all that an embedding depends on beside its text."""
        return digest_of(recipe_of(self.key))

    def save(self, folder: Path) -> None:
        schema = pa.schema([("id", self.id_type)]).serialize()
        content = {
            **{name: getattr(self, name) for name in ("key", "columns", "keep_text", "dtype", "about")},
            "id_type": base64.b64encode(schema).decode(),
            "sources": self.sources,
            "parts": self.parts,
        }
        write_atomically(folder / PLAN, json.dumps({**content, CHECKSUM: digest_of(content)}).encode(), sync=True)


def load(folder: Path) -> Plan | None:
    """The plan in ``folder``; None if there is none.

    Raises:
        ValueError: the file is broken.
    """
    try:
        content = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        if content.pop(CHECKSUM) != digest_of(content):
            raise ValueError("its checksum is that of another content")
        parts = [Part(number, file, Mark(*start), stop, first) for number, file, start, stop, first in content["parts"]]
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["id_type"])))
        return Plan(
            content["key"],
            [_placed(Source(*one), folder) for one in content["sources"]],
            Columns(*content["columns"]),
            schema.field("id").type,
            content["keep_text"],
            content["dtype"],
            parts,
            content["about"],
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / PLAN}: is broken: {error}: --force makes it anew") from error


def digest_of(content: Any) -> str:
    """A SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def key_of(request: Request, copied: str | None = None) -> dict[str, Any]:
    """What the plan of ``request`` depends on. ``copied``: the SHA-256 of standard input, if it is among the inputs."""
    inputs = [copied if path == STDIN else state(path) for path in request.inputs]
    key = {name: value for name, value in request._asdict().items() if name != "about"} | {"inputs": inputs}
    if request.format is None:
        del key["format"]  # as in plans that were made before there were others
    return json.loads(json.dumps(key))  # as it is read again: no tuples


def recipe_of(key: dict[str, Any]) -> dict[str, Any]:
    """The key but for the inputs and how they are divided."""
    return {name: value for name, value in key.items() if name not in ("inputs", "part_rows")}


def state(path: str) -> list[Any]:
    """A file's name without links, size and time."""
    about = os.stat(path)
    return [os.path.realpath(path), about.st_size, about.st_mtime_ns]


CHEAP = 64 << 20  # bytes of a file whose every row is looked at before the work


def make(request: Request, key: dict[str, Any], folder: Path, *, strict: bool = False) -> Plan:
    """The plan, after a look at every input; who writes it is not asked for yet. Standard input was copied to COPY in ``folder``.

    Args:
        strict: a row without a text is an error here already where it is found without much work: in files of up to CHEAP bytes,
            and in Parquet of any size whose footer counts nulls.

    Raises:
        ValueError: an input cannot be read, is empty, or lacks a column; there is no one type of all ids, or none that can be
            written.
    """
    sources: list[Source] = []
    parts: list[Part] = []
    rows, id_type = 0, None
    with contextlib.closing(stepwise(request.inputs, "planning", "files")) as paths:
        for path in paths:
            # A link's own suffix counts. Its path is absolute: workers may have another working directory.
            found = source(COPY if path == STDIN else path)._replace(name=path, path=os.path.realpath(path))
            if path == STDIN and request.format is not None:
                found = found._replace(kind=request.format)
            found = _placed(found, folder)
            reader = format_of(found, request.columns)
            survey = reader.survey(request.part_rows)
            if isinstance(reader, Lines):
                reader.check_columns()
            if strict and os.path.getsize(found.path) <= CHEAP:
                for block in reader.blocks(Mark(0, 0, 0)):
                    reader.decode(block)
            elif strict and isinstance(reader, Tabular):
                reader.check_nulls()
            if not survey.rows:
                raise ValueError(f"{path}: expected texts, got an empty file")
            if request.columns.id is not None:
                id_type = one_type(id_type, survey.id_type, path)
            for start in survey.marks:
                stop = min(survey.rows, start.row + request.part_rows)
                parts.append(Part(len(parts), len(sources), start, stop, rows + start.row))
            sources.append(found)
            rows += survey.rows
    if request.columns.text != TEXT and all(one.kind == "text" for one in sources):
        raise ValueError(
            f"{sources[0].name}: expected a table with the column {request.columns.text}, got lines of text"
        )
    kind = pa.int64() if id_type is None else id_type
    return Plan(key, sources, request.columns, kind, request.keep_text, request.dtype, parts, None)


def _placed(source: Source, folder: Path) -> Source:
    """Standard input is read from its copy in ``folder``, which may have been moved since the plan was made."""
    return source._replace(path=str(folder.absolute() / COPY)) if source.name == STDIN else source


def difference(known: Any, wanted: Any, name: str = "") -> str:
    """The values in which two keys differ, in words: the version and the settings first, which explain more than the inputs."""
    if isinstance(known, dict) and isinstance(wanted, dict):
        names = sorted({*known, *wanted}, key=lambda name: (name not in ("settings", "version"), name))
        return ", ".join(
            difference(known.get(one), wanted.get(one), one) for one in names if known.get(one) != wanted.get(one)
        )
    if isinstance(known, list | dict) or isinstance(wanted, list | dict):
        return f"other {name}"
    return f"{name.replace('_', '-')} {json.dumps(known)}, not {json.dumps(wanted)}"

"""What the arguments of a run mean as input files: files, folders, globs, datasets on disk, standard input."""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from ...files import first_line, importing
from ..tables import COMPRESSIONS, KINDS, STDIN, kind_of

with importing(None, "encode"):
    import pyarrow as pa

T = TypeVar("T")

EXPECTED = f"a file of {', '.join(KINDS)}, also with {' or '.join(COMPRESSIONS)}"
SAVED = "state.json"  # datasets' save_to_disk writes it beside the Arrow files and lists them in it
# How the names of weights end in models' folders.
WEIGHTS = (".safetensors", "pytorch_model.bin", ".safetensors.index.json", "pytorch_model.bin.index.json")
PIECE = 1 << 20  # bytes


class Source(NamedTuple):
    """An input file. Its rows are numbered from 0."""

    name: str  # in messages
    path: str  # of the file that is opened
    kind: str  # a value of KINDS
    compression: str | None  # a value of COMPRESSIONS

    @property
    def unit(self) -> str:
        """What its rows are called in messages, and counted in."""
        return "line" if self.kind in ("text", "jsonl") else "row"

    @property
    def indexed(self) -> bool:
        """Whether reading can begin at a part; else only past all rows before it."""
        return self.compression is None and self.kind not in ("csv", "tsv")

    def stream(self) -> Any:
        """Its bytes, decompressed, as pyarrow's input stream; not seekable if compressed.

        Raises:
            OSError: it cannot be opened.
        """
        return pa.input_stream(self.path, compression=self.compression)

    def lines(self, offset: int = 0) -> Iterator[bytes]:
        """Its lines from byte ``offset`` on, with their ends; a lone carriage return ends none. Raises OSError."""
        if self.compression is None:
            with open(self.path, "rb", buffering=PIECE) as file:
                file.seek(offset)
                yield from file
        else:
            with self.stream() as stream, io.BufferedReader(stream, PIECE) as lines:
                yield from lines


def source(path: str, name: str | None = None) -> Source:
    """The source at ``path``, of the kind that its suffixes name.

    Raises:
        ValueError: they name none.
    """
    if kind := kind_of(path):
        return Source(name or path, path, *kind)
    raise ValueError(f"{name or path}: expected {EXPECTED}, got suffix {Path(path).suffix!r}")


def expand(arguments: Sequence[str], output: str | None = None, say: Callable[[str], None] = print) -> list[str]:
    """The files that ``arguments`` mean, in order; "-" stays. A folder or a glob means its files in sorted order, but nothing
    within ``output``, and a folder that datasets' save_to_disk wrote the files that its state lists.

    A folder of a model has no texts, although a training's history is a file of JSON lines: it is left out where it is within a
    folder or a glob.

    Raises:
        ValueError: there is no such file, a folder has no input, or is a model's.
    """
    found: list[str] = []
    for argument in arguments:
        if argument == STDIN or os.path.isfile(argument):
            found.append(argument)
        elif os.path.isdir(argument):
            found += _folder(argument, output, say)
        elif matches := _matches(argument, output) if glob.has_magic(argument) else []:
            models = [path for path in matches if _is_model(path)]
            if models:
                say(f"{argument}: folders of models are left out: {', '.join(models)}")
            others = (path for path in matches if path not in models)
            files = (_folder(path, output, say) if os.path.isdir(path) else [path] for path in others)
            unique: dict[tuple[str, str], str] = {}
            for path in itertools.chain(*files):  # links to folders, and folders beside their files, give some twice
                unique.setdefault(_place(path), path)
            found += unique.values()
        else:
            raise ValueError(f"{argument}: there is no such file")
    return found


def _matches(pattern: str, output: str | None) -> list[str]:
    """What a glob means, sorted, but for ``output`` and all within it."""
    found = sorted(set(_glob(pattern)))
    if output is None:
        return found
    own = os.path.join(os.path.realpath(output), "")
    return [path for path in found if not os.path.join(os.path.realpath(path), "").startswith(own)]


def _glob(pattern: str) -> list[str]:
    """As glob.glob, but ** goes into each folder once: links may make a circle. ** at the end means files."""
    names = pattern.split(os.sep)
    if "**" not in names:
        return glob.glob(pattern)
    at = names.index("**")
    head, tail = os.sep.join([*names[:at], ""]), os.sep.join(names[at + 1 :])
    found: list[str] = []
    seen: set[str] = set()
    for top in glob.glob(head) if head else [""]:
        for place, folders, _ in os.walk(top or os.curdir, followlinks=True):
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = glob.escape(place)
            some = [path for path in _glob(os.path.join(inside, tail or "*")) if tail or not os.path.isdir(path)]
            found += some if top else [path.removeprefix(os.path.join(os.curdir, "")) for path in some]
    return found


def _place(path: str) -> tuple[str, str]:
    """What tells a file from others: its folder without links, and its name. A link to a file is a file of its own."""
    return os.path.realpath(os.path.dirname(path)), os.path.basename(path)


def _folder(folder: str, output: str | None, say: Callable[[str], None]) -> list[str]:
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        split = _listed(Path(folder, "dataset_dict.json"), lambda found: str(found["splits"][0]))
        raise ValueError(f"{folder}: expected one split of the dataset, as {folder.rstrip('/')}/{split}")
    if os.path.isfile(os.path.join(folder, SAVED)):
        names = _listed(Path(folder, SAVED), lambda found: [str(file["filename"]) for file in found["_data_files"]])
        return [os.path.join(folder, name) for name in names]
    files: list[str] = []
    others: list[str] = []
    seen = {os.path.realpath(path) for path in (output,) if path}  # also ends a circle of links
    for place, names, entries in os.walk(folder, onerror=_unreadable, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            names.clear()
            continue
        seen.add(real)
        if _is_model(place):
            names.clear()
            if place == folder:
                raise ValueError(
                    f"{folder}: expected a folder of texts, got that of a model: --model {folder} encodes with it; a file in it "
                    "is read where it is named"
                )
            say(f"{place}: the folder of a model is left out")
            continue
        # Hidden files and those with an underscore are notes of the program that wrote the folder, as _SUCCESS.
        names[:] = filter(_visible, names)
        for name in filter(_visible, entries):
            (files if kind_of(name) else others).append(os.path.join(place, name))
    if not files:
        raise ValueError(
            f"{folder}: expected {EXPECTED} in it, got {f'others, as {min(others)}' if others else 'none'}"
        )
    if others:
        say(f"{folder}: {len(others)} other files are left out, as {min(others)}")
    return sorted(files)


def _unreadable(error: OSError) -> NoReturn:
    """A folder that cannot be read would be left out in silence."""
    raise ValueError(f"{error.filename}: cannot be read: {error.strerror or first_line(error)}") from error


def _is_model(folder: str) -> bool:
    """Whether it is the folder of a model or a selector: a configuration beside weights or modules."""
    if not os.path.isfile(os.path.join(folder, "config.json")):
        return False
    return any(name == "modules.json" or name.endswith(WEIGHTS) for name in os.listdir(folder))


def _listed(path: Path, of: Callable[[Any], T]) -> T:
    """What ``of`` finds in a file of the library datasets. ValueError where it is not there."""
    try:
        return of(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read, save the dataset again: {first_line(error)}") from error


def _visible(name: str) -> bool:
    return not name.startswith((".", "_"))


def copy_stdin(target: Path) -> str:
    """Write standard input to ``target``, so that several workers can read it, and more than once. Returns the SHA-256.

    Raises:
        ValueError: standard input is closed.
    """
    if sys.stdin is None:
        raise ValueError(f"{STDIN}: standard input is closed")
    # Bytes if it is a byte stream: its own decoder follows the locale and may accept bytes that are not UTF-8.
    stream = getattr(sys.stdin, "buffer", None)
    pieces: Iterable[bytes] = map(str.encode, sys.stdin) if stream is None else iter(lambda: stream.read(PIECE), b"")
    digest = hashlib.sha256()
    with open(target, "wb") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()

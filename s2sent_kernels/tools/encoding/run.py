"""A run: its folder is begun or taken up, an engine does the missing parts, and the folder is finished or joined into a file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ... import waiting
from ...files import locked, missing, remove_empty, sync_folder, write_atomically
from ..progress import Progress, spread, stepwise
from . import begun
from .begin import DEFAULTS, Options, begin, check_owner, clear, has_work, hidden, remove_manifest, shown
from .finish import check, finish
from .join import OUTPUTS, join
from .local import Engine
from .parts import SLICE, Done, Job, restamp
from .plan import PLAN, Part, Plan, Request, state
from .provenance import sidecar, sidecar_of
from .reading import Reader
from .reuse import unchanged
from .stock import (
    FAILED,
    JOINED,
    LOCK,
    check_extra,
    each,
    is_of_another,
    is_there,
)

SAMPLED_PARTS, SAMPLED_TEXTS = 4, 64  # of these parts at most so many texts each, or a few more


class Failed(ValueError):
    """Parts could not be encoded because of their data. ``row``: the first line or row of which that is said, if it is of one."""

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


def encode_file(request: Request, engine: Engine, output: Path, options: Options = DEFAULTS) -> int:
    """Write ``output``, which appears when it is complete, and return its number of rows. Parquet has columns ``id``,
    ``embedding`` (D numbers) and, with ``keep_text``, ``text``; .npy is an array [rows, D], with ``request.about`` in a file
    beside it. Parts of an earlier run of the same request are kept, and those whose rows are the same although the inputs have
    changed. Rows that are skipped are noted in a file beside ``output``, whose name ends in ``.failed.jsonl``.

    Raises:
        ValueError: an input or a row is wrong; ``output`` has another suffix than OUTPUTS; another process writes it; there are
            parts of a run with other options, and ``force`` is False.
    """
    if output.suffix.lower() not in OUTPUTS:
        raise ValueError(f"{output}: expected a file of {', '.join(OUTPUTS)}, got suffix {output.suffix!r}")
    if request.keep_text and output.suffix.lower() == ".npy":
        raise ValueError(f"{output}: an array holds no texts: expected .parquet")
    folder = hidden(output)
    with _taken(folder, LOCK):
        try:
            plan = begin(folder, request, options, LOCK, alone=True)
            for done in _encode(plan, folder, engine, plan.parts, options):
                if done.failure is not None:
                    kept = ": what is encoded stays for the same command after a repair"
                    raise Failed(done.failure + (kept if has_work(folder) else ""), done.row)
        except BaseException:
            if not has_work(folder):
                _remove(folder)
            raise
        checked, notes = check(plan, folder), output.with_name(f"{output.name}.{FAILED}")
        checked.say(plan, options.say)
        checked.say_skipped(plan, notes, options.say)
        whole = folder / f"whole{output.suffix}"
        with waiting.told(f"joining {len(plan.parts):,} parts"):
            join(plan, folder, whole)
        note = sidecar_of(plan.about, whole)
        if note is not None:
            write_atomically(sidecar(whole), note, sync=True)
        write_atomically(folder / JOINED, json.dumps(state(str(whole))[1:]).encode(), sync=True)
        if checked.skipped:
            write_atomically(notes, checked.notes(), sync=True)
        else:
            notes.unlink(missing_ok=True)  # of the output that is replaced
        if note is not None:
            sidecar(output).unlink(missing_ok=True)  # it tells of the array that is replaced
        os.replace(whole, output)
        sync_folder(output.parent)
        _settle(folder, output)
        return sum(part.rows for part in plan.parts)


def remove_leftovers(output: Path) -> None:
    """Remove the parts of a whole ``output``, which a run left that was killed between its last two steps. Parts of which it
    cannot be told that they became ``output`` are kept."""
    folder = hidden(output)
    if (folder / JOINED).exists():
        with contextlib.suppress(ValueError, FileNotFoundError), locked(folder / LOCK, wait=False):
            if json.loads((folder / JOINED).read_text(encoding="utf-8")) == state(str(output))[1:]:
                _settle(folder, output)


def _settle(folder: Path, output: Path) -> None:
    """The parts became ``output``: the file beside it follows, and what is left is removed."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(sidecar(folder / f"whole{output.suffix}"), sidecar(output))
        sync_folder(output.parent)
    _remove(folder)


def encode_folder(request: Request, engine: Engine, folder: Path, options: Options = DEFAULTS) -> int:
    """Write parts into ``folder``: those of a shard or, with ``manifest.json`` at the end, all. Returns the rows of those parts.
    Parts that are there are kept. What fails by its data is written to ``failed.jsonl`` (a shard's to a file of its own), and
    the others are encoded.

    Raises:
        Failed: parts failed. The next run tries them again.
        ValueError: an input is wrong; the folder has parts of another plan or other files; another process writes them.
    """
    shard = options.shard
    own = "" if shard is None else f"-{shard.number}-of-{shard.total}"
    with _taken(folder, f"{LOCK}{own}"):
        with locked(folder / f"{LOCK}-plan", wait=True):  # shards that begin together wait for the first one's plan
            plan = begin(folder, request, options, f"{LOCK}{own}")
            check_extra(folder, plan)
        parts = [part for part in plan.parts if shard is None or shard.takes(part)]
        note = folder / FAILED.replace(".", f"{own}.")
        note.unlink(missing_ok=True)
        failures: list[int | None] = []
        for done in _encode(plan, folder, engine, parts, options):
            if done.failure is not None:
                failures.append(done.row)
                file = plan.sources[done.part.source].name
                failure = {"part": done.part.number, "file": file, "row": done.row, "error": done.failure}
                with open(note, "a", encoding="utf-8") as notes:
                    notes.write(json.dumps(failure) + "\n")
        if failures:
            raise Failed(
                f"{folder}: {len(failures):,} of {len(parts):,} parts could not be encoded: see {note}", failures[0]
            )
        if shard is None:
            finish(folder, options.say)
    return sum(part.rows for part in parts)


@contextlib.contextmanager
def _taken(folder: Path, lock: str) -> Iterator[None]:
    """The folder and a lock in it. If the run could not begin, what this call made is removed again. A folder of another program
    gets not even a lock."""
    if folder.is_dir():
        check_owner(folder)
    made = missing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / lock, wait=False, name=shown(folder)):
            try:
                yield
            except BaseException:
                if made and folder.exists() and not (folder / PLAN).exists():
                    _remove_locks(folder, lock)
                raise
    except BaseException:
        remove_empty(made)
        raise


def _remove_locks(folder: Path, own: str) -> None:
    """This call's lock, and that of the plan unless another shard holds it."""
    with contextlib.suppress(ValueError), locked(folder / f"{LOCK}-plan", wait=False):
        (folder / f"{LOCK}-plan").unlink(missing_ok=True)
    (folder / own).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Removes the hidden folder of an output file."""
    clear(folder, locks=True)
    remove_empty([folder])


def _encode(plan: Plan, folder: Path, engine: Engine, parts: Sequence[Part], options: Options) -> Iterator[Done]:
    """Yields what became of the parts that are not there yet."""
    names = set(os.listdir(folder))
    absent = [part for part in parts if part.name not in names]
    known, digest = [part for part in parts if part.name in names], plan.digest
    whole = each(lambda part: is_there(folder, part, digest, options.skip), known)
    with contextlib.closing(stepwise(known, "checking", "parts")) as checked:
        broken = [part for part, good in zip(checked, whole, strict=True) if not good]
    job = Job.of(plan, folder, options.skip)
    for part in unchanged(plan, folder, [part for part in broken if is_of_another(folder, part, digest)]):
        restamp(job, part)  # of a run that was killed before it came to this
        broken.remove(part)
    todo = sorted([*absent, *broken])
    total, left = (sum(part.rows for part in some) for some in (parts, todo))
    before = total - left + begun.texts(folder, plan, todo)
    if before and todo:
        options.say(f"{shown(folder)}: going on after {before:,} of {total:,} texts")
    if broken:
        options.say(f"{shown(folder)}: {len(broken):,} parts are damaged, as {broken[0].name}, and are encoded again")
    if todo:
        remove_manifest(folder)
        options.ready()
        with (
            Progress(total, before, bar=options.bar) as progress,
            contextlib.closing(engine(job, todo, progress)) as results,
        ):
            yield from results


def sample(job: Job, parts: Sequence[Part]) -> list[str]:
    """A few texts of the parts, from which it can be told how many tokens a text has. Rows without a text are passed over."""
    found: list[str] = []
    reader = Reader(job.columns, skip=True)
    for part in parts[:: -(-len(parts) // SAMPLED_PARTS)]:
        for some in reader.rows(job.sources[part.source], part.start, min(part.stop, part.start.row + SLICE), SLICE):
            found += spread([text for text in some.texts if text is not None], SAMPLED_TEXTS)
    return found

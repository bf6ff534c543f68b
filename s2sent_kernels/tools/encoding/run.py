"""A run: its folder is begun or taken up, an engine does the missing parts, and the folder is finished or joined into a file."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...files import importing, locked, missing, remove_empty, sync_folder, write_atomically
from ..tables import STDIN
from .finish import check, finish
from .join import OUTPUTS, join
from .local import Engine
from .parts import Done, Job
from .plan import COPY, PLAN, Part, Plan, Request, difference, digest_of, key_of, load, make, state
from .progress import Progress
from .provenance import sidecar, sidecar_of
from .sources import copy_stdin
from .stock import JOINED, LOCK, MANIFEST, check_extra, each, is_ours, is_there, of_plan, strangers

with importing(None, "encode"):
    from tqdm import tqdm

FAILED = "failed.jsonl"
Say = Callable[[str], None]


class Shard(NamedTuple):
    """Every ``total``-th part, from part ``number`` on."""

    number: int
    total: int

    def takes(self, part: Part) -> bool:
        return part.number % self.total == self.number


class Failed(ValueError):
    """Parts could not be encoded because of their data."""


class Options(NamedTuple):
    """How a run is done. None of it changes the result."""

    shard: Shard | None = None  # of a folder of parts
    force: bool = False  # replace the parts of another run, or a whole that is there
    bar: bool | None = None  # as in Progress
    say: Say = print


DEFAULTS = Options()


def hidden(output: Path) -> Path:
    """Where the parts of an output file are until they are joined."""
    return output.parent / f".{output.name}.parts"


def encode_file(request: Request, engine: Engine, output: Path, options: Options = DEFAULTS) -> int:
    """Write ``output``, which appears when it is complete, and return its number of rows. Parquet has columns ``id``,
    ``embedding`` (D numbers) and, with ``keep_text``, ``text``; .npy is an array [rows, D], with ``request.about`` in a file
    beside it. Parts of an earlier run of the same request are kept, those of another are thrown away.

    Raises:
        ValueError: an input or a row is wrong; ``output`` has another suffix than OUTPUTS; another process writes it.
    """
    if output.suffix.lower() not in OUTPUTS:
        raise ValueError(f"{output}: expected a file of {', '.join(OUTPUTS)}, got suffix {output.suffix!r}")
    if request.keep_text and output.suffix.lower() == ".npy":
        raise ValueError(f"{output}: an array holds no texts: expected .parquet")
    folder = hidden(output)
    with _taken(folder, LOCK):
        try:
            plan = _begin(folder, request, options._replace(force=True))
            for done in _encode(plan, folder, engine, plan.parts, options):
                if done.failure is not None:
                    raise Failed(done.failure)
        except BaseException:
            if not any(folder.glob("part-*")):
                _remove(folder)
            raise
        check(plan, folder).say(plan, options.say)
        whole = folder / f"whole{output.suffix}"
        join(plan, folder, whole)
        note = sidecar_of(plan.about, whole)
        if note is not None:
            write_atomically(sidecar(whole), note, sync=True)
        write_atomically(folder / JOINED, json.dumps(state(str(whole))[1:]).encode(), sync=True)
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
            plan = _begin(folder, request, options)
            check_extra(folder, plan)
        parts = [part for part in plan.parts if shard is None or shard.takes(part)]
        note = folder / FAILED.replace(".", f"{own}.")
        note.unlink(missing_ok=True)
        failures = 0
        for done in _encode(plan, folder, engine, parts, options):
            if done.failure is not None:
                failures += 1
                file = plan.sources[done.part.source].name
                failure = {"part": done.part.number, "file": file, "row": done.row, "error": done.failure}
                with open(note, "a", encoding="utf-8") as notes:
                    notes.write(json.dumps(failure) + "\n")
        if failures:
            raise Failed(f"{folder}: {failures} of {len(parts)} parts could not be encoded: see {note}")
        if shard is None:
            finish(folder, options.say)
    return sum(part.rows for part in parts)


@contextlib.contextmanager
def _taken(folder: Path, lock: str) -> Iterator[None]:
    """The folder and a lock in it. If the run could not begin, what this call made is removed again. A folder of another program
    gets not even a lock."""
    if folder.is_dir():
        _check_owner(folder)
    made = missing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / lock, wait=False):
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


def _check_owner(folder: Path) -> None:
    """ValueError if files of other programs are there, which a run would replace."""
    # The plan is looked for last: another shard may just have written it.
    if (others := strangers(folder)) and not (folder / PLAN).exists():
        raise ValueError(f"{folder}: expected an empty folder or one of parts, got one with {others[0]}")


def _begin(folder: Path, request: Request, options: Options) -> Plan:
    """The plan of ``request``: the one in ``folder``, or a new one.

    Raises:
        ValueError: another plan is there, and ``force`` is False, or files of other programs; what ``make`` raises.
    """
    copy, digest = folder / f".stdin.{uuid.uuid4().hex}", None
    try:
        if STDIN in request.inputs:
            digest = copy_stdin(copy)
        key = key_of(request, digest)
        known = _known(folder, options.force)
        anew = options.force and (folder / MANIFEST).exists()
        if known is not None and known.key == key and not anew:
            if digest is not None:
                os.replace(copy, folder / COPY)  # it is removed from a folder that is finished
            return known
        if known is not None and not options.force:
            why = difference(known.key, key)
            raise ValueError(f"{folder}: holds parts of another run ({why}): another folder, or --force to replace it")
        if not options.force and any(folder.glob("part-*")):
            raise ValueError(f"{folder}: holds parts without {PLAN}: another folder, or --force to replace it")
        # Without a plan that can be read, a part's own word for it counts, which is checked before anything is encoded.
        mine = [] if known is not None or anew else of_plan(folder, digest_of(key))
        if not anew and any(path.name not in mine for path in folder.glob("part-*")):
            options.say(f"{folder}: parts of another run are thrown away")
        _clear(folder, keep=(copy.name, *mine))
        return _planned(request, key, folder, None if digest is None else copy)
    finally:
        copy.unlink(missing_ok=True)


def _planned(request: Request, key: dict[str, Any], folder: Path, copy: Path | None) -> Plan:
    """A new plan. ``copy``: of standard input."""
    if copy is not None:
        os.replace(copy, folder / COPY)
    try:
        plan = make(request, key, folder)
        plan.save(folder)
        return plan
    except BaseException:
        if copy is not None:
            (folder / COPY).unlink(missing_ok=True)
        raise


def _known(folder: Path, replace: bool) -> Plan | None:
    """The plan in ``folder``; None if there is none, or a broken one that may be replaced.

    Raises:
        ValueError: it is broken; the files there are not those of a run.
    """
    try:
        known = load(folder)
    except ValueError:
        if not replace or strangers(folder):
            raise
        return None
    if known is None:
        _check_owner(folder)
    return known


def _clear(folder: Path, *, keep: Container[str] = (), locks: bool = False) -> None:
    """Removes what a run wrote, the manifest first, the plan last: parts without their plan would have no owner. JOINED, which
    allows to remove the others, stays longer still."""
    _remove_manifest(folder)
    names = [name for name in os.listdir(folder) if is_ours(name) and name not in keep]
    for name in sorted(names, key=lambda name: (name == JOINED, name == PLAN)):
        if locks or not name.startswith(LOCK):
            (folder / name).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Removes the hidden folder of an output file."""
    _clear(folder, locks=True)
    remove_empty([folder])


def _remove_manifest(folder: Path) -> None:
    """It says that the folder is complete."""
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)


def _encode(plan: Plan, folder: Path, engine: Engine, parts: Sequence[Part], options: Options) -> Iterator[Done]:
    """Yields what became of the parts that are not there yet."""
    names = set(os.listdir(folder))
    absent = [part for part in parts if part.name not in names]
    known, digest = [part for part in parts if part.name in names], plan.digest
    whole = each(lambda part: is_there(folder, part, digest), known)
    # Disabled where standard error is no terminal.
    checked = tqdm(whole, "checking", len(known), delay=2, leave=False, unit=" parts", disable=None)
    broken = [part for part, good in zip(known, checked, strict=True) if not good]
    todo = sorted([*absent, *broken])
    total, left = (sum(part.rows for part in some) for some in (parts, todo))
    if left < total:
        options.say(f"{folder}: going on after {total - left} texts")
    if broken:
        options.say(f"{folder}: {len(broken)} parts are damaged, as {broken[0].name}, and are encoded again")
    if todo:
        _remove_manifest(folder)
        with (
            Progress(total, total - left, bar=options.bar) as progress,
            contextlib.closing(engine(Job.of(plan, folder), todo, progress)) as results,
        ):
            yield from results

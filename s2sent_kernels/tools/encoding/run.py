"""A run: its folder is begun or taken up, an engine does the missing parts, and the folder is finished or joined into a file."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import uuid
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...files import importing, locked, missing, remove_empty, sync_folder, write_atomically
from ..progress import Progress
from ..tables import STDIN
from .finish import check, finish
from .join import OUTPUTS, join
from .local import Engine
from .parts import Done, Job, restamp
from .plan import COPY, PLAN, Part, Plan, Request, difference, digest_of, key_of, load, make, state
from .provenance import sidecar, sidecar_of
from .reuse import unchanged
from .sources import copy_stdin
from .stock import (
    FAILED,
    JOINED,
    LOCK,
    MANIFEST,
    PART,
    check_extra,
    each,
    is_of_another,
    is_ours,
    is_there,
    of_plan,
    strangers,
)

with importing(None, "encode"):
    from tqdm import tqdm

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
    """How a run is done. None of it changes an embedding."""

    shard: Shard | None = None  # of a folder of parts
    force: bool = False  # replace the parts of another run, or a whole that is there
    # Rows that cannot be encoded get NaN and are noted; else they fail their part, or the run of a file.
    skip: bool = False
    bar: bool | None = None  # as in Progress
    say: Say = print


DEFAULTS = Options()


def hidden(output: Path) -> Path:
    """Where the parts of an output file are until they are joined."""
    return output.parent / f".{output.name}.parts"


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
            plan = _begin(folder, request, options, LOCK, alone=True)
            for done in _encode(plan, folder, engine, plan.parts, options):
                if done.failure is not None:
                    kept = ": what is encoded stays for the same command after a repair"
                    raise Failed(done.failure + (kept if any(folder.glob("part-*")) else ""))
        except BaseException:
            if not any(folder.glob("part-*")):
                _remove(folder)
            raise
        checked, notes = check(plan, folder), output.with_name(f"{output.name}.{FAILED}")
        checked.say(plan, options.say)
        checked.say_skipped(plan, notes, options.say)
        whole = folder / f"whole{output.suffix}"
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
            plan = _begin(folder, request, options, f"{LOCK}{own}")
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


def _begin(folder: Path, request: Request, options: Options, lock: str, *, alone: bool = False) -> Plan:
    """The plan of ``request``: the one in ``folder``, or a new one.

    Args:
        lock: that this call holds.
        alone: nobody else reads ``folder``, on the way to a file. A broken plan is made anew where no part is lost by it, and
            rows without a text are looked for at once.

    Raises:
        ValueError: another plan is there, and ``force`` is False, or files of other programs; what ``make`` raises.
    """
    copy, digest = folder / f".stdin.{uuid.uuid4().hex}", None
    try:
        if STDIN in request.inputs:
            digest = copy_stdin(copy)
        key = key_of(request, digest)
        known = _known(folder, options.force or alone)
        anew = options.force and (folder / MANIFEST).exists()
        if known is not None and known.key == key and not anew:
            if digest is not None:
                os.replace(copy, folder / COPY)  # it is removed from a folder that is finished
            return known
        strict = alone and not options.skip
        planned = functools.partial(_planned, request, key, folder, None if digest is None else copy, strict)
        signed = functools.partial(_signed, request, folder)
        if known is not None and not anew and _differ_in_inputs(known.key, key):
            return _go_on(folder, planned, signed, options, lock)
        if known is not None and not options.force:
            raise ValueError(
                f"{folder}: holds parts of another run ({difference(known.key, key)}): the same options go on from them, "
                "--force throws them away"
            )
        # Without a plan that can be read, a part's own word for it counts, which is checked before anything is encoded.
        mine = [] if known is not None or anew else of_plan(folder, digest_of(key))
        others = [path for path in folder.glob("part-*") if path.name not in mine]
        if not options.force and (others or (mine and not alone)):
            raise ValueError(f"{folder}: holds parts without {PLAN}: another folder, or --force to replace it")
        plan = signed(planned())
        if others and not anew:
            options.say(f"{folder}: parts of another run are thrown away")
        _clear(folder, keep=(*mine, *(() if digest is None else (COPY,))))
        plan.save(folder)
        return plan
    finally:
        copy.unlink(missing_ok=True)


def _differ_in_inputs(known: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether two keys may differ in their inputs alone."""
    return {**known, "inputs": None} == {**wanted, "inputs": None}


def _go_on(
    folder: Path, planned: Callable[[], Plan], signed: Callable[[Plan], Plan], options: Options, lock: str
) -> Plan:
    """A new plan in the place of one of the same recipe, whose inputs were others: parts whose rows are the same stay, and those
    whose rows have changed are encoded again.

    Raises:
        ValueError: another process encodes by the old plan; without ``force``, no part would stay, or rows that have parts are no
            more among the inputs.
    """
    for other in folder.glob(f"{LOCK}*"):
        if other.name not in (lock, f"{LOCK}-plan"):
            with locked(other, wait=False):  # a shard's, which a process that was killed may have left
                pass
    plan = planned()
    there = {path.name for path in folder.iterdir() if re.fullmatch(PART, path.name)}
    same = unchanged(plan, folder, [part for part in plan.parts if part.name in there])
    beyond = there - {part.name for part in plan.parts}
    if there and not options.force and (beyond or not same):
        why = (
            f"{len(beyond)} of rows that are no more there"
            if beyond
            else "none with the texts that the inputs have now"
        )
        raise ValueError(
            f"{folder}: holds {len(there)} parts of another run (other inputs), {why}: --force throws them away"
        )
    plan = signed(plan)
    _remove_manifest(folder)
    for name in there - {part.name for part in same}:
        (folder / name).unlink()
    plan.save(folder)
    job = Job.of(plan, folder)
    for part in same:
        restamp(job, part)
    if there:
        options.say(
            f"{folder}: the inputs have changed: {len(same)} of {len(there)} parts have the texts that they had and stay"
        )
    return plan


def _planned(request: Request, key: dict[str, Any], folder: Path, copy: Path | None, strict: bool) -> Plan:
    """A new plan. ``copy``: of standard input."""
    if copy is not None:
        os.replace(copy, folder / COPY)
    try:
        return make(request, key, folder, strict=strict)
    except BaseException:
        if copy is not None:
            (folder / COPY).unlink(missing_ok=True)
        raise


def _signed(request: Request, folder: Path, plan: Plan) -> Plan:
    """The plan with what writes it, which is asked for when nothing else is left to judge: it may take long, and fail. Nothing of
    an earlier run is lost by then."""
    try:
        return plan if request.about is None else plan._replace(about=request.about())
    except BaseException:
        if STDIN in request.inputs:
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
    whole = each(lambda part: is_there(folder, part, digest, options.skip), known)
    # Disabled where standard error is no terminal.
    checked = tqdm(whole, "checking", len(known), delay=2, leave=False, unit=" parts", disable=None)
    broken = [part for part, good in zip(known, checked, strict=True) if not good]
    job = Job.of(plan, folder, options.skip)
    for part in unchanged(plan, folder, [part for part in broken if is_of_another(folder, part, digest)]):
        restamp(job, part)  # of a run that was killed before it came to this
        broken.remove(part)
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
            contextlib.closing(engine(job, todo, progress)) as results,
        ):
            yield from results

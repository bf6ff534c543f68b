"""A run is begun, or an interrupted one is taken up: which plan its folder has from now on, and which files in it stay."""

from __future__ import annotations

import functools
import os
import re
import uuid
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, NamedTuple

from ... import waiting
from ...files import locked, sync_folder
from ..tables import STDIN
from .begun import is_begun
from .join import OUTPUTS
from .parts import Job, restamp
from .plan import COPY, PLAN, Part, Plan, Request, difference, digest_of, key_of, load, make
from .reuse import unchanged
from .sources import copy_stdin
from .stock import JOINED, LOCK, MANIFEST, PART, is_ours, of_plan, strangers

Say = Callable[[str], None]


class Shard(NamedTuple):
    """Every ``total``-th part, from part ``number`` on."""

    number: int
    total: int

    def takes(self, part: Part) -> bool:
        return part.number % self.total == self.number


class Options(NamedTuple):
    """How a run is done. None of it changes an embedding."""

    shard: Shard | None = None  # of a folder of parts
    force: bool = False  # replace the parts of another run, or a whole that is there
    # Rows that cannot be encoded get NaN and are noted; else they fail their part, or the run of a file.
    skip: bool = False
    bar: bool | None = None  # as in Progress
    say: Say = print
    # Called where something is left to encode, before progress is shown: what takes long before the first text, and says so.
    ready: Callable[[], object] = lambda: None


DEFAULTS = Options()


def hidden(output: Path) -> Path:
    """Where the parts of an output file are until they are joined."""
    return output.parent / f".{output.name}.parts"


def shown(folder: Path) -> Path:
    """What messages call a folder of parts: an output file's by the file, which is what the user has named."""
    found = re.fullmatch(r"\.(.+)\.parts", folder.name)
    of_a_file = found is not None and Path(found[1]).suffix.lower() in OUTPUTS
    return folder.with_name(found[1]) if found is not None and of_a_file else folder


def has_work(folder: Path) -> bool:
    """Whether a run left parts there, or batches of them."""
    return any(name.startswith("part-") or is_begun(name) for name in os.listdir(folder))


def check_owner(folder: Path) -> None:
    """ValueError if files of other programs are there, which a run would replace."""
    # The plan is looked for last: another shard may just have written it.
    if (others := strangers(folder)) and not (folder / PLAN).exists():
        raise ValueError(
            f"output {folder}: it is there already and not empty, and {others[0]} in it is no part; name another, or remove "
            "what is in it"
        )


def begin(folder: Path, request: Request, options: Options, lock: str, *, alone: bool = False) -> Plan:
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
            with waiting.told("reading standard input"):
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
        nothing = alone and not has_work(folder)  # in a folder that other shards fill, one may be about to write a part
        if known is not None and not options.force and not nothing:
            if (folder / MANIFEST).exists():
                raise ValueError(
                    f"{shown(folder)}: is finished already, with other options ({difference(known.key, key)}): name another "
                    "--output, or --force throws it away"
                )
            raise ValueError(
                f"{shown(folder)}: the work of another run is kept ({difference(known.key, key)}): the same options go on from "
                "it, --force throws it away"
            )
        # Without a plan that can be read, a part's own word for it counts, which is checked before anything is encoded.
        mine = [] if known is not None or anew else of_plan(folder, digest_of(key))
        others = [path for path in folder.glob("part-*") if path.name not in mine]
        if not options.force and (others or (mine and not alone)):
            raise ValueError(f"{folder}: holds parts without {PLAN}: another folder, or --force to replace it")
        plan = signed(planned())
        if not anew and (others or (known is not None and has_work(folder))):
            options.say(f"{shown(folder)}: the work of another run is thrown away")
        mine += [] if known is not None or anew else [name for name in os.listdir(folder) if is_begun(name)]
        clear(folder, keep=(*mine, *(() if digest is None else (COPY,))))
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
            f"{len(beyond):,} of rows that are no more there"
            if beyond
            else "none with the texts that the inputs have now"
        )
        finished = (folder / MANIFEST).exists()
        what = (
            "is finished already, with other inputs" if finished else "the work of another run is kept (other inputs)"
        )
        remedy = "name another --output, or --force throws it away" if finished else "--force throws it away"
        raise ValueError(f"{shown(folder)}: {what}, {len(there):,} parts, {why}: {remedy}")
    plan = signed(plan)
    remove_manifest(folder)
    for name in there - {part.name for part in same}:
        (folder / name).unlink()
    plan.save(folder)
    job = Job.of(plan, folder)
    for part in same:
        restamp(job, part)
    if there:
        options.say(
            f"{shown(folder)}: the inputs have changed: {len(same):,} of {len(there):,} parts have the texts that they had "
            "and stay"
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
        check_owner(folder)
    return known


def clear(folder: Path, *, keep: Container[str] = (), locks: bool = False) -> None:
    """Removes what a run wrote, the manifest first, the plan last: parts without their plan would have no owner. JOINED, which
    allows to remove the others, stays longer still."""
    remove_manifest(folder)
    names = [name for name in os.listdir(folder) if is_ours(name) and name not in keep]
    for name in sorted(names, key=lambda name: (name == JOINED, name == PLAN)):
        if locks or not name.startswith(LOCK):
            (folder / name).unlink(missing_ok=True)


def remove_manifest(folder: Path) -> None:
    """It says that the folder is complete."""
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)

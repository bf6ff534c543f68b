"""The engine "local": this process, or one process a device, which take parts from one queue."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ...files import importing
from ..progress import Progress
from .parts import Done, Encoder, Job, Worker
from .plan import Part

with importing(None, "encode"):
    from tqdm import tqdm

LOOK_EVERY = 1.0  # seconds, at what workers have done meanwhile
MakeEncoder = Callable[[str], Encoder]  # from the name of a device; pickled
# Encodes parts and yields what became of each, in any order.
Engine = Callable[[Job, Sequence[Part], Progress], Generator[Done, None, None]]


def in_this_process(encoder: Encoder) -> Engine:
    """An ``Engine`` of one encoder."""

    def engine(job: Job, parts: Sequence[Part], progress: Progress) -> Generator[Done, None, None]:
        worker = Worker(job, encoder, progress.advance, progress.begin)
        yield from map(worker.part, parts)

    return engine


def one_process_a_device(make: MakeEncoder, devices: Sequence[str]) -> Engine:
    """An ``Engine`` of one process for each of ``devices``, which makes its encoder itself.

    Raises:
        RuntimeError: a process ended; a part that it had begun is not there.
    """

    def engine(job: Job, parts: Sequence[Part], progress: Progress) -> Generator[Done, None, None]:
        context = multiprocessing.get_context("spawn")
        names = context.SimpleQueue()
        for place in enumerate(devices):
            names.put(place)
        # Of each worker, which alone writes there: rows, tokens, and how often its time was to be counted anew.
        counts = context.RawArray("q", 3 * len(devices))
        seen = [0, 0, 0]

        def look() -> None:
            now = [sum(counts[0::3]), sum(counts[1::3]), sum(counts[2::3])]
            if now[0] == seen[0] and (not now[2] or now[2] != seen[2]):
                progress.begin()
            progress.advance(now[0] - seen[0], now[1] - seen[1])
            seen[:] = now

        pool = ProcessPoolExecutor(len(devices), context, _begin, (job, make, names, counts))
        try:
            for done in _in_flight(pool, parts, 2 * len(devices), look):
                look()
                yield done
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process ended, or could not begin; the same command goes on where it stopped"
            ) from error
        except BaseException:
            for process in list((pool._processes or {}).values()):  # nobody will ask for the parts that they have begun
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    return engine


def _in_flight(pool: ProcessPoolExecutor, parts: Sequence[Part], most: int, look: Callable[[], None]) -> Iterator[Done]:
    """The parts in ascending order, a few of them handed out: a run may have a million. ``look`` is called meanwhile."""
    todo = iter(parts)
    running = {pool.submit(_part, part) for part in itertools.islice(todo, most)}
    while running:
        done, running = wait(running, LOOK_EVERY, FIRST_COMPLETED)
        look()
        for future in done:
            if (part := next(todo, None)) is not None:
                running.add(pool.submit(_part, part))
            yield future.result()


# ---------------------------------------------------------------- in a worker process

_worker: Worker


def _begin(job: Job, make: MakeEncoder, names: Any, counts: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent ends its workers
    tqdm.set_lock(threading.RLock())  # its own is the system's, and would be left behind by a worker that is ended
    threading.Thread(target=_end_with_parent, daemon=True).start()
    number, device = names.get()
    _take(device, len(counts) // 3)

    def advance(rows: int, tokens: int | None) -> None:
        counts[3 * number] += rows
        counts[3 * number + 1] += tokens or 0

    def again() -> None:
        counts[3 * number + 2] += 1

    global _worker
    _worker = Worker(job, make(device), advance, again)
    again()  # until now it was loaded


def _take(device: str, count: int) -> None:
    """This process's part of the machine, one of ``count``: its share of the CPU's threads, or its GPU as the current one before
    anything touches another."""
    import torch

    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    elif torch.device(device).index is not None:
        torch.cuda.set_device(device)


def _end_with_parent() -> None:
    """A pool's processes would wait for parts forever if their parent were killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _part(part: Part) -> Done:
    return _worker.part(part)

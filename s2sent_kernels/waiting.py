"""A line on standard error where a command has been silent for a while: what it waits for, or how far it is."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from time import monotonic as clock
from time import process_time
from types import TracebackType
from typing import Any

SILENCE = 3.0  # seconds
PROGRESS_EVERY = 5.0  # seconds between two lines about the same
SHORT = 1.0  # seconds that are no wait, however long the silence before
LOOK = 1.0  # seconds between two looks at the clock


def _until_due(silence: float) -> float:
    """Seconds until nothing was said for ``silence``, since this command began or since its last line on standard error."""
    return min(silence, max(SHORT, silence - (clock() - _last)))


# What was imported before, as torch, was silent, too: about as long as this process has computed.
_last = clock() - process_time()


@contextlib.contextmanager
def told(what: str, wanted: bool = True) -> Iterator[None]:
    """Say ``what``, as "loading the encoder", if the ``with`` block lasts until nothing was said for SILENCE: several short waits
    are a long one. After that, for how long it has lasted. Of a training's processes the first one says it.

    Args:
        wanted: whether anything may be said.
    """
    if not wanted or os.environ.get("RANK", "0") != "0":
        yield
        return
    begun, said = clock(), itertools.count()

    def line() -> str:
        return f"{what} ..." + (f" {clock() - begun:.0f} s" if next(said) else "")

    with Lines(line, PROGRESS_EVERY, SILENCE) as lines:
        lines.look()
        yield


class Lines:
    """In its ``with`` block says how far the work is wherever nothing was said for a while: soon the first time, so that the time
    left is known. A thread looks at the clock, since a single step may last for minutes.

    Args:
        line: what is said now.
        every: seconds between two lines.
        first: seconds of silence before the first one; by default SILENCE, or ``every`` where that is less.
    """

    def __init__(self, line: Callable[[], str], every: float, first: float | None = None) -> None:
        self._line, self._every, self._wait = line, every, 0.0
        self._first = first
        self._said = 0.0
        self._others = 0  # who are inside ``left_to_another``
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def look(self) -> None:
        """Say the line if it is due."""
        with self._lock:
            now = clock()
            if self._others or self._over.is_set() or now - self._said < self._wait:
                return
            self._said, self._wait = now, self._every
            say(self._line())

    def heard(self) -> None:
        """Something else was said."""
        global _last
        _last = self._said = clock()

    @contextlib.contextmanager
    def left_to_another(self) -> Iterator[None]:
        """In here something else says how far it is."""
        self._others += 1
        try:
            yield
        finally:
            self._others -= 1
            self.heard()

    def __enter__(self) -> Lines:
        first = min(SILENCE, self._every) if self._first is None else self._first
        self._said, self._wait = clock(), _until_due(first)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK):
            self.look()


def say(line: str) -> None:
    """Print it on standard error, if there is one: on a line of its own where a bar of progress is drawn. In one piece, between
    whose parts no other thread's line comes."""
    global _last
    _last = clock()
    if sys.stderr is not None:
        bars = _tqdm().external_write_mode(sys.stderr) if _drawn() else contextlib.nullcontext()
        with bars:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def _tqdm() -> Any:
    """Its class of bars, if anybody has imported it."""
    return getattr(sys.modules.get("tqdm.std"), "tqdm", None)


def _drawn() -> list[Any]:
    return list(getattr(_tqdm(), "_instances", ()))


def end_bars() -> None:
    """Close every bar of progress that is drawn, whosever it is: a generator or the trainer may still have one open. The line
    that is printed next says why the command ends, and no bar may follow it."""
    for bar in sorted(_drawn(), key=lambda bar: abs(getattr(bar, "pos", 0)), reverse=True):  # the lowest first
        bar.close()


def say_last(line: str) -> None:
    """As ``say``, of a command that ends before its work does."""
    end_bars()
    say(line)

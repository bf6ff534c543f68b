"""A line on standard error where a command has been silent for a while: what it waits for, or how far it is."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from time import monotonic as clock
from time import process_time
from types import TracebackType

SILENCE = 3.0  # seconds
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
    are a long one. Of a training's processes the first one says it.

    Args:
        wanted: whether anything may be said.
    """
    timer = threading.Timer(_until_due(SILENCE), say, [f"{what} ..."])
    timer.daemon = True
    if wanted and os.environ.get("RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Lines:
    """In its ``with`` block says how far the work is wherever nothing was said for a while: soon the first time, so that the time
    left is known. A thread looks at the clock, since a single step may last for minutes.

    Args:
        line: what is said now.
        every: seconds between two lines.
    """

    def __init__(self, line: Callable[[], str], every: float) -> None:
        self._line, self._every, self._wait = line, every, 0.0
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
        self._said, self._wait = clock(), _until_due(min(SILENCE, self._every))
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK):
            self.look()


def say(line: str) -> None:
    """Print it on standard error, if there is one."""
    global _last
    _last = clock()
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def end_bars() -> None:
    """Close every bar of progress that is drawn, whosever it is: a generator or the trainer may still have one open. The line
    that is printed next says why the command ends, and no bar may follow it."""
    drawn = getattr(getattr(sys.modules.get("tqdm.std"), "tqdm", None), "_instances", ())
    for bar in sorted(drawn, key=lambda bar: abs(getattr(bar, "pos", 0)), reverse=True):  # the lowest first
        bar.close()


def say_last(line: str) -> None:
    """As ``say``, of a command that ends before its work does."""
    end_bars()
    say(line)

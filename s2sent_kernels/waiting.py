"""A line on standard error where a command has been silent for a while: what it waits for, or how far it is."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

SILENCE = 3.0  # seconds


def first(every: float) -> float:
    """Seconds until the first of the lines of progress that then come ``every`` so many."""
    return min(SILENCE, every)


@contextlib.contextmanager
def told(what: str, wanted: bool = True) -> Iterator[None]:
    """Say ``what``, as "loading the encoder", if the ``with`` block lasts longer than SILENCE.

    Args:
        wanted: whether anything may be said.
    """
    timer = threading.Timer(SILENCE, say, [f"{what} ..."])
    timer.daemon = True
    if wanted:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say(line: str) -> None:
    """Print it on standard error, if there is one."""
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)

"""The console script `s2sent`. It is outside the package, whose import loads torch, for a second or more and from a cold disk for
many: an interruption then ends the process at once, as one at any later time does, without a traceback. A long import is told."""

# PYTHON_ARGCOMPLETE_OK: argcomplete looks here for the mark of the console script.

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT
SILENCE = 3.0  # seconds, as in s2sent_kernels/waiting.py, which cannot be imported without torch


def _end(*_: Any) -> NoReturn:
    """Nothing has been begun that would have to be cleaned up. An exception could be taken for a library that is missing."""
    os.write(2, b"s2sent: error: interrupted\n")
    os._exit(INTERRUPTED)


def _tell() -> None:
    if sys.stderr is not None:
        print("importing torch ...", file=sys.stderr, flush=True)


def main() -> int:
    """The exit code of the command, as ``s2sent_kernels.cli.main`` says it."""
    timer = threading.Timer(SILENCE, _tell)
    timer.daemon = True
    # A shell that completes reads no line, and of a training's processes the first one speaks.
    if "_ARGCOMPLETE" not in os.environ and os.environ.get("RANK", "0") == "0":
        timer.start()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else SIGINT is ignored, as of a process in the background, and stays so
        signal.signal(signal.SIGINT, _end)
    try:
        from s2sent_kernels.cli import main as run
    finally:
        timer.cancel()
    try:
        signal.signal(signal.SIGINT, before)
        return run()
    except KeyboardInterrupt:  # before the command could take care of it, or behind
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

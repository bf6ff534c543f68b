"""The console script `s2sent`. It is outside the package, whose import loads torch, for a second or more: an interruption then
ends the process at once, as one at any later time does, without a traceback."""

# PYTHON_ARGCOMPLETE_OK: argcomplete looks here for the mark of the console script.

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT


def _end(*_: Any) -> NoReturn:
    """Nothing has been begun that would have to be cleaned up. An exception could be taken for a library that is missing."""
    os.write(2, b"s2sent: error: interrupted\n")
    os._exit(INTERRUPTED)


def main() -> int:
    """The exit code of the command, as ``s2sent_kernels.cli.main`` says it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else SIGINT is ignored, as of a process in the background, and stays so
        signal.signal(signal.SIGINT, _end)
    from s2sent_kernels.cli import main as run

    try:
        signal.signal(signal.SIGINT, before)
        return run()
    except KeyboardInterrupt:  # before the command could take care of it, or behind
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

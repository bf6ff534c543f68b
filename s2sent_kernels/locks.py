"""Folders that somebody works in for hours: one process at a time, and nothing left where it came to nothing."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock of the file ``path``, which is made where it is not there. The system lets it go when the process ends,
    however it ends.

    Raises:
        ValueError: another process holds it, and it is not to be waited for; names the folder.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ValueError(f"{path.parent}: another process is writing there") from error
        yield


def missing(folder: Path) -> list[Path]:
    """The folders that have to be made for ``folder`` to be there, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Those of the folders that hold nothing: another process may have put something into one."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()

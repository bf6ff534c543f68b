"""One process at a time: files that are locked for as long as somebody works beside them."""

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

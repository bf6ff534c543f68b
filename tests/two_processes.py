"""Two processes of one training, as torchrun starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_both(file, call):
    """What the processes print that call ``call``, as "train(3)", a function of the test module ``file``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    path = Path(file)
    code = f"import sys; sys.path[:0] = {[str(path.parent), *sys.path]!r}; import {path.stem} as t; t.{call}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **address, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        told = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0]
    return told

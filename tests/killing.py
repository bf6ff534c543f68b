"""Processes that end at one of their file operations, as by SIGKILL: no clean-up, nothing that was buffered is written."""

import builtins
import io
import os
import signal
import sys
import time
import traceback

# Events of audit hooks, and which of their arguments is the open folder that a name is relative to.
CHANGES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1, "os.truncate": None, "os.chmod": 2}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
POINTS = int(os.environ.get("S2SENT_KILL_POINTS", "10"))
KILLED, SECONDS = 99, 120


def contents(folder):
    """Every file's bytes, by its path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def operations(root, function):
    """How many operations on files below ``root`` a call of ``function`` has. It is called in a forked process."""
    reading, writing = os.pipe()

    def counted():
        count = _watch(root, None)
        function()
        os.write(writing, str(count[0]).encode())

    assert _child(counted) == 0
    os.close(writing)
    with open(reading) as file:
        return int(file.read())


def finished(function):
    """Call ``function`` in a forked process, whose memory and limits are its own."""
    assert _child(function) == 0


def points(count, most=POINTS):
    """``most`` of the steps 1 to ``count``, apart from one another as far as can be; the first and the last are among them."""
    most = min(most, count)
    return sorted({1 + round(i * (count - 1) / max(1, most - 1)) for i in range(most)})


def killed_at(step, root, function):
    """Call ``function`` in a forked process that ends before its ``step``-th operation on a file below ``root``. False if it had
    fewer."""

    def watched():
        _watch(root, step)
        function()

    code = _child(watched)
    assert code in (0, KILLED), f"exit code {code} at step {step}"
    return code == KILLED


def _watch(root, step):
    """In this process, from now on: the number of operations, in a list."""
    count, root = [0], os.path.realpath(root)

    def one():
        count[0] += 1
        if count[0] == step:
            os._exit(KILLED)

    def mine(path, folder=-1):
        if isinstance(path, int):
            return True
        try:
            within = os.readlink(f"/proc/self/fd/{folder}") if folder not in (-1, None) else ""
            return os.path.realpath(os.path.join(within, os.fsdecode(path))).startswith(root)
        except (TypeError, OSError):
            return False

    def hook(event, args):
        if event in CHANGES:
            at = CHANGES[event]
            if mine(args[0], -1 if at is None else args[at]):
                one()
        elif event == "open" and args[2] & WRITING and not isinstance(args[0], int) and mine(args[0]):
            one()

    plain, fsync = builtins.open, os.fsync

    def opened(path, mode="r", *rest, **options):
        file = plain(path, mode, *rest, **options)
        if set(mode) & set("wax+") and not isinstance(path, int) and mine(path):
            one()  # the file is there and empty
        return file

    def synced(handle):
        one()
        fsync(handle)

    builtins.open = io.open = opened
    os.fsync = synced
    sys.addaudithook(hook)
    return count


def _child(function):
    """The exit code of a forked process that calls ``function``."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the process did not end within {SECONDS} s")

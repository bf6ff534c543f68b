"""The command ``s2sent``: parses arguments, runs a subcommand of ``commands``, and reports every error in one line."""

# PYTHON_ARGCOMPLETE_OK: argcomplete looks for this where it completes every program, and not only those that are registered.

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from . import __version__, waiting
from .commands import cache, demo, doctor, encode, evaluate, export, inspect, predict, search, train
from .commands.common import UserError, first_line
from .commands.parser import Parser, in_options, options
from .engines import choice
from .files import MissingPackage, disk_is_full
from .probe import UnknownNorm
from .sources import LoadError
from .validate import DEBUG_VARIABLE

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (demo, doctor, train, predict, evaluate, encode, search, export, inspect, cache)
}
COMPUTE_NOTHING = (doctor, cache)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="s2sent", description="Sentence embeddings from several Transformer blocks (S2Sent).")
    parser.add_argument("--version", action="version", version=f"s2sent_kernels {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    for module in COMMANDS.values():
        module.add(commands)
    return parser


def _run(argv: Sequence[str] | None) -> None:
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow, and reads no other output
        _complete(parser)
    arguments = parser.parse_args(argv)
    try:
        if COMMANDS[arguments.command] not in COMPUTE_NOTHING:
            _check_environment()
        COMMANDS[arguments.command].run(arguments)
    except UserError as error:
        raise UserError(in_options(str(error), options(parser, arguments.command), arguments)) from error
    if sys.stdout is not None:
        sys.stdout.flush()  # flush here, so that main reports a write error; at interpreter shutdown it would be too late


def _check_environment() -> None:
    """Before a model is loaded, and before what it names is taken for a fault of the inputs."""
    try:
        choice.check_environment()
    except ValueError as error:
        raise UserError(str(error)) from error


def _complete(parser: argparse.ArgumentParser) -> NoReturn:
    """Answer the shell, if argcomplete is installed: no answer is one, too, and files are completed."""
    with contextlib.suppress(ImportError):
        import argcomplete

        argcomplete.autocomplete(parser)  # ends the process
    sys.exit(1)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Turn SIGTERM, which schedulers send to end a job, into an exception, so that temporary files and worker processes are
    cleaned up. Not under torchrun, which ends its processes itself: one that cleans up might wait for another that is gone."""
    if threading.current_thread() is not threading.main_thread() or "RANK" in os.environ:
        yield
        return

    owner = os.getpid()

    def end(*_: Any) -> NoReturn:
        if os.getpid() != owner:  # a forked child, which must not run this process's clean-up
            os._exit(128 + signal.SIGTERM)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(BaseException):
    """Like KeyboardInterrupt, not caught by ``except Exception``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0; 2 after an error, reported in one line on stderr; 128 plus the signal's number
    if a signal ended it."""
    # Escape what stdout's encoding cannot represent, as a file name that is not UTF-8.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _terminated_as_interrupted():
            _run(argv)
        return 0
    except (UserError, LoadError, MissingPackage, UnknownNorm) as error:
        return _fail(str(error), 2)
    except BrokenPipeError:  # the reader closed the pipe
        # Replace stdout, so that the flush at interpreter shutdown does not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except _Terminated:
        return _fail("terminated", 128 + signal.SIGTERM)
    except Exception as error:
        known = isinstance(error, (OSError, RuntimeError, MemoryError))  # memory, disk or device
        if os.environ.get(DEBUG_VARIABLE) == "1" or not (known or disk_is_full(error)):
            raise
        return _fail(f"{type(error).__name__}: {first_line(error)} ({DEBUG_VARIABLE}=1 shows where)", 2)


def _fail(message: str, code: int) -> int:
    waiting.say_last(f"s2sent: error: {' '.join(message.split())}")
    return code


if __name__ == "__main__":
    sys.exit(main())

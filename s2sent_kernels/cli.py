"""The command ``s2sent``: ``demo`` runs the selector on real sentences, ``doctor`` says what is usable here."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch

from . import __version__, demo
from .commands import encode, evaluate, export, inspect, train
from .commands.common import UserError, first_line, path, positive
from .engines.choice import BACKEND_VARIABLE, BACKENDS, backends, choose
from .formula.call import Call
from .validate import DEBUG_VARIABLE

VARIABLES = (BACKEND_VARIABLE, DEBUG_VARIABLE, "TRITON_INTERPRET")
PACKAGES = ("torch", "triton", "transformers")


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments as every other error of the command is reported: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see '{self.prog} --help')")


def _blocks(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


# argparse puts the name into its messages.
_blocks.__name__ = "list of block numbers"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="s2sent", description="Sentence embeddings from several Transformer blocks (S2Sent).")
    parser.add_argument("--version", action="version", version=f"s2sent_kernels {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)

    run = commands.add_parser("demo", help="fuse an encoder's blocks on real sentences", description=demo.__doc__)
    run.add_argument("--model", help="path or hub id of an encoder (default: all-MiniLM-L6-v2, bundled)")
    run.add_argument(
        "--file", type=path, help="text file, one sentence a line, queries begin with '? ' (default: bundled)"
    )
    run.add_argument(
        "--output-dir", type=path, default="demo_output", help="where the pictures go (default: ./demo_output)"
    )
    run.add_argument("--top", type=positive, default=3, help="sentences to print for each query (default: 3)")
    run.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="default: auto")
    run.add_argument("--device", help="a torch device (default: cuda where there is one, else cpu)")
    run.add_argument("--blocks", type=_blocks, help="blocks to fuse, 0 the lowest, as in 3,4,5 (default: all)")

    about = "print versions, the backends and why they are or are not usable"
    commands.add_parser("doctor", help=about, description=about)
    for module in (train, evaluate, encode, export, inspect):
        module.add(commands)
    return parser


def doctor() -> None:
    """Print what a bug report needs: versions, devices, environment variables, backends and reasons."""
    lines = [("s2sent_kernels", __version__), ("python", f"{platform.python_version()}, {platform.platform()}")]
    for package in PACKAGES:
        try:
            lines.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            lines.append((package, "not installed"))
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        lines.append(("CUDA", f"torch was built with {torch.version.cuda or 'none'}"))
        for index in range(torch.cuda.device_count()):
            capability = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
            lines.append((f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {capability}"))
    else:
        lines.append(("CUDA", f"torch was built with {torch.version.cuda or 'none'}; no device"))
    lines += [(name, os.environ.get(name, "not set")) for name in VARIABLES]
    for name, status in backends().items():
        lines.append((f"backend {name}", f"{'usable' if status.usable else 'not usable'}: {status.reason}"))
    for device in devices:
        try:
            chosen = choose("auto", Call(torch.device(device), torch.float32))
        except ValueError as error:
            chosen = f"raises: {error}"
        lines.append((f"'auto' on {device}", chosen))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def _run(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.command == "doctor":
        doctor()
    elif arguments.command != "demo":
        arguments.run(arguments)
    else:
        demo.run(
            model=arguments.model, file=arguments.file, output_dir=arguments.output_dir, top=arguments.top,
            backend=arguments.backend, device=arguments.device, blocks=arguments.blocks,
        )  # fmt: skip
    if sys.stdout is not None:
        sys.stdout.flush()  # so that what comes of it is an error of this command, and not of the interpreter's end


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, with which schedulers end what they run, becomes an exception: temporary files go, and the processes of a pool.
    Not under torchrun: its processes may wait for each other then, and it sees to them."""
    if threading.current_thread() is not threading.main_thread() or "RANK" in os.environ:
        yield
        return

    owner = os.getpid()

    def end(*_: Any) -> NoReturn:
        if os.getpid() != owner:  # a fork, to which nothing here belongs
            os._exit(128 + signal.SIGTERM)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(BaseException):
    """As KeyboardInterrupt is: no ``except Exception`` takes it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 after an error, which is one line on stderr; 128 and the signal's number
    where one ended it."""
    # What it cannot spell (a name that is no UTF-8) is written as stderr writes it.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _terminated_as_interrupted():
            _run(argv)
        return 0
    except UserError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:  # who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's end tries again
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except _Terminated:
        return _fail("terminated", 128 + signal.SIGTERM)
    except (OSError, RuntimeError, MemoryError) as error:  # of the machine: its memory, its disk, its device
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        return _fail(f"{type(error).__name__}: {first_line(error)} ({DEBUG_VARIABLE}=1 shows where)", 2)


def _fail(message: str, code: int) -> int:
    print("s2sent: error:", " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

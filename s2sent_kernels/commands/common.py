"""What the subcommands share: user errors, argument types, loading with its errors as user errors, and output files."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from .. import files, hub, loading, model_kinds, parts, sources, waiting
from ..files import first_line
from ..parts import Trained
from ..quiet import quiet_transformers
from ..sources import BUNDLED, Source
from ..tools import encoders, processes
from ..tools.tables import FORMATS, STDIN

BATCH = 128  # texts per call of the encoder

P = ParamSpec("P")
T = TypeVar("T")

__all__ = ["BUNDLED", "Source", "Trained", "first_line", "quiet_transformers"]  # for the subcommands


class UserError(Exception):
    """An error that the user can correct. The message is printed without a traceback."""


# ---------------------------------------------------------------- arguments


def positive(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "a whole number from 1"  # as the parser quotes it: "expected a whole number from 1, got '0'"


def seed(text: str) -> int:
    """An argparse type: a seed that every library accepts."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise ValueError
    return value


seed.__name__ = "a whole number from 0, under 2^32"


def blocks(text: str) -> str | list[int]:
    """An argparse type: which blocks are fused, as "last:3" or "3,4,5", for everything that takes ``blocks``."""
    if text.startswith("last:"):
        if not text.removeprefix("last:").isdecimal():
            raise ValueError
        return text
    return [int(number) for number in text.split(",")]


blocks.__name__ = "block numbers, as 3,4,5, or last:N"
BLOCKS = "0,2,5 or last:N"  # its metavar


def path(text: str) -> str:
    """An argparse type for a file or a folder. Expands ``~``, which the shell leaves alone in ``--output=~/x``."""
    if not text:
        raise ValueError
    return os.path.expanduser(text)


path.__name__ = "the path of a file or a folder"


def say_modes(command: Any, modes: Mapping[str, str]) -> None:
    """Ends the help of options that only some ways of the command take with which these are, by the options' names."""
    for action in command._actions:
        if action.dest in modes:
            action.help = f"{action.help} [{modes[action.dest]}]"


def add_format(group: Any) -> None:
    group.add_argument("--format", choices=FORMATS, help="of standard input, which - means (default: text, one a line)")


def check_format(given: str | None, paths: Iterable[str]) -> None:
    """UserError where ``--format`` would mean nothing: the suffixes of files tell theirs. Or where - is there twice."""
    count = list(paths).count(STDIN)
    if given is not None and not count:
        raise UserError(f"--format: expected with {STDIN}, standard input; a file's suffix tells its format")
    if count > 1:
        raise UserError(f"{STDIN}: expected once, since standard input can be read once, got it {count} times")


def add_device(command: Any) -> None:
    command.add_argument("--device", help="a torch device (default: cuda where there is one, else cpu)")


def option(name: str) -> str:
    """As ``name`` is typed on the command line."""
    return f"--{name.replace('_', '-')}"


def device_of(name: str | None) -> torch.device:
    """The device of an option ``--device``. Under torchrun each process has a GPU of its own, which is also made the current one
    before anything touches a GPU: what asks for the current device would else take memory of the first."""
    rank = os.environ.get("LOCAL_RANK")
    if name is None and (rank is None or not torch.cuda.is_available()):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda" if name is None else name)
    except RuntimeError as error:  # which lists all that torch was ever built for
        raise UserError(f"--device: expected cpu, cuda, cuda:N or another device of torch, got {name!r}") from error
    try:
        if device.type == "cuda" and device.index is None and rank is not None:
            device = torch.device(f"cuda:{rank}")
        if device.type == "cuda" and str(device.index) == rank:
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        named = f"cuda:{rank}, that of process {rank} of this machine," if name is None else repr(name)
        raise UserError(f"device {named} cannot be used: {first_line(error)}") from error
    return device


def check_writable(
    directory: Path, name: Path | None = None, what: str = "output directory", *, of_file: bool = False
) -> None:
    """Raise before any work is done, and create nothing yet. Every command makes the folders that an output's path lacks, and
    this says so in a line on standard error, since it may be a typing error.

    Args:
        name: of the directory, as it was given.
        what: it is.
        of_file: it is to hold a file that the user has named; else it is itself what is made, and only folders above are told.
    """
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        if name is not None and existing == directory:
            existing = name
        raise UserError(f"{what} {name or directory}: {existing} is not a directory that can be written to")
    made, shown = directory, name or directory
    if not of_file:
        made, shown = made.parent, shown.parent
    if not made.exists() and processes.is_first():
        waiting.say(f"{shown}: there is no such folder yet: it will be made")


# ---------------------------------------------------------------- loading


def _told(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, a loader, whose errors a command reports."""

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except sources.LoadError as error:
            raise UserError(of_option(str(error))) from error

    return told


def of_option(message: str) -> str:
    """A loader's message with the name of the option that it speaks of."""
    return f"--{message}" if message.startswith(("model ", "selector ")) else message


def _silently(function: Callable[P, T]) -> Callable[P, T]:
    """A loader, after which transformers stays silent for the rest of the command, as while it saves what was trained."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with contextlib.suppress(ImportError):  # which the loader words
            quiet_transformers()
        return function(*args, **kwargs)

    return run


def announce(model: str | None) -> None:
    """Say on standard error, once, that a model is looked for over a network, which may take a while."""
    try:
        path, _ = sources.find_model(model)
    except sources.LoadError:  # which the loader words
        return
    if path not in _announced and hub.is_asked(path):
        waiting.say(f"looking for {path} on the hub; HF_HUB_OFFLINE=1 takes what is cached")
        _announced.add(path)


_announced: set[str] = set()


def _announcing(function: Callable[P, T]) -> Callable[P, T]:
    """A function whose first argument is a model, or the Source of one."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        model: Any = args[0]
        announce(model.model if isinstance(model, Source) else model)
        return function(*args, **kwargs)

    return run


def _waiting(function: Callable[P, T]) -> Callable[P, T]:
    """A loader, whose first argument is a model or the Source of one. It says so where it takes long: libraries are imported
    and weights are read."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        model: Any = args[0]
        name = (model.model or model.selector) if isinstance(model, Source) else model
        with waiting.told(f"loading {name or BUNDLED}"):
            return function(*args, **kwargs)

    return run


def _resolve(model: str | None, selector: str | None, **options: Any) -> Source:
    """``sources.resolve``, and whether what it finds goes together."""
    found = sources.resolve(model, selector, **options)
    parts.check_fit(found, options["option"])
    return found


resolve = functools.partial(_told(_announcing(_resolve)), option="--")
holds_selector = _told(sources.holds_selector)
leaves_selector = _told(_announcing(sources.leaves_selector))
check_selector = functools.partial(_told(sources.check_selector), option="--")
read_selector = _told(parts.read_selector)
sizes = _told(_announcing(_silently(parts.sizes)))
features = parts.features
max_length = _told(_announcing(parts.max_length))
limit_of = _told(_announcing(parts.limit_of))
load_model = _told(_announcing(_waiting(_silently(parts.load_model))))
load_transformer = _told(_announcing(_waiting(_silently(parts.load_transformer))))
load_whole = _told(_waiting(_silently(loading.load_whole)))
load_classifier = _told(_waiting(_silently(loading.load_classifier)))
load_pipeline = _told(_announcing(_waiting(_silently(loading.load_pipeline))))
load_parts = _told(_announcing(_waiting(_silently(loading.load_parts))))
fuse = _told(loading.fuse)


def resolve_here(model: str | None, selector: str | None) -> Source | None:
    """As ``resolve``, of what is judged without asking a hub: a name that is wrong is an error before any long work. None where
    a hub would have to be asked."""
    found = resolve(model, selector) if sources.is_here(model) else None
    if selector is not None:
        check_selector(selector)
    return found


def say_of_classifier(source: Source, what: str) -> None:
    """Say of a classifier, from which a command takes embeddings, that its head is left out. ``what``: what embeddings are."""
    if source.whole and model_kinds.held(str(source.model)) == model_kinds.CLASSIFIER:
        waiting.say(f"{source.model}: is a classifier: its embeddings are {what}, and not its labels")


def check_truncation(given: int | None, features: int | None) -> None:
    """UserError where ``--truncate-dim`` asks for more features than there are; None: they are not known."""
    if given is not None and features is not None and given > features:
        raise UserError(f"--truncate-dim: expected at most {features}, as many features as there are, got {given}")


def batches(encoder: Any, tokenizer: Any, texts: Sequence[str], max_length: int | None) -> list[dict[str, Any]]:
    """The encoder's inputs for batches of ``texts``, in their order, cut at ``max_length`` tokens."""
    rows = encoders.in_batches(range(len(texts)), BATCH)
    return [batch.inputs for batch in encoders.token_batches(encoder, tokenizer, texts, rows, max_length=max_length)]


def within(given: int | None, own: int | None) -> int | None:
    """What ``--max-length`` and a folder's own length mean together: texts may be cut before what the folder says, not behind.

    Raises:
        UserError: the option is greater, and would mean nothing.
    """
    if given is not None and own is not None and given > own:
        raise UserError(f"--max-length: expected at most {own}, at which the model's folder cuts texts, got {given}")
    return own if given is None else given


# ---------------------------------------------------------------- results


@contextlib.contextmanager
def interrupted(what_is_kept: Callable[P, str], *args: P.args, **kwargs: P.kwargs) -> Iterator[None]:
    """Where the ``with`` block is interrupted, say what is kept and how to go on."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        waiting.say_last(what_is_kept(*args, **kwargs))
        raise


@contextlib.contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Print each warning of the ``with`` block once, in one line on standard error, as errors are, and without a place in the
    code."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(" ".join(str(one.message).split()) for one in found):
        waiting.say(f"s2sent: warning: {message}")


REPLACED = "name another, or --force replaces it"
EMPTIED = "name another, or remove what is in it"


def taken(path: Path, remedy: str) -> UserError:
    """The error of every command whose output is there: nothing is overwritten unasked.

    Args:
        remedy: REPLACED where the command has --force, EMPTIED of a folder, or what else the command can do.
    """
    return UserError(f"output {path}: it is there already{' and not empty' if path.is_dir() else ''}; {remedy}")


def check_new(paths: Iterable[Path], force: bool) -> None:
    """UserError where a file of a result is there already, unless it is to be replaced; before any work is done."""
    there = [path for path in paths if path.exists()]
    if there and not force:
        raise taken(there[0], REPLACED)


def add_force(command: Any) -> None:
    command.add_argument("--force", action="store_true", help="replace an output that is there")


def write_files(directory: Path, content: Mapping[str, bytes]) -> None:
    """Write each file atomically and print its path. After an error, a directory that was created here is removed again."""
    made = files.missing(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in content.items():
            files.write_atomically(directory / name, data)
    except OSError as error:
        if made:
            for name in content:
                (directory / name).unlink(missing_ok=True)
            files.remove_empty(made)
        raise UserError(f"output directory {directory}: {error.strerror}") from error
    print()
    for name in content:
        print(f"wrote {directory / name}")

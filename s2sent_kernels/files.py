"""Locks, clean-up and atomic writes for output files and folders; the package's data; imports of optional packages; errors in a
line; whether somebody watches."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import stat
import sys
import uuid
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname


class MissingPackage(ImportError):
    """An optional package cannot be imported. The message names the extra that installs it."""


def require(module: str, package: str, extra: str | None) -> Any:
    """Import an optional module.

    Args:
        module: the module's full name.
        package: the name in the error message.
        extra: the extra of this package that installs it; None if there is none, and ``package`` itself is to be installed.

    Raises:
        MissingPackage: the import failed.
    """
    with importing(package, extra):
        return importlib.import_module(module)


@contextlib.contextmanager
def importing(package: str | None, extra: str | None) -> Iterator[None]:
    """Turn an ImportError inside the ``with`` block into a MissingPackage, as ``require`` does. Without ``package`` the message
    names the module that failed."""
    try:
        yield
    except MissingPackage:
        raise
    except ImportError as error:
        name = package or error.name
        command = f"pip install {package}" if extra is None else installs(extra)
        raise MissingPackage(f"{name} cannot be imported ({error}): {command}", name=error.name) from error


def installs(extra: str) -> str:
    """The command that adds an extra to this installation, which may be one of a checkout."""
    # A checkout may hold metadata of a build, too, which come first there and do not say how it was installed.
    known = (one.read_text("direct_url.json") for one in importlib.metadata.distributions(name="s2sent_kernels"))
    try:
        origin = json.loads(next(filter(None, known), "{}"))
    except ValueError:
        origin = {}
    if not origin.get("dir_info", {}).get("editable"):
        return f"pip install 's2sent_kernels[{extra}]'"
    folder = url2pathname(urlsplit(origin["url"]).path)
    return f"pip install --no-build-isolation -e {shlex.quote(f'{folder}[{extra}]')}"


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_FULL = re.compile(r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed|unexpected pos \d+ vs")


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says so. safetensors' is no OSError. torch.save, which meets it in C++,
    tells only that a write failed, for which a disk that takes no more is the reason."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or _FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


# What a message about a file of another encoding ends with.
TO_UTF8 = "convert it, as `iconv -f LATIN1 -t UTF-8` does from Latin-1"


def on_terminal() -> bool:
    """Whether somebody watches standard error: only there is a bar of progress one, and not a line without end. A terminal
    without a size, as some runners of CI and containers have, is none: tqdm draws nothing there."""
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    try:
        columns, lines = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):  # a stream without a descriptor, as a notebook's
        return True
    return columns > 0 and lines > 1  # of a single line tqdm keeps none for a bar


def data_folder() -> Path:
    """Where the shipped selectors and sentences are installed."""
    return Path(str(resources.files(__package__))) / "data"


@contextlib.contextmanager
def locked(path: Path, *, wait: bool, name: Path | None = None) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``, which is created if missing. The operating system releases the lock when the
    process ends, even if it is killed. Whoever holds the lock may remove the file.

    Raises:
        ValueError: another process holds the lock and ``wait`` is False; names the folder, or ``name``. ``path`` is a link.
    """
    file = _lock(path, wait, name)
    while not _is_at(file, path):  # it was removed while this process waited, and locks nothing any more
        os.close(file)
        file = _lock(path, wait, name)
    try:
        yield
    finally:
        os.close(file)


def _lock(path: Path, wait: bool, name: Path | None) -> int:
    try:
        # Not truncated, and no link followed: the file may be anybody's.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path}: expected a file to lock, got a symbolic link: remove it") from error
        raise
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(file)
        if isinstance(error, BlockingIOError):
            raise ValueError(f"{name or path.parent}: another process is writing there") from error
        raise
    return file


def _is_at(file: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    return False


def made_folder(name: str, path: str | os.PathLike[str]) -> Path:
    """A folder, made where there is none. ValueError that names the argument where a file is in its place or above it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        there = next(some for some in (folder, *folder.parents) if some.exists() and not some.is_dir())
        raise ValueError(f"{name}: expected a folder, got a file, {there}") from error
    return folder


def missing(folder: Path) -> list[Path]:
    """``folder`` and those of its parents that do not exist yet, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders that are empty. One that is not may hold another process's files, and is kept."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def new_folder(target: Path, *, alone: bool = False) -> Iterator[Path]:
    """A hidden folder that becomes ``target``, which is new or empty, when the ``with`` block ends: it is there whole or not at
    all, also if the process is killed. What killed processes left beside it is removed.

    A folder whose parent cannot be written to, or that another disk is mounted on, cannot be replaced: it is filled file by file.

    Args:
        alone: no other process is in such a ``with`` block for the same ``target``.

    Raises:
        ValueError: another one is, and ``alone`` is True; of two that begin at the same moment both may see the other.
    """
    target = Path(os.path.realpath(target))
    beside = not os.path.ismount(target) and (not target.is_dir() or os.access(target.parent, os.W_OK | os.X_OK))
    place = target.parent if beside else target
    made = missing(place)
    place.mkdir(parents=True, exist_ok=True)
    try:
        with scratch(place, target.name) as whole:
            if alone and set(sweep(place, target.name)) - {whole}:
                raise ValueError(f"{target}: another process is writing there")
            yield whole
            sync_files(path for path in (*whole.rglob("*"), whole) if not path.is_symlink())
            if beside:
                if target.is_dir():
                    whole.chmod(stat.S_IMODE(target.stat().st_mode))
                os.rename(whole, target)
            else:
                for name in os.listdir(whole):
                    os.rename(whole / name, target / name)
            sync_folder(place)
    except BaseException:
        remove_empty(made)
        raise


@contextlib.contextmanager
def scratch(place: Path, name: str) -> Iterator[Path]:
    """A hidden folder in ``place`` for what is to become ``place / name``, removed when the ``with`` block ends, or by the next
    call if the process is killed in it."""
    sweep(place, name)
    folder, lock = _locked_folder(place, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


UNFINISHED = r"\.{}\.[0-9a-f]{{32}}\.new"  # of a folder's name


def sweep(place: Path, name: str) -> list[Path]:
    """Remove the folders that killed processes were to rename to ``place / name``: nobody holds their locks. Returns those whose
    locks are held."""
    held = []
    for path in place.iterdir():
        if re.fullmatch(UNFINISHED.format(re.escape(name)), path.name) and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # the lock is held, or this kind of disk knows none
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
                except BlockingIOError:
                    held.append(path)
                finally:
                    os.close(lock)
    return held


def _locked_folder(place: Path, name: str) -> tuple[Path, int]:
    """A fresh folder, on which a lock is held until the handle is closed."""
    while True:
        path = place / f".{name}.{uuid.uuid4().hex}.new"
        path.mkdir()
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # as above
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(lock, path):
            return path, lock
        os.close(lock)  # it was taken for a killed process's before it had its lock


def write_atomically(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Replace a file in one step: a reader sees the old content or the new, never a mixture. The umask decides who may read it.

    Args:
        sync: return when the content is on the disk.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


WEIGHTS = "*.safetensors"


def open_to_umask(folder: Path, pattern: str = "*") -> None:
    """Give the files in ``folder`` of this pattern, just written, the mode that the umask leaves: safetensors writes them for
    their owner alone."""
    probe = folder / f".{uuid.uuid4().hex}"
    probe.touch()  # the umask itself could only be asked by changing it, for every thread
    try:
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
    for path in folder.rglob(pattern):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def sync_files(paths: Iterable[Path]) -> None:
    """Wait until the content of these files, and the entries of these folders, are on the disk."""
    for path in paths:
        sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries, as after a file was renamed in it, are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""The caches of f and p that `s2sent train --freeze-encoder` keeps: list them with their sizes, or remove some. A training that
needs one that was removed makes it again."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from .. import cache_files
from ..cache_files import Kept, in_words
from . import common
from .common import UserError
from .train_task import CACHE


def add(commands: Any) -> None:
    about = "list the caches of frozen training, or remove some"
    command = commands.add_parser("cache", help=about, description=__doc__)
    command.add_argument(
        "action", nargs="?", choices=("list", "clear"), help="print them, or remove those that are named"
    )
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="of caches to remove, as list prints them; a beginning will do"
    )
    command.add_argument("--all", action="store_true", help="remove all of them")
    command.add_argument("--cache", type=common.path, default=CACHE, metavar="FOLDER", help=f"(default: ./{CACHE})")
    common.say_modes(command, dict.fromkeys(("names", "all"), "only with clear"))


def run(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.cache)
    if arguments.action is None:
        raise UserError(
            "expected list, which prints the caches, or clear, which removes some (see 's2sent cache --help')"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--cache {folder}: expected a folder, got a file")
    try:
        found = cache_files.kept(folder)
        if arguments.action == "list":
            if arguments.names or arguments.all:
                raise UserError(
                    f"list: expected neither names nor --all, which clear takes, got {' '.join(arguments.names) or '--all'}"
                )
            _list(folder, found)
            return
        if not found and arguments.all and not arguments.names:
            print(f"no caches in {folder}")
        for one in _chosen(arguments, found):
            cache_files.remove(one)
            print(f"removed {one.folder}: {in_words(one.size)}")
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from error


def _list(folder: Path, found: list[Kept]) -> None:
    for one in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.folder.stat().st_mtime))
        print(f"{one.name}  {in_words(one.size):>9}  {when}  {_words(one)}")
    if not found:
        print(f"no caches in {folder}")
        return
    print(f"{folder}: {len(found)} cache{'' if len(found) == 1 else 's'}, {in_words(sum(one.size for one in found))}")


def _words(one: Kept) -> str:
    if not one.complete:
        return "not complete: the same training goes on with it"
    blocks, pooling = one.about.get("blocks"), one.about.get("pooling")
    if one.texts is None or not isinstance(blocks, list):
        return "of an earlier release, or damaged"
    return f"{one.texts:,} texts, blocks {', '.join(map(str, blocks))}, {pooling}, {one.about.get('max_length')} tokens"


def _chosen(arguments: argparse.Namespace, found: list[Kept]) -> list[Kept]:
    if arguments.all == bool(arguments.names):
        raise UserError("clear: expected names, as `s2sent cache list` prints them, or --all")
    if arguments.all:
        return found
    chosen: dict[Path, Kept] = {}
    for name in arguments.names:
        some = [one for one in found if name and one.name.startswith(name)]
        names = sorted({one.name for one in some})
        if not names:
            there = ", ".join(dict.fromkeys(one.name for one in found)) or "none"
            raise UserError(
                f"{arguments.cache}: expected the beginning of a cache's name, got {name!r}; there are: {there}"
            )
        if len(names) > 1:
            raise UserError(
                f"{arguments.cache}: expected the beginning of one name, got {name!r} of {', '.join(names)}"
            )
        chosen |= {one.folder: one for one in some}
    return list(chosen.values())

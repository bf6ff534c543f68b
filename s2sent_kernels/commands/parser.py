"""The parser of every subcommand: one line for each error, options as they are written, and the nearest one for those that are
not known."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from .common import UserError

_NUMBERS = {"int": "a whole number", "float": "a number"}  # Python's types, in words
# What users give without an option, by the option that takes it.
_GIVEN_WITH = {
    "--model": "a model or its folder",
    "--data": "files to train on",
    "--sts": "STS files",
    "--file": "a file of texts",
    "--text": "a text",
}
_OPTION = re.compile(r"--[a-z][a-z0-9-]*")


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments like every other error, in one line. An option counts under its whole name alone: a prefix that
    means one option today may mean another one in the next version."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (see '{self.prog} --help')")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """Of a subcommand's parser also its unknown arguments are errors: the parser above it would name its own help. They come
        first, since an option that is missing may be one of them, misspelt."""
        if self._subparsers is None and args is not None:
            self._refuse(self._unknown(args))
        try:
            found, rest = super().parse_known_args(args, namespace)
        except UserError:
            self._refuse(self._stray(args))
            raise
        self._refuse(rest)
        return found, rest

    def _stray(self, args: Sequence[str] | None) -> list[str]:
        """The arguments that nothing takes, whatever is missing beside them."""
        needed = [action for action in self._actions if action.required]
        if self._subparsers is not None or not needed:
            return []
        for action in needed:
            action.required = False
        try:
            return super().parse_known_args(args)[1]
        except UserError:  # which is said already
            return []
        finally:
            for action in needed:
                action.required = True

    def _unknown(self, args: Iterable[str]) -> list[str]:
        """The arguments that look like options and are none."""
        names = []
        for argument in args:
            if argument == "--":
                break
            name = argument.partition("=")[0]
            if _OPTION.fullmatch(name) and name not in self._option_string_actions:
                names.append(name)
        return names

    def _refuse(self, arguments: Sequence[str]) -> None:
        if not arguments:
            return
        meant = [near(one.partition("=")[0], self._option_string_actions) for one in arguments if one.startswith("-")]
        advice = f": did you mean {', '.join(found)}" if (found := [name for name in meant if name]) else ""
        if not advice and not any(one.startswith("-") for one in arguments):
            advice = self._given_by_options()
        self.error(f"unrecognized arguments: {' '.join(arguments)}{advice}")

    def _given_by_options(self) -> str:
        """With which options a parser takes what was given without one."""
        known = [f"{what} with {name}" for name, what in _GIVEN_WITH.items() if name in self._option_string_actions]
        return f": it takes options alone, {', '.join(known)}" if known else ""

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            kind = getattr(action.type, "__name__", "")
            error.message = f"expected {_NUMBERS.get(kind, kind)}, got {arg_string!r}"
            raise

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            if meant := near(str(value), map(str, action.choices or ())):
                error.message += f": did you mean {meant}"
            raise


def options(parser: argparse.ArgumentParser, command: str | None = None) -> dict[str, str]:
    """The options of a parser by the names of the arguments that they give, with those of its subcommands, or of ``command``
    alone."""
    found: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, each in action.choices.items():
                if command in (None, name):
                    found |= options(each)
        elif action.option_strings and not isinstance(action, argparse._HelpAction):
            found[action.dest] = action.option_strings[0]  # the others are former names
    return found


def in_options(message: str, known: Mapping[str, str], given: argparse.Namespace) -> str:
    """A message about an argument, which its functions call by its name in Python, in the words of the command line.

    Args:
        known: ``options``.
        given: what the command was called with. Messages about a file begin with its name, which may be that of an argument.
    """
    name, colon, rest = message.partition(": ")
    values = [one for value in vars(given).values() for one in (value if isinstance(value, list) else [value])]
    return f"{known[name]}: {rest}" if colon and name in known and name not in values else message


def near(word: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``word`` was probably meant to be: what it begins, else what differs in a few letters."""
    names: Collection[str] = list(known)
    begun = [name for name in names if len(word.lstrip("-")) > 2 and name.startswith(word)]
    return next(iter(begun or difflib.get_close_matches(word, names, 1)), None)

"""Which columns of a table are read as what: by their own names, or by those that the user gives. Nothing is dropped in silence:
a column that looks like training data and is not read is an error, and any other that is not read is named."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .tables import Rows

SPLIT = "split"
# Names of training data in common data sets, without case, digits, spaces and the plural's s. A negative is anything with "neg".
_LOOKS_MEANT = {
    "anchor", "query", "querie", "question", "premise", "positive", "pos", "answer", "response", "document", "doc", "passage",
    "hypothesis", "sentence", "sentencea", "sentenceb", "text", "texta", "textb", "textpair", "hard", "distractor",
    "score", "label", "target", "similarity", "sim", "weight", "margin",
}  # fmt: skip


class Columns(NamedTuple):
    """What the user says of a table's columns."""

    named: Mapping[str, str] = {}  # the column of each thing that has another name: {"anchor": "query"}
    ignored: Collection[str] = ()
    tell: Callable[[str], object] | None = None  # is told of columns that are not read and look harmless
    format: str | None = None  # of standard input, one of ``tables.FORMATS``
    judged: bool = True  # False: columns that are not read are passed over, as in a table that nothing is trained on

    def of(self, wanted: Sequence[str]) -> list[str]:
        """Their names in the table."""
        return [self.named.get(what, what) for what in wanted]

    def unfold(self, rows: Rows) -> Rows:
        """The rows with a column for each dotted name that the user gives: "query.text" is the field ``text`` of the column
        ``query``, which is left out. A column whose own name has the dot comes first."""
        dotted = [name for name in self.named.values() if "." in name and name not in _names(rows)]
        if not dotted:
            return rows
        above = {name.partition(".")[0] for name in dotted}
        return [
            (
                place,
                {
                    **{name: value for name, value in row.items() if name not in above},
                    **{name: field(row, name) for name in dotted if _has(row, name)},
                },
            )
            for place, row in rows
        ]

    def rename(self, path: str | Path, rows: Rows) -> Rows:
        """The rows with the names that the reader expects, without the columns to ignore.

        Raises:
            ValueError: the table has not a column that the user names, or has the expected one beside it and is ``judged``.
        """
        if not self.named and not self.ignored:
            return rows
        there = _names(rows)
        given = {**dict.fromkeys(self.named.values(), "--columns"), **dict.fromkeys(self.ignored, "--ignore-columns")}
        for name, option in given.items():
            if name not in there:
                raise ValueError(f"{path}: expected the column {name}, which {option} names, got {', '.join(there)}")
        twice = [what for what in self.named if what in there and what not in given]
        if twice and self.judged:
            what, name = twice[0], self.named[twice[0]]
            raise ValueError(
                f"{path}: expected one column for {what}, got {what} and {name}: see --ignore-columns {what}"
            )
        back, left_out = {name: what for what, name in self.named.items()}, {*self.ignored, *twice}
        return [
            (place, {back.get(name, name): value for name, value in row.items() if name not in left_out})
            for place, row in rows
        ]

    def check(self, path: str | Path, rows: Rows, read: Collection[str], other_tasks: Collection[str] = ()) -> None:
        """Judges the columns that are not ``read``.

        Args:
            other_tasks: those which the same file may have for another task.

        Raises:
            ValueError: one looks like training data.
        """
        if not self.judged:
            return
        others = [name for name in _names(rows) if name not in read and name != SPLIT]
        meant = [name for name in others if _looks_meant(name) and name not in other_tasks]
        if meant:
            raise ValueError(
                f"{path}: expected columns {', '.join(read)}, got {', '.join(meant)} too: say what they are with --columns "
                f"{next(iter(read))}=NAME,..., or leave them out with --ignore-columns {','.join(meant)}"
            )
        if others and self.tell is not None:
            self.tell(f"{path}: not read: {', '.join(others)}")


def field(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of a field within it by a dotted name. KeyError where there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(name)
        value = value[part]
    return value


def _has(row: Mapping[str, Any], name: str) -> bool:
    try:
        field(row, name)
    except KeyError:
        return False
    return True


def parse(text: str, known: Collection[str], numbered: str | None = None) -> dict[str, str]:
    """ "anchor=query,positive=doc" as a mapping.

    Args:
        known: what a column may be read as; also ``numbered`` with a number, as "negative_1".

    Raises:
        ValueError: it has another form, another word, or the same one twice.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        what, equals, name = (piece.strip() for piece in part.partition("="))
        if not (what and equals and name):
            raise ValueError(
                f"--columns: expected what a column holds and its name, as {next(iter(known))}=NAME, with commas between "
                f"several, got {part!r}{_within(part, text)}"
            )
        if what not in known and not (numbered and re.fullmatch(rf"{numbered}_\d+", what)):
            raise ValueError(
                f"--columns: expected {' or '.join(known)} before the sign =, got {what!r}{_within(what, text)}"
            )
        if what in found or name in found.values():
            raise ValueError(
                f"--columns: expected one column for each word and one word for each column, got {text!r}, which names "
                f"{what if what in found else name} twice"
            )
        found[what] = name
    return found


def _within(part: str, text: str) -> str:
    """Where a part of an option's value stands, for a message that quotes it."""
    return "" if part.strip() == text.strip() else f" in {text!r}"


def names(text: str) -> list[str]:
    """ "genre,year" as a list. ValueError where one is empty."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise ValueError(f"--ignore-columns: expected names of columns with commas between them, got {text!r}")
    return found


def _names(rows: Rows) -> list[str]:
    # A JSON object may omit columns.
    return list(dict.fromkeys(name for _, row in rows for name in row))


def _looks_meant(name: str) -> bool:
    letters = re.sub(r"[^a-z]", "", name.lower())
    return "neg" in letters or letters.removesuffix("s") in _LOOKS_MEANT or letters in _LOOKS_MEANT

"""Labelled examples of a task from tables (.tsv, .csv, .jsonl, .parquet): texts or pairs of texts, with classes, several labels
or numbers. Every error names the file and, if it concerns one, the line or row.

    label and text, or label, sentence1 and sentence2      a classifier's; optionally split
    score, sentence1 and sentence2                         scored pairs; optionally split
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import readers, tables
from .columns import SPLIT, Columns
from .encoders import Text
from .examples import SUFFIXES, of_split, read_rows, too_few
from .problems import CLASSES, LABELS, NUMBERS
from .tables import Rows

TEXT, PAIR = ("text",), ("sentence1", "sentence2")
EVERY = 10  # without a dev part, every tenth example is held out
LISTED = 10  # labels that a message names
LABELLED, SCORED = ("label", *TEXT, *PAIR, SPLIT), ("score", *PAIR, SPLIT)  # columns


class Labelled(NamedTuple):
    """Texts or pairs, all of one kind, each with its label: a class; labels, as a tuple; or a number."""

    path: str
    texts: list[Text]
    labels: list[Any]
    places: list[str]

    @property
    def pairs(self) -> bool:
        return isinstance(self.texts[0], tuple)

    def take(self, rows: Sequence[int]) -> Labelled:
        def of(column: list[Any]) -> list[Any]:
            return [column[row] for row in rows]

        return Labelled(self.path, of(self.texts), of(self.labels), of(self.places))


def said(pairs: bool) -> str:
    """What a file has, in a message."""
    return "pairs of sentences" if pairs else "texts"


def named_pairs(columns: Columns | None) -> bool | None:
    """Whether the columns that the user names are those of pairs, or of texts; None where no name tells, or both do."""
    named = [choice for choice in (TEXT, PAIR) if columns is not None and not columns.named.keys().isdisjoint(choice)]
    return named[0] == PAIR if len(named) == 1 else None


def all_three(path: str | Path) -> ValueError:
    """The error of a table that has texts and pairs, where nothing tells which are meant."""
    pair = ",".join(f"{name}={name}" for name in PAIR)
    return ValueError(
        f"{path}: expected a column text, or {' and '.join(PAIR)}, got all three: --columns text=text or --columns {pair} says "
        "which are meant"
    )


def read_labelled(
    path: str | Path, kind: str, split: str | None = None, usual: str = "train", columns: Columns | None = None
) -> Labelled:
    """The rows of a classifier's table. Labels are texts (in JSON lines and Parquet also integers); of several labels a list, or
    one text in which commas separate them, and none where it is empty; of a regression numbers.

    Args:
        kind: the problem type.
        split: the rows of this split. By default those of ``usual`` where the file has a column split, else all.
        columns: other names in the table.

    Raises:
        ValueError: as ``read_rows``; there is no such split; a column looks like training data and is none of these, as a text
            beside a pair; a text is empty or none; a label is missing, NaN or of another kind; fewer than two rows.
    """
    return _read(path, kind, "label", (TEXT, PAIR), split, usual, columns or Columns())


def read_scored(
    path: str | Path, split: str | None = None, usual: str = "train", columns: Columns | None = None
) -> Labelled:
    """Scored pairs. Arguments and errors as ``read_labelled``, and ValueError where all scores are equal."""
    found = _read(path, NUMBERS, "score", (PAIR,), split, usual, columns or Columns())
    differ(found)
    return found


def read_texts(
    path: str | Path, columns: Columns | None = None, pairs: bool | None = None, *, empty: bool = False
) -> list[Text]:
    """The texts or pairs of a table, or the lines of a .txt file. ValueError as ``read_labelled``, but of labels; other columns
    are passed over.

    Args:
        pairs: whether pairs are wanted, of a table that has both; None: nobody knows, unless the columns' names tell.
        empty: whether an empty text is one, as a row whose result has to stand in its place.
    """
    if readers.kind(path, None if columns is None else columns.format) == "text":
        if columns is not None and columns.named:
            raise ValueError(f"{path}: expected a table, whose columns are named, got texts")
        lines: list[Text] = []
        for number, line in tables.read_lines(path, keep_empty=True):
            if not (empty or line.strip()):
                raise ValueError(f"{path}: line {number}: expected a text, got an empty line")
            lines.append(line)
        if not lines:
            raise ValueError(f"{path}: expected texts, got an empty file")
        return lines
    rows = read_rows(path, (), TEXT, PAIR, suffixes=SUFFIXES, columns=columns)
    there = {name for _, row in rows for name in row}
    pairs = pairs if (named := named_pairs(columns)) is None else named
    wanted = PAIR if pairs else TEXT
    return _texts(path, rows, (TEXT, PAIR) if pairs is None or not there.issuperset(wanted) else (wanted,), empty)


def _read(
    path: str | Path,
    kind: str,
    column: str,
    choices: Sequence[Sequence[str]],
    split: str | None,
    usual: str,
    columns: Columns,
) -> Labelled:
    whole = read_rows(path, (column,), *choices, columns=columns)
    names = {name for _, row in whole for name in row}
    texts_of = next(choice for choice in choices if names.issuperset(choice))
    columns.check(path, whole, (column, *texts_of), other_tasks=("label", "score"))
    rows = of_split(path, whole, split, usual)
    texts = _texts(path, rows, choices)
    absent = None if kind == LABELS else tables.ABSENT  # of several labels there may be none
    labels = [_label(f"{path}: {place}: {column}", row.get(column, absent), kind) for place, row in rows]
    if len(texts) < 2:
        raise too_few(path, whole, rows)
    return Labelled(str(path), texts, labels, [place for place, _ in rows])


def _texts(path: str | Path, rows: Rows, choices: Sequence[Sequence[str]], empty: bool = False) -> list[Text]:
    """The text of each row, or its pair where no row has a text."""
    names = {name for _, row in rows for name in row}
    single = TEXT in choices and "text" in names
    if single and PAIR in choices and names.issuperset(PAIR):
        raise all_three(path)
    texts: list[Text] = []
    judged = tables.text if empty else tables.filled
    for place, row in rows:
        columns = TEXT if single else PAIR
        of_row = [judged(f"{path}: {place}: {name}", row.get(name, tables.ABSENT)) for name in columns]
        texts.append(of_row[0] if single else (of_row[0], of_row[1]))
    return texts


def _label(place: str, value: Any, kind: str) -> Any:
    if kind == NUMBERS:
        number = tables.number(value)
        if not abs(number) <= torch.finfo(torch.float32).max:  # or NaN; it is trained on in float32
            raise ValueError(f"{place}: expected a finite number, got {tables.shown(value)}")
        return number
    if kind == LABELS:
        several = value
        if not isinstance(value, list):
            several = [value] if isinstance(value, int) else tables.text(place, value or "").split(",")
        names = {_name(place, one) for one in several if not isinstance(one, str) or one.strip()}
        if with_comma := [name for name in names if "," in name]:
            raise ValueError(f"{place}: expected labels without commas, which separate labels, got {with_comma[0]!r}")
        return tuple(sorted(names))
    return _name(place, value)


def _name(place: str, value: Any) -> str:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    name = str(value) if is_integer else tables.text(place, value).strip()
    if not name:
        raise ValueError(f"{place}: expected a label, got {tables.shown(value)}")
    if any(character in name for character in "\t\r\n"):  # a table of predictions has the label in a column
        raise ValueError(f"{place}: expected a label without tabs and line ends, got {name!r}")
    return name


# ---------------------------------------------------------------- labels and targets


def label_names(found: Labelled, kind: str) -> list[str]:
    """The names of a head's outputs, sorted; none for numbers.

    Raises:
        ValueError: there is one class only, no label at all, or all numbers are equal.
    """
    if kind == NUMBERS:
        differ(found)
        return []
    several = [(label,) for label in found.labels] if kind == CLASSES else found.labels
    names = sorted({name for labels in several for name in labels})
    if len(names) < (2 if kind == CLASSES else 1):
        raise ValueError(f"{found.path}: expected at least two labels, got {', '.join(map(repr, names)) or 'none'}")
    return names


def differ(found: Labelled) -> None:
    """ValueError where all numbers are equal: nothing could be learned, and no score would be defined."""
    if len(set(torch.tensor(found.labels, dtype=torch.float32).tolist())) < 2:  # as they are trained on
        raise ValueError(f"{found.path}: expected different numbers, got {len(found.labels)} times {found.labels[0]:g}")


def tell_apart(found: Labelled, kind: str) -> None:
    """ValueError where a part gives no score: none of its examples has a label, or all numbers are equal."""
    if kind == NUMBERS:
        differ(found)
    if kind == LABELS and not any(found.labels):
        raise ValueError(f"{found.path}: expected labels, got none in {len(found.labels)} rows")


def targets(found: Labelled, kind: str, names: Sequence[str]) -> Tensor:
    """As ``problems.Problem`` takes them. ValueError where a label is not among ``names``, the training data's."""
    if kind == NUMBERS:
        return torch.tensor(found.labels, dtype=torch.float32)
    number = {name: index for index, name in enumerate(names)}
    for place, label in zip(found.places, found.labels, strict=True):
        for name in (label,) if kind == CLASSES else label:
            if name not in number:
                some = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
                raise ValueError(f"{found.path}: {place}: expected a label of the training data ({some}), got {name!r}")
    if kind == CLASSES:
        return torch.tensor([number[label] for label in found.labels])
    result = torch.zeros(len(found.labels), len(names))
    for row, label in enumerate(found.labels):
        result[row, [number[name] for name in label]] = 1
    return result


def hold_out(found: Labelled) -> tuple[Labelled, Labelled]:
    """All but every tenth example, and these, in the order of the labels: each class, and each range of numbers, gives its share.
    Equal files give equal parts.

    Raises:
        ValueError: there are fewer than two to hold out.
    """
    if len(found.texts) < 2 * EVERY:
        raise ValueError(
            f"{found.path}: expected --dev, or {2 * EVERY} rows to hold a tenth out, got {len(found.texts)}"
        )
    drawn = torch.randperm(len(found.texts), generator=torch.Generator().manual_seed(0)).tolist()
    order = sorted(range(len(found.texts)), key=lambda row: (found.labels[row], drawn[row]))
    held = set(order[EVERY // 2 :: EVERY])
    rest = [row for row in range(len(found.texts)) if row not in held]
    known = {found.labels[row] for row in rest}
    if isinstance(found.labels[0], str):  # the only example of a class stays
        held = {row for row in held if found.labels[row] in known}
        if len(held) < 2:
            raise ValueError(f"{found.path}: expected --dev, since too few labels have a second example to hold out")
    rest = [row for row in range(len(found.texts)) if row not in held]
    return found.take(rest), found.take(sorted(held))

"""docs/design.md: the files to touch for a change exist, and are as many as the page says."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tables():
    """The page's tables with the first column "change": their heads without it, and their rows by the change."""
    found, rows = [], None
    for line in (ROOT / "docs" / "design.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            rows = None
        elif cells[0] == "change":
            rows = {}
            found.append((cells[1:], rows))
        elif rows is not None and not set(cells[0]) <= set("-: "):
            rows[cells[0]] = cells[1:]
    return found


def files_of(cell):
    """How many files a cell names, and those that exist already. A constant in backticks is no file."""
    named = [path for path in re.findall(r"`([\w./-]+)`", cell) if "." in path]
    new = cell.partition("new:")[2]
    return len(named) + sum(int(number) for number in re.findall(r"\b(\d+) in\b", new)), named


def test_files_to_touch():
    (head, files), (_, numbers) = tables()
    assert head == ["code", "docs", "tests"] and list(numbers) == [*files, "all"]
    for change, cells in files.items():
        counts = []
        for cell in cells:
            count, named = files_of(cell)
            missing = [
                path for path in named if not (ROOT / path).exists() and not (ROOT / "s2sent_kernels" / path).exists()
            ]
            assert not missing, change
            counts.append(count)
        assert counts == [int(number) for number in numbers[change][3:]], change
    columns = zip(*([int(number) for number in row] for change, row in numbers.items() if change != "all"), strict=True)
    assert [sum(column) for column in columns] == [int(number) for number in numbers["all"]]

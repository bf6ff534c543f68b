"""What the written pages share: Markdown tables, and text between two markers of a page that is otherwise written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from record import UserError

from s2sent_kernels.files import write_atomically


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. A leading "<" in ``head`` aligns its column to the left; all others are aligned to the right."""
    lines = ["| " + " | ".join(name.lstrip("<") for name in head) + " |"]
    lines.append("| " + " | ".join("---" if name.startswith("<") else "---:" for name in head) + " |")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def insert(page: Path, start: str, end: str, text: str) -> None:
    """Replace what is between the markers ``start`` and ``end`` of ``page`` by ``text``."""
    before, found_start, rest = page.read_text(encoding="utf-8").partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        raise UserError(f"{page}: expected the markers {start} and {end}")
    write_atomically(page, f"{before}{start}\n{text}\n{end}{after}".encode())

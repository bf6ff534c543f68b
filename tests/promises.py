"""The table of docs/bitwise.md: which backend promises the same bits in which respect. Each row names its test in
tests/engines/test_bits.py, which asks here what to expect."""

from __future__ import annotations

from pathlib import Path

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").is_file())
PAGE = ROOT / "docs" / "bitwise.md"
SAME, ROUNDING, NONE, NOT_APPLICABLE = "same bits", "to rounding", "no promise", "n/a"
WORDS = (SAME, ROUNDING, NONE, NOT_APPLICABLE)


def table() -> dict[str, dict[str, str]]:
    """What each column says, by the test that the row names. Columns: "triton", "native, CPU" and so on.

    Raises:
        ValueError: a test is named twice.
    """
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    columns, found = [name.replace("`", "") for name in head[1:-1]], {}
    for _, *cells, test in body:
        name = test.replace("`", "")
        if name in found:
            raise ValueError(f"{PAGE.name}: one row a test, got {name} twice")
        found[name] = dict(zip(columns, cells, strict=True))
    return found


def column_of(backend: str, device: str) -> str:
    """The column of a backend; ``device``: "cpu" or "cuda"."""
    return f"{backend}, {'CPU' if device == 'cpu' else 'CUDA'}" if backend == "native" else backend

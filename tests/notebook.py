"""docs/walkthrough.ipynb from docs/walkthrough.md: a cell for each block that runs, text in between.

python tests/notebook.py        # writes docs/walkthrough.ipynb
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").is_file())
PAGE, NOTEBOOK = ROOT / "docs" / "walkthrough.md", ROOT / "docs" / "walkthrough.ipynb"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.M | re.S)
SHELL = "%%bash -e\n"  # of IPython: the cell is a script that ends at its first error
BY_HAND = "pip install"  # a block with this is shown and not run: whoever reads the notebook has it installed


def notebook(page: str) -> dict[str, Any]:
    """In the format 4.5 of nbformat, without outputs and times."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, source: str) -> None:
        if source.strip():
            own = {"execution_count": None, "outputs": []} if kind == "code" else {}
            lines = source.strip("\n").splitlines(keepends=True)
            cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, **own, "source": lines})

    start = 0
    for block in BLOCK.finditer(page):
        language, code = block.groups()
        if BY_HAND in code:
            continue
        add("markdown", page[start : block.start()])
        add("code", SHELL + code if language == "bash" else code)
        start = block.end()
    add("markdown", page[start:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def text(page: str) -> str:
    return json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(text(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {NOTEBOOK.relative_to(ROOT)}")

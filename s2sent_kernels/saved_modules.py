"""Which classes the modules of a saved SentenceTransformer have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .files import importing

with importing("sentence-transformers 6 or newer", "sentence-transformers"):
    from sentence_transformers.base.modules import Router


def classes_in(folder: Path) -> Iterator[str]:
    """The full names of the classes that a saved model's modules have, those within Routers included."""
    for entry in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        yield entry["type"]
        yield from _classes_within(folder / entry["path"])


def _classes_within(module: Path) -> Iterator[str]:
    """Those of a saved Router; none for other modules."""
    listing = module / Router.config_file_name
    if listing.is_file():
        for name, kind in json.loads(listing.read_text(encoding="utf-8"))["types"].items():
            yield kind
            yield from _classes_within(module / name)

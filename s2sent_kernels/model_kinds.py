"""What kind of model a folder holds, by its files without weights, and what loads it in Python."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# What a folder holds, in words.
WHOLE = "a whole model, encoder and selector"
CLASSIFIER = "a classifier, encoder and selector included"
SELECTOR = "a selector"
ENCODER = "an encoder alone"
_LOADERS = {
    WHOLE: "S2SentModel.from_pretrained",
    CLASSIFIER: "S2SentForSequenceClassification.from_pretrained",
    SELECTOR: "S2SentSelector.from_pretrained",
    ENCODER: "S2SentModel.from_encoder",
}


def held(folder: str | os.PathLike[str]) -> str | None:
    """WHOLE, CLASSIFIER, SELECTOR or ENCODER. None where the folder's files do not say, or cannot be read."""
    place = Path(folder).expanduser()
    try:
        config = read_json(place / "config.json") or {}
        if are_both(read_json(place / "modules.json"), config):
            classifies = "S2SentForSequenceClassification" in (config.get("architectures") or ())
            return CLASSIFIER if classifies else WHOLE
        if "model_type" in config:
            return ENCODER
        return SELECTOR if isinstance(config.get("selector"), dict) else None
    except Exception:  # a file that is not JSON, or of another structure: who reads it says so
        return None


def got(folder: str | os.PathLike[str]) -> str:
    """The end of an error about a folder of a kind that was not expected: the kind, and what loads it."""
    kind = held(folder)
    if kind is None:
        return f"got {str(folder)!r}"
    of_sentences = kind == WHOLE and has_modules(folder)
    loader = "s2sent_kernels.sentence_transformers.load" if of_sentences else _LOADERS[kind]
    return f"got {str(folder)!r}, {kind}, which {loader} takes"


def has_modules(folder: str | os.PathLike[str]) -> bool:
    """Whether a SentenceTransformer was saved there."""
    return (Path(folder).expanduser() / "modules.json").is_file()


def are_both(modules: Any, config: Any) -> bool:
    """Whether encoder and selector are together, by the content of modules.json and of config.json, None for a file that is not
    there."""
    if any(entry["type"].startswith("s2sent_kernels.") for entry in modules or ()):
        return True
    return bool(config) and config.get("model_type") == "s2sent"


def read_json(path: Path) -> Any:
    """What a file holds, None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

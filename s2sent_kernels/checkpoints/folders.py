"""Whole models' folders: whether their weights have the sizes that their configuration means, before memory is taken for them,
and which file it is that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from . import tensors

REMEDY = "save or download the model again"
# JSON that libraries read on the way to a model, and what it has to be.
_KINDS = {
    "config.json": dict,
    "config_sentence_transformers.json": dict,
    "modules.json": list,
    "sentence_bert_config.json": dict,
    "tokenizer.json": dict,
    "tokenizer_config.json": dict,
}


def check_shapes(folder: Path, make: Callable[[], nn.Module]) -> None:
    """Compare the headers of a folder's safetensors files with the model that its configuration describes.

    Args:
        make: makes it; called on the meta device, where an absurd number costs nothing.

    Raises:
        ValueError: a tensor has another shape; names file and tensor. What cannot be compared is left to whoever loads it.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = make()
    except Exception:  # whoever loads it says what is wrong with the configuration
        return
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:  # its tensors have other shapes in the file
        return
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = f"{getattr(model, 'base_model_prefix', '') or 'model'}."
    for path in files:
        for name, (_, shape) in tensors.entries(path).items():
            wanted = expected.get(name, expected.get(name.removeprefix(prefix), expected.get(prefix + name)))
            if wanted is not None and wanted != shape:
                said = f"expected shape {wanted} as the configuration says, got {shape}"
                raise ValueError(f"{path}: {name}: {said}: {REMEDY}")


def broken(folder: Path) -> str | None:
    """Which of a folder's files cannot be read, in a line; None if all can."""
    for path in sorted(path for path in folder.rglob("*") if path.name in _KINDS or path.suffix == ".safetensors"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            if path.suffix == ".safetensors":
                tensors.entries(path)
            elif not isinstance(json.loads(path.read_text(encoding="utf-8")), _KINDS[path.name]):
                what = "an object" if _KINDS[path.name] is dict else "a list"
                return f"{path}: expected {what} of JSON, got another value: {REMEDY}"
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or str(error).removeprefix(f"{path}: ")
            return f"{path}: {reason.removeprefix('cannot be read: ')}: {REMEDY}"
    return None

"""Weights that a model has and its file has not. transformers draws them at random, and says so in its log alone, which is right
for training on. Whoever is asked for embeddings refuses such a model with the error that is worded here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from . import families

_NAMED = 3  # names in an error
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_OF_ANOTHER_TASK = ("classifier",)  # what a classifier's folder has beside its model


def needed(names: Iterable[str], encoder: nn.Module) -> list[str]:
    """Those of ``names``, weights of a model around ``encoder``, that an embedding depends on, sorted. It does not on a pooler
    behind the blocks, nor on a decoder beside them."""
    blocks = families.find_blocks(encoder)
    place = next((name for name, module in encoder.named_modules() if module is blocks[0]), "")
    aside = {"pooler", "decoder"} - set(place.split("."))
    return sorted(name for name in names if not aside & set(name.split(".")))


def check(
    where: str | os.PathLike[str], encoder: nn.Module, missing: Iterable[str], unexpected: Iterable[str] = ()
) -> None:
    """ValueError where an embedding would depend on weights that were not read.

    Args:
        where: the folder, the file or the hub's model that was read.
        encoder: the one in the model.
        missing: the model's weights that are not there.
        unexpected: those of the file that the model has not, where a file of this package was read: they were trained, so that
            another model is described than the one that was saved. An encoder's file may hold heads of other tasks.
    """
    absent = needed(missing, encoder)
    if absent:
        raise ValueError(f"expected weights {_listed(absent)} in {file_of(where)}, and they are not there")
    unknown = sorted(name for name in unexpected if name.split(".")[0] not in _OF_ANOTHER_TASK)
    if unknown:
        raise ValueError(f"expected no weights but the model's in {file_of(where)}, got {_listed(unknown)}")


def unread(encoder: Any) -> list[str]:
    """The parameters of a model of transformers, as ``from_pretrained`` returned it, that no file held. For where somebody else
    called it, without asking for what it found."""
    if not isinstance(encoder, nn.Module):  # one that another runtime computes
        return []
    if getattr(encoder, "hf_quantizer", None) is not None:  # which makes its own of what was read
        return []
    ignored = [re.compile(pattern) for pattern in getattr(encoder, "_keys_to_ignore_on_load_missing", None) or ()]
    return [
        name
        for name, parameter in encoder.named_parameters()
        # The mark by which the library itself decides what is left to initialise. What a device map has put aside, on the meta
        # device, has lost it.
        if not (getattr(parameter, "_is_hf_initialized", False) or parameter.is_meta)
        and not any(one.search(name) for one in ignored)
    ]


def _listed(names: list[str]) -> str:
    rest = len(names) - _NAMED
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    return shown if rest <= 0 else f"{shown} and {rest} other{'s' if rest > 1 else ''}"


def file_of(where: str | os.PathLike[str]) -> str:
    """The file of weights in a folder; what is no folder stays as it is."""
    found = (Path(where) / name for name in _FILES)
    return str(next((path for path in found if path.is_file()), where))

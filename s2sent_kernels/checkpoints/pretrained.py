"""A selector's folder: config.json and model.safetensors. Some folders ship with the package, named after their encoder.

config.json is {"format": 1, "selector": {arguments of S2SentSelector}, ...}. Optional entries: "blocks", the encoder's blocks
that the selector reads; "pooling", for which it was trained; "scalar_mix", the weights of its baseline.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..files import data_folder, first_line, new_folder, require, write_atomically
from . import tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1
REMEDY = "save or download the selector again"
ARGUMENTS = (
    "hidden_size",
    "num_blocks",
    "bottleneck",
    "frequencies",
    "profile",
    "gate_norm",
    "block_prior",
    "activation",
    "gate_scale",
)
LATER = ("gate_scale",)  # missing in folders that were saved before there were these


def shipped() -> list[str]:
    """The names that ``find`` accepts beside folders."""
    root = data_folder()
    return sorted(path.name for path in root.iterdir() if (path / CONFIG).exists()) if root.is_dir() else []


def find(name_or_folder: str | os.PathLike[str]) -> Path:
    """The folder of a shipped name, or the folder itself.

    Raises:
        ValueError: there is neither; lists the shipped names.
    """
    if not isinstance(name_or_folder, (str, os.PathLike)):
        raise TypeError(f"name_or_folder: expected a string or a path, got {type(name_or_folder).__name__}")
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if str(name_or_folder) in shipped():
        return data_folder() / str(name_or_folder)
    raise ValueError(
        f"name_or_folder: expected a folder or one of the shipped names {', '.join(shipped()) or '(none)'}, "
        f"got {str(name_or_folder)!r}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json: the selector's arguments under "selector", and what else was saved with them.

    Raises:
        ValueError: the file cannot be read or is no selector's configuration; names it.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ValueError(f"{path}: cannot be read: {reason}: {REMEDY}") from error
    if isinstance(config, dict) and "model_type" in config:
        raise ValueError(
            f"{path}: expected the configuration of a selector, got that of a model of type {config['model_type']!r}: "
            "a folder of encoder and selector is loaded as a whole"
        )
    if not isinstance(config, dict) or config.get("format") != FORMAT or not isinstance(config.get("selector"), dict):
        raise ValueError(f"{path}: expected the configuration of a selector, format {FORMAT}: {REMEDY}")
    for name in ARGUMENTS:
        if name not in config["selector"] and name not in LATER:
            raise ValueError(f"{path}: expected {name!r} under 'selector', and it is not there: {REMEDY}")
    return config


def read_weights(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of model.safetensors, which must have the names and shapes of ``expected``; in the dtypes they were saved in.
    The file's header is compared with ``expected`` before anything is read, which may be on the meta device.

    Raises:
        ValueError: the file cannot be read, or a tensor is missing, unknown, of another shape or kind of numbers, or not finite;
            names it.
    """
    library = require("safetensors.torch", "safetensors", None)
    path = folder / WEIGHTS
    tensors.check(path, expected, REMEDY)
    try:
        state: dict[str, Tensor] = library.load_file(path)
    except Exception as error:  # an error class of safetensors itself
        raise ValueError(f"{path}: cannot be read: {first_line(error)}: {REMEDY}") from error
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name}: expected finite numbers, got others: {REMEDY}")
    return state


def check_state(path: str | os.PathLike[str], state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """ValueError unless ``state``, read from the file ``path``, has the names and shapes of ``expected``, a selector's."""
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"{path}: expected a tensor {name!r}, and it is not there")
        if state[name].shape != tensor.shape:
            raise ValueError(f"{path}: {name}: expected shape {list(tensor.shape)}, got {list(state[name].shape)}")
    extra = sorted(set(state) - set(expected))
    if extra:
        raise ValueError(f"{path}: expected no tensors but the selector's, got {', '.join(extra)}")


def check_savable(state: Mapping[str, Tensor]) -> None:
    """ValueError unless every tensor of ``state``, a selector's, has memory of its own that a file can hold."""
    for name, tensor in state.items():
        if is_traceable_wrapper_subclass(tensor):
            raise ValueError(
                f"{name}: expected an ordinary tensor to save, got {type(tensor).__name__}: save the selector before it is "
                "quantised, and quantise what is loaded; of a sharded one, save the full state"
            )


def save(
    folder: str | os.PathLike[str],
    arguments: Mapping[str, Any],
    state: Mapping[str, Tensor],
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors: a folder that is new or empty is there whole or not at all; in any other, each
    of the two is.

    Args:
        folder: created if missing.
        arguments: of S2SentSelector, one for each of ARGUMENTS.
        state: its state_dict.
        about: further entries of config.json.

    Raises:
        ValueError: as ``check_savable``; nothing is written.
    """
    check_savable(state)
    library = require("safetensors.torch", "safetensors", None)
    path = Path(folder)
    config = {"format": FORMAT, "selector": dict(arguments), **(about or {})}
    saved = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content = {
        WEIGHTS: library.save(saved, metadata={"format": "pt"}),
        CONFIG: (json.dumps(config, indent=1) + "\n").encode(),
    }
    filled = path.is_dir() and any(path.iterdir())
    with contextlib.nullcontext(path) if filled else new_folder(path) as place:
        for name, data in content.items():
            write_atomically(place / name, data)

"""Selectors in folders: config.json and model.safetensors. Some are shipped with the package, by the name of their encoder."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from . import families

if TYPE_CHECKING:
    from .selector import S2SentSelector

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1
_ARGUMENTS = (
    "hidden_size",
    "num_blocks",
    "bottleneck",
    "frequencies",
    "profile",
    "gate_norm",
    "block_prior",
    "activation",
)


def _shipped_root() -> Path:
    return Path(str(resources.files(__package__))) / "data"


def shipped() -> list[str]:
    """The names that ``S2SentSelector.from_pretrained`` takes beside folders."""
    root = _shipped_root()
    return sorted(path.name for path in root.iterdir() if (path / CONFIG).exists()) if root.is_dir() else []


def find(name_or_folder: str | os.PathLike[str]) -> Path:
    """The folder of a shipped name, or the folder itself.

    Raises:
        ValueError: neither is there; says which names are.
    """
    if not isinstance(name_or_folder, (str, os.PathLike)):
        raise TypeError(f"name_or_folder: expected a string or a path, got {type(name_or_folder).__name__}")
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if str(name_or_folder) in shipped():
        return _shipped_root() / str(name_or_folder)
    raise ValueError(
        f"name_or_folder: expected a folder or one of the shipped names {', '.join(shipped()) or '(none)'}, "
        f"got {str(name_or_folder)!r}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json: the selector's arguments under "selector", and what else was saved with them."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT or not isinstance(config.get("selector"), dict):
        raise ValueError(f"{path}: expected the configuration of a selector, format {FORMAT}")
    for name in _ARGUMENTS:
        if name not in config["selector"]:
            raise ValueError(f"{path}: expected {name!r} under 'selector', and it is not there")
    return config


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"safetensors cannot be imported ({error}): pip install safetensors") from error
    return safetensors.torch


def save(selector: S2SentSelector, folder: str | os.PathLike[str], about: dict[str, Any] | None = None) -> None:
    """Write config.json and model.safetensors, each whole or not at all. ``about`` joins the configuration."""
    from .pictures import write_atomically

    tensors = _safetensors()
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    arguments = {name: getattr(selector, name) for name in _ARGUMENTS if name != "block_prior"}
    arguments["block_prior"] = selector.block_prior is not None
    config = {"format": FORMAT, "selector": arguments, **(about or {})}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in selector.state_dict().items()}
    write_atomically(path / WEIGHTS, tensors.save(state, metadata={"format": "pt"}))
    write_atomically(path / CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def blocks_of(config: dict[str, Any], encoder: nn.Module) -> tuple[int, ...]:
    """Which blocks of ``encoder`` a folder's selector reads: what it was trained for, else the last of them.

    Raises:
        ValueError: the encoder has no such blocks, or another D.
    """
    wanted = config["selector"]
    blocks = config.get("blocks", f"last:{wanted['num_blocks']}")
    depth, size = len(families.find_blocks(encoder)), families.hidden_size(encoder)
    try:
        chosen = families.indices(blocks, depth)
    except (ValueError, TypeError):
        chosen = ()
    if len(chosen) != wanted["num_blocks"] or size not in (None, wanted["hidden_size"]):
        raise ValueError(
            f"selector: expected an encoder with blocks {blocks} of {wanted['hidden_size']} features, "
            f"got {type(encoder).__name__} with {depth} of {size}"
        )
    return chosen


def load(kind: type[S2SentSelector], name_or_folder: str | os.PathLike[str], backend: str = "auto") -> S2SentSelector:
    """The selector of a folder or a shipped name, in eval mode and in the dtype that it was saved in."""
    folder = find(name_or_folder)
    config = read_config(folder)["selector"]
    try:
        selector = kind(**{name: config[name] for name in _ARGUMENTS}, backend=backend)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    tensors = _safetensors()
    path = folder / WEIGHTS
    try:
        state = tensors.load_file(path)
    except Exception as error:  # a missing file, or bytes that are no tensors: safetensors has an error of its own
        raise ValueError(f"{path}: cannot be read: {error}") from error
    expected = selector.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"{path}: expected a tensor {name!r}, and it is not there")
        if state[name].shape != tensor.shape:
            raise ValueError(f"{path}: {name}: expected shape {list(tensor.shape)}, got {list(state[name].shape)}")
    extra = sorted(set(state) - set(expected))
    if extra:
        raise ValueError(f"{path}: expected no tensors but the selector's, got {', '.join(extra)}")
    selector.to(state["down.weight"].dtype).load_state_dict(state)
    return selector.eval()

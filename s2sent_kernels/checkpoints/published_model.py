"""Whole checkpoints of the authors' published code, which builds on SimCSE: encoder, selector and head in one state_dict."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import hub
from .published import convert

ENCODERS = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta."}
SELECTOR, HEAD = "S2A.", "mlp."
_LEFT_OUT = ("lm_head.", "cls.")  # the masked language model's head
_HARMLESS = ("embeddings.position_ids", "embeddings.token_type_ids")  # buffers that older transformers saved
_FILES = ("model.safetensors", "pytorch_model.bin")


class Published(NamedTuple):
    """What a checkpoint holds."""

    encoder: Any  # a model of transformers, float32, in eval mode
    arguments: dict[str, Any]  # of S2SentSelector
    selector: dict[str, Tensor]  # its state_dict, in the dtypes of the file
    head: dict[str, Tensor]  # empty if the checkpoint has none


def read(path: str | os.PathLike[str]) -> Published:
    """Read the checkpoint in the folder ``path``.

    Raises:
        ValueError: as S2SentModel.from_published.
    """
    import transformers

    folder = Path(path).expanduser()
    found = [folder / name for name in _FILES if (folder / name).is_file()]
    if not found or not (folder / "config.json").is_file():
        raise ValueError(f"path: expected a folder with config.json and {' or '.join(_FILES)}, got {str(path)!r}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **hub.NO_CODE)
        state = _load(found[0])
    except Exception as error:  # the loaders raise errors of many kinds
        raise ValueError(f"{folder}: cannot be read: {' '.join(str(error).split())}") from error
    prefix = ENCODERS.get(config.model_type)
    if prefix is None:
        raise ValueError(f"{folder}: expected an encoder of {', '.join(ENCODERS)}, got {config.model_type!r}")
    unknown = [key for key in state if not key.startswith((prefix, SELECTOR, HEAD, *_LEFT_OUT))]
    if unknown:
        raise ValueError(f"{found[0]}: expected keys under {prefix}, {SELECTOR} and {HEAD}, got {_some(unknown)}")
    arguments, selector = convert(state, SELECTOR, None)
    layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(state):  # each has many tensors
        raise ValueError(
            f"{folder / 'config.json'}: num_hidden_layers: expected as many as in {found[0]}, got {layers}"
        )
    with torch.device("meta"):  # without memory: a number in the file may be absurd
        shapes = transformers.AutoModel.from_config(config, dtype=torch.float32)
    _fill(shapes, _under(state, prefix), found[0], prefix, assign=True)
    encoder = transformers.AutoModel.from_config(config, dtype=torch.float32).eval()
    _fill(encoder, _under(state, prefix), found[0], prefix)
    head = _under(state, HEAD)
    shapes = {name: list(tensor.shape) for name, tensor in head.items()}
    size = arguments["hidden_size"]
    if head and shapes != {"dense.weight": [size, size], "dense.bias": [size]}:
        raise ValueError(
            f"{found[0]}: expected {HEAD}dense.weight [D, D] and {HEAD}dense.bias [D], D = {size}, got {shapes}"
        )
    if encoder.config.hidden_size != size:
        raise ValueError(f"{found[0]}: expected a selector for D = {encoder.config.hidden_size}, got D = {size}")
    return Published(encoder, arguments, selector, head)


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".bin":
        return torch.load(path, map_location="cpu", weights_only=True)
    from safetensors.torch import load_file

    return load_file(path)


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _fill(encoder: Any, state: dict[str, Tensor], path: Path, prefix: str, *, assign: bool = False) -> None:
    try:
        missing, unexpected = encoder.load_state_dict(state, strict=False, assign=assign)
    except RuntimeError as error:  # a tensor of another shape
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    missing = [prefix + key for key in missing if not key.startswith("pooler.")]  # the pooler is unused
    unexpected = [prefix + key for key in unexpected if key not in _HARMLESS]
    if missing:
        raise ValueError(f"{path}: expected the encoder's {_some(missing)}, not there")
    if unexpected:
        raise ValueError(f"{path}: expected only keys of {type(encoder).__name__}, got {_some(unexpected)}")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")

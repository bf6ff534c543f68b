"""A selector's state from the authors' published code: its M, and its tensors under this project's names.

Published keys (github.com/hggzjx/S2Sent): ``dense_z.0``, ``dense_select_weights.{n}.0`` (linear) and ``.{n}.1`` (batch norm),
and ``squeeze.weight`` [D, 6, 6], the DCT basis as a buffer; usually with the prefix ``S2A.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..formula import dct

_DEFAULT_FREQUENCIES = 4


def _take(state_dict: Mapping[str, Tensor], prefix: str, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """The tensor of a published key, of ``shape`` (None: any matrix)."""
    key = prefix + name
    if key in state_dict:
        tensor = state_dict[key]
        if tensor.dim() != 2 if shape is None else tensor.shape != shape:
            expected = "[H, D]" if shape is None else list(shape)
            raise ValueError(f"state_dict[{key!r}]: expected shape {expected}, got {list(tensor.shape)}")
        return tensor
    elsewhere = [other[: -len(name)] for other in state_dict if other.endswith(name)]
    hint = f"; such a key stands under prefix {elsewhere[0]!r}" if elsewhere else ""
    raise ValueError(f"state_dict: expected the published key {key!r}, and it is not there{hint}")


def _frequencies(basis: Tensor | None, key: str, hidden_size: int) -> int:
    """M, recognised by the basis buffer: feature d holds c(x, i, 6) c(y, j, 6) of its part's pair (x, y), x along blocks."""
    if basis is None:
        return _DEFAULT_FREQUENCIES
    cells = torch.arange(dct.GRID)
    for frequencies in dct.OFFICIAL_FREQUENCIES:
        if hidden_size % frequencies or basis.shape != (hidden_size, dct.GRID, dct.GRID):
            continue
        x, y = torch.tensor(dct.frequency_pairs(dct.GRID, frequencies, "official")).T
        along_blocks = dct.cosine(x[:, None], cells, dct.GRID)
        along_tokens = dct.cosine(y[:, None], cells, dct.GRID)
        plane = along_blocks[:, :, None] * along_tokens[:, None, :]
        expected = plane.repeat_interleave(hidden_size // frequencies, dim=0)
        # The tolerance admits checkpoints in float16 and bfloat16.
        if torch.allclose(basis.double().cpu(), expected, atol=5e-3):
            return frequencies
    raise ValueError(
        f"state_dict[{key!r}]: expected the DCT basis of M in {dct.OFFICIAL_FREQUENCIES} as [D, 6, 6] with "
        f"D = {hidden_size}, got shape {list(basis.shape)} with other values"
    )


def convert(
    state_dict: Mapping[str, Tensor], prefix: str, frequencies: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments and the state_dict of an S2SentSelector. M is recognised by the basis buffer where ``frequencies`` is None.

    Raises:
        ValueError: a key is missing or has an unexpected shape; names it.
        TypeError: ``state_dict`` is no mapping, as the path of a file.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict: expected a mapping from names to tensors, as safetensors.torch.load_file gives it, got "
            f"{type(state_dict).__name__}"
        )
    down_weight = _take(state_dict, prefix, "dense_z.0.weight")
    width, hidden_size = down_weight.shape
    stem = f"{prefix}dense_select_weights."
    numbers = [key[len(stem) :].partition(".")[0] for key in state_dict if key.startswith(stem)]
    num_blocks = 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)
    blocks = range(max(num_blocks, 1))  # without any, _take names the first missing key

    def stacked(name: str, *shape: int) -> Tensor:
        return torch.cat([_take(state_dict, prefix, f"dense_select_weights.{n}.{name}", shape) for n in blocks])

    state = {
        "down.weight": down_weight,
        "down.bias": _take(state_dict, prefix, "dense_z.0.bias", (width,)),
        "up.weight": stacked("0.weight", hidden_size, width),
        "up.bias": stacked("0.bias", hidden_size),
        "norm.weight": stacked("1.weight", hidden_size),
        "norm.bias": stacked("1.bias", hidden_size),
        "norm.running_mean": stacked("1.running_mean", hidden_size),
        "norm.running_var": stacked("1.running_var", hidden_size),
        "norm.num_batches_tracked": _take(state_dict, prefix, "dense_select_weights.0.1.num_batches_tracked", ()),
    }
    if frequencies is None:
        key = f"{prefix}squeeze.weight"
        frequencies = _frequencies(state_dict.get(key), key, hidden_size)
    arguments = {
        "hidden_size": hidden_size,
        "num_blocks": num_blocks,
        "bottleneck": width,
        "frequencies": frequencies,
        "profile": "official",
    }
    return arguments, state

"""Where encoders of different families keep their blocks and their sizes, found by structure and not by class."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

# Names of the sizes in configurations. The attribute map of transformers resolves the first of each for most families.
_NUM_BLOCKS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
_HIDDEN_SIZE = ("hidden_size", "dim", "d_model", "n_embd")
# Names, beside the list of blocks, of the norm after the last block in pre-norm families: ModernBERT; T5; Llama, Qwen3, Mistral,
# Gemma; GPT-2; GPT-NeoX, Phi. DeBERTa-v2 has a norm of its position embeddings there, ``LayerNorm``.
_FINAL_NORMS = ("final_norm", "final_layer_norm", "norm", "ln_f", "final_layernorm")
_POSITIONS = ("position_embeddings", "wpe")  # BERT and its kind; GPT-2


def _first(config: Any, names: Sequence[str]) -> int | None:
    """The first of a configuration's attributes that is there."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def depth_of(config: Any) -> int | None:
    """How many blocks a configuration has, or None where it does not say."""
    return _first(config, _NUM_BLOCKS)


def features_of(config: Any) -> int | None:
    """D by a configuration, or None where it does not say."""
    return _first(config, _HIDDEN_SIZE)


def hidden_size(encoder: nn.Module) -> int | None:
    """D by the encoder's configuration, or None where it has none."""
    return features_of(getattr(encoder, "config", None))


def _find_lists(encoder: Any) -> tuple[list[tuple[nn.Module, nn.ModuleList]], int]:
    """The modules with an nn.ModuleList as long as the configured number of blocks, or of groups for ALBERT, which runs each
    group several times; and how many blocks run."""
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder: expected a torch.nn.Module, got {type(encoder).__name__}")
    config, name = getattr(encoder, "config", None), type(encoder).__name__
    depth = _first(config, _NUM_BLOCKS)
    if depth is None:
        raise ValueError(f"encoder: expected a config with one of {', '.join(_NUM_BLOCKS)}, got {name} without")
    length = getattr(config, "num_hidden_groups", depth)
    found = [
        (parent, child)
        for parent in encoder.modules()
        for child in parent.children()
        if isinstance(child, nn.ModuleList) and len(child) == length
    ]
    if not found:
        raise ValueError(
            f"encoder: expected an nn.ModuleList of {length} blocks, as the config says, got {name} without"
        )
    return found, depth


def block_lists(encoder: Any) -> list[list[nn.Module]]:
    """For every list that may be the encoder's blocks, the module that runs as block i, for every i; the same one several times
    where blocks are shared. The first list is that of almost every family. Others stand beside it in the same module, as XLM's
    attentions and norms do: a list elsewhere is that of a decoder.

    Raises:
        TypeError, ValueError: as ``find_blocks``.
    """
    found, depth = _find_lists(encoder)
    beside = [modules for parent, modules in found if parent is found[0][0]]
    return [[modules[block * len(modules) // depth] for block in range(depth)] for modules in beside]


def find_blocks(encoder: Any) -> list[nn.Module]:
    """The first of ``block_lists``.

    Raises:
        TypeError: no nn.Module. ValueError: no configured number of blocks, or no list of that length.
    """
    return block_lists(encoder)[0]


def find_again(encoder: Any, blocks: Sequence[int], modules: Sequence[nn.Module]) -> tuple[int, ...]:
    """The indices that blocks found at ``blocks``, these ``modules``, have in an encoder from which layers may have been removed
    since. Something may have been wrapped around a block.

    Raises:
        ValueError: a block is no longer there; names it.
    """
    if len(set(modules)) < len(modules):  # one module runs as several blocks, and says nothing of their indices
        return tuple(blocks)
    lists = [[set(block.modules()) for block in found] for found in block_lists(encoder)]
    for index, module in zip(blocks, modules, strict=True):
        lists = [found for found in lists if any(module in parts for parts in found)]
        if not lists:
            raise ValueError(
                f"encoder: expected block {index}, whose hidden states are fused, got {type(encoder).__name__} without it: make "
                "the model anew around the shorter encoder"
            )
    return tuple(next(n for n, parts in enumerate(lists[0]) if module in parts) for module in modules)


def find_final_norm(encoder: nn.Module) -> nn.Module | None:
    """The norm that the encoder applies to its last block's output by its name, None in post-norm families. A guess, for encoders
    that cannot be run to ask them (``probe``)."""
    ((parent, _), *_), _ = _find_lists(encoder)
    norms = (getattr(parent, name, None) for name in _FINAL_NORMS)
    return next((norm for norm in norms if isinstance(norm, nn.Module)), None)


def hidden_state(output: Any) -> Tensor | None:
    """What a block returned: a tensor, or a tuple or list led by one."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None


def _position_table(encoder: nn.Module) -> nn.Embedding | None:
    tables = ((name, module) for name, module in encoder.named_modules() if isinstance(module, nn.Embedding))
    return next((module for name, module in tables if name.rpartition(".")[2] in _POSITIONS), None)


def positions(encoder: nn.Module) -> int | None:
    """The number of tokens that an encoder's table of positions has rows for, or None without one."""
    table = _position_table(encoder)
    return None if table is None else table.num_embeddings - first_position(encoder)


def first_position(encoder: nn.Module) -> int:
    """The position of a text's first token. RoBERTa, XLM-R and MPNet start after the table's row for padding."""
    table = _position_table(encoder)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def float_parameter(encoder: nn.Module) -> nn.Parameter:
    """The first of an encoder's parameters that is a floating point one: its dtype is that of the computation."""
    return next(parameter for parameter in encoder.parameters() if parameter.is_floating_point())


def without_cache(encoder: nn.Module) -> dict[str, Any]:
    """Arguments of a call that keeps no keys and values for a next one, as decoders do where they are not told otherwise."""
    return {"use_cache": False} if "use_cache" in inspect.signature(encoder.forward).parameters else {}


def max_length(encoder: nn.Module, tokenizer: Any, wanted: int | None = None) -> int:
    """Tokens after which a text is truncated: the wanted number (None: as many as the encoder's configuration has positions, or
    512), or fewer where tokenizer or encoder supports fewer. A tokenizer saved without a limit has 1e30."""
    if wanted is None:
        configured = getattr(encoder.config, "max_position_embeddings", None)  # also of encoders without a table
        wanted = configured if isinstance(configured, int) and configured > 0 else 512
    return min(wanted, tokenizer.model_max_length, positions(encoder) or wanted)


def indices(blocks: Any, depth: int) -> tuple[int, ...]:
    """``blocks`` (indices, negative ones from the last; "last:N"; None for all) as ascending indices from 0.

    Raises:
        TypeError, ValueError: not of this form, empty, out of range, or repeated.
    """
    if blocks is None:
        return tuple(range(depth))
    if isinstance(blocks, str):
        kind, _, count = blocks.partition(":")
        if kind != "last" or not count.isdecimal() or not 1 <= int(count) <= depth:
            raise ValueError(f"blocks: expected indices or 'last:N' with N from 1 to {depth}, got {blocks!r}")
        return tuple(range(depth - int(count), depth))
    if not isinstance(blocks, Sequence):
        raise TypeError(f"blocks: expected a sequence of integers, 'last:N' or None, got {type(blocks).__name__}")
    if len(blocks) == 0:
        raise ValueError("blocks: expected at least one index, got none")
    found = []
    for value in blocks:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"blocks: expected integers, got {type(value).__name__}")
        index = operator.index(value)
        if not -depth <= index < depth:
            raise ValueError(f"blocks: expected indices from {-depth} to {depth - 1} of {depth} blocks, got {index}")
        found.append(index % depth)
    if len(set(found)) < len(found):
        raise ValueError(f"blocks: expected each block once, got {list(blocks)}")
    return tuple(sorted(found))

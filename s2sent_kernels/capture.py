"""BlockCapture: the hidden states of chosen blocks of a transformers encoder, handed over or consumed as they come."""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from . import validate
from .blockwise import BlockwisePool
from .selector import S2SentSelector

# What configurations call the two sizes; transformers' attribute map already answers to the first of each for most.
_NUM_BLOCKS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
_HIDDEN_SIZE = ("hidden_size", "dim", "d_model", "n_embd")


class BlockCapture:
    """Forward hooks on chosen blocks of an encoder; ``output_hidden_states`` is not needed.

        capture = BlockCapture(encoder, blocks=(-3, -2, -1))
        embeddings = capture.pool(selector, input_ids=ids, attention_mask=mask)     # [B, D]

    Args:
        encoder: a transformers model of the BERT, RoBERTa, MPNet or DistilBERT kind: post-norm blocks, in an
            nn.ModuleList of as many as its configuration says.
        blocks: which blocks, 0 the lowest, negative from the last; None takes all. Whatever the order given, hidden
            states come lowest first. Block i's output is ``hidden_states[i + 1]`` of ``output_hidden_states=True``.

    A call's state lives on its own thread until the call ends or fails. So nested calls, and threads that share a
    model, do not mix, and outside of a call (in the encoder's own forward, in a checkpoint's recomputation) the hooks
    do nothing. Where a block runs more than once within a call, its first output counts.

    The hooks stay when the capture is forgotten: ``remove`` them, or use the capture as a context manager. Encoder and
    capture can be copied and pickled: a copied or loaded capture belongs to the encoder copied or loaded with it, and
    the hooks of an encoder that is loaded without its capture do nothing.

    torch.compile: the hooks are traced, also with ``fullgraph=True``; the encoder's own forward, ``collect`` and
    ``pool`` are compiled once each. Capture ``torch.compile(encoder)``, or the encoder before or after
    ``encoder.compile()``, but before it first runs compiled; the capture calls what it was given. Where single blocks
    are compiled results are right, but every block counts against the recompilation limit: beyond it the hooks run
    uncompiled, and ``fullgraph=True`` fails.

    Raises:
        ValueError, TypeError: an argument is wrong, or the encoder's blocks cannot be found or are shared (ALBERT).
    """

    def __init__(self, encoder: nn.Module, blocks: Sequence[int] | None = None) -> None:
        found = _find_blocks(encoder)
        self.encoder = encoder
        self.blocks = _indices(blocks, len(found))
        self._modules = [found[index] for index in self.blocks]
        # Copies of encoder and capture share the key, which is how a copied hook still finds its copied capture.
        self._key = uuid4().hex
        self._handles = [
            module.register_forward_hook(partial(_deliver, self._key, n)) for n, module in enumerate(self._modules)
        ]

    def __repr__(self) -> str:
        return f"BlockCapture({type(self.encoder).__name__}, blocks={self.blocks})"

    def collect(self, **encoder_inputs: Any) -> list[Tensor]:
        """Run the encoder on its inputs, as given; the chosen blocks' N hidden states [B, L, D], lowest first.

        Raises:
            RuntimeError: a block never ran (LayerDrop), or ran where its gradient is lost (a reentrant checkpoint);
                names it. Or the hooks were removed.
        """
        kept = _Kept()
        self._run(kept, encoder_inputs)
        return kept.hidden_states

    def pool(self, selector: S2SentSelector, *, pooling: str = "mean", **encoder_inputs: Any) -> Tensor:
        """Sentence embeddings o [B, D]: ``selector.pool`` of the blocks under the inputs' ``attention_mask`` [B, L].

        Without gradients (grad mode off, or nothing that requires one) each block is squeezed and pooled as it finishes
        and its hidden state let go, so that peak memory is the encoder's own.

        Raises:
            ValueError: the selector's N or D is not the capture's, before the encoder runs; the mask has another shape.
            RuntimeError: as ``collect``.
        """
        self._check(selector)
        validate.option("pooling", pooling, validate.POOLINGS)
        mask = encoder_inputs.get("attention_mask")
        if self._needs_gradient(selector, encoder_inputs):
            return selector.pool(self.collect(**encoder_inputs), mask, pooling=pooling)
        stream = selector.blockwise(mask, pooling=pooling)
        self._run(stream, encoder_inputs)
        return stream.result()

    def fuse(self, selector: S2SentSelector, **encoder_inputs: Any) -> Tensor:
        """Fused tokens v [B, L, D], 0 at padding: ``selector`` of the blocks. Errors as in ``pool``."""
        self._check(selector)
        return selector(self.collect(**encoder_inputs), encoder_inputs.get("attention_mask"))

    def remove(self) -> None:
        """Take the hooks off; again is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> BlockCapture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _run(self, consumer: _Kept | BlockwisePool, encoder_inputs: dict[str, Any]) -> None:
        if not self._handles:
            raise RuntimeError("the capture's hooks were removed: make a new BlockCapture")
        call = _Call(self, consumer)
        _thread.calls.append(call)
        try:
            self.encoder(**encoder_inputs)
        finally:
            _thread.calls.pop()
        if call.next < len(self.blocks):
            raise call.missing()

    def _check(self, selector: S2SentSelector) -> None:
        if selector.num_blocks != len(self.blocks):
            raise ValueError(
                f"selector: expected num_blocks = {len(self.blocks)}, as many as captured, got {selector.num_blocks}"
            )
        size = _first(getattr(self.encoder, "config", None), _HIDDEN_SIZE)
        if size is not None and selector.hidden_size != size:
            raise ValueError(f"selector: expected hidden_size = {size} as the encoder's, got {selector.hidden_size}")

    def _needs_gradient(self, selector: nn.Module, encoder_inputs: dict[str, Any]) -> bool:
        if not torch.is_grad_enabled():
            return False
        inputs = (value for value in encoder_inputs.values() if isinstance(value, Tensor))
        tensors = chain(inputs, selector.parameters(), self.encoder.parameters())
        return any(tensor.requires_grad for tensor in tensors)


class _Kept:
    """The consumer that keeps every hidden state."""

    def __init__(self) -> None:
        self.hidden_states: list[Tensor] = []

    def add(self, n: int, hidden_state: Tensor) -> None:
        self.hidden_states.append(hidden_state)  # in order: a call lets none come twice or before its turn


class _Call:
    """One run of a capture's encoder: who takes the hidden states, and which comes next. Keeps none itself."""

    def __init__(self, capture: BlockCapture, consumer: _Kept | BlockwisePool) -> None:
        self.key, self.modules, self.blocks = capture._key, capture._modules, capture.blocks
        self.consumer = consumer
        self.with_gradients = torch.is_grad_enabled()
        self.next = 0

    def take(self, n: int, module: nn.Module, output: Any) -> None:
        # A copy of the encoder has hooks of the same key; within a call of this one it is somebody else's.
        if module is not self.modules[n] or n < self.next:
            return
        if n > self.next:
            raise self.missing()
        checkpointed = module.training and getattr(module, "gradient_checkpointing", False)
        if checkpointed and self.with_gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                f"block {self.blocks[n]} runs under a reentrant checkpoint, where its hidden state has no gradient: "
                "checkpoint with use_reentrant=False"
            )
        hidden_state = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(hidden_state, Tensor):
            raise TypeError(
                f"block {self.blocks[n]}: expected a tensor or a tuple led by one, got {type(output).__name__}"
            )
        self.next += 1
        self.consumer.add(n, hidden_state)

    def missing(self) -> RuntimeError:
        block = self.blocks[self.next]
        return RuntimeError(f"block {block} never ran in this forward: skipped (LayerDrop), or replaced once hooked")


class _Thread(threading.local):
    """The calls under way in this thread, innermost last. What runs within a call belongs to the innermost alone."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []


_thread = _Thread()


def _deliver(key: str, n: int, module: nn.Module, args: Any, output: Any) -> None:
    """The hook. A function of this module with plain arguments, so that an encoder that carries it can be pickled."""
    if _thread.calls and _thread.calls[-1].key == key:
        _thread.calls[-1].take(n, module, output)


def _first(config: Any, names: Sequence[str]) -> int | None:
    """The first of a configuration's attributes that is there."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _find_blocks(encoder: Any) -> list[nn.Module]:
    """The first nn.ModuleList that is as long as the configuration says the encoder is deep."""
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder: expected a torch.nn.Module, got {type(encoder).__name__}")
    config, name = getattr(encoder, "config", None), type(encoder).__name__
    depth = _first(config, _NUM_BLOCKS)
    if depth is None:
        raise ValueError(f"encoder: expected a config with one of {', '.join(_NUM_BLOCKS)}, got {name} without")
    groups = getattr(config, "num_hidden_groups", depth)  # ALBERT's
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if groups < depth or (lists and len(set(lists[0])) < depth):
        raise ValueError(
            f"encoder: expected {depth} blocks apart, got {name}, which runs one shared block several times"
        )
    if not lists:
        raise ValueError(
            f"encoder: expected an nn.ModuleList of {depth} blocks, as the config says, got {name} without"
        )
    return list(lists[0])


def _indices(blocks: Any, depth: int) -> tuple[int, ...]:
    """``blocks`` as ascending indices from 0."""
    if blocks is None:
        return tuple(range(depth))
    if isinstance(blocks, str) or not isinstance(blocks, Sequence):
        raise TypeError(f"blocks: expected a sequence of integers or None, got {type(blocks).__name__}")
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

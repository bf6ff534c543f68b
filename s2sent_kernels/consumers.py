"""Who receives the hidden states of an encoder's call, block by block."""

from __future__ import annotations

import functools
import os
from typing import Any, Protocol

import torch
from torch import Tensor

from .blockwise import BlockwisePool
from .selector import S2SentSelector

# Hidden states of all blocks are kept where they are at most this part of their device's memory: 0.5 GB of 141, 64 MB of 16.
# A call is then as fast as the encoder's own. Beyond it a block's states are freed before the next block's are made.
KEPT_SHARE = 1 / 256


class Consumer(Protocol):
    """Receives the hidden states of one call: each once, lowest first. BlockwisePool is one."""

    def add(self, block: int, hidden_state: Tensor, /) -> None: ...


class Told:
    """A consumer that is told what the module that was called has returned."""

    def ended(self, output: Any) -> None:
        raise NotImplementedError


class KeptStates:
    """The consumer that keeps every hidden state."""

    def __init__(self) -> None:
        self.hidden_states: list[Tensor] = []

    def add(self, block: int, hidden_state: Tensor) -> None:
        self.hidden_states.append(hidden_state)  # in order: a call delivers each once, lowest first


class PooledStates:
    """``selector.pool`` of a call's hidden states, without gradients.

    They are kept until the last one is there if all of them are small for their device, else pooled one by one as they
    arrive. The first one tells. Engines with kernels give the same bits either way (docs/bitwise.md).
    """

    def __init__(
        self, selector: S2SentSelector, attention_mask: Tensor | None, cu_seqlens: Tensor | None, pooling: str
    ) -> None:
        self._selector, self._pooling = selector, pooling
        self._mask, self._cu_seqlens = attention_mask, cu_seqlens
        self._kept: list[Tensor] = []
        self._stream: BlockwisePool | None = None

    def add(self, block: int, hidden_state: Tensor) -> None:
        if block == 0 and not _is_small(hidden_state, self._selector.num_blocks):
            self._stream = self._selector.blockwise(self._mask, cu_seqlens=self._cu_seqlens, pooling=self._pooling)
        if self._stream is None:
            self._kept.append(hidden_state)
        else:
            self._add_to(self._stream, block, hidden_state)

    def result(self) -> Tensor:
        """Sentence embeddings o [B, D]."""
        if self._stream is not None:
            return self._result_of(self._stream)
        with torch.no_grad():
            return self._of_kept(self._kept)

    def _add_to(self, stream: BlockwisePool, block: int, hidden_state: Tensor) -> None:
        stream.add(block, hidden_state)

    def _result_of(self, stream: BlockwisePool) -> Tensor:
        return stream.result()

    def _of_kept(self, hidden_states: list[Tensor]) -> Tensor:
        return self._selector.pool(hidden_states, self._mask, cu_seqlens=self._cu_seqlens, pooling=self._pooling)


def _is_small(hidden_state: Tensor, num_blocks: int) -> bool:
    # While a graph is traced its sizes are symbols, and what is freed is the compiler's decision.
    if torch.compiler.is_compiling():
        return False
    size = hidden_state.numel() * hidden_state.element_size() * num_blocks
    return size <= _memory_of(hidden_state.device) * KEPT_SHARE


@functools.cache
def _memory_of(device: torch.device) -> int:
    """Bytes of a device's memory, 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0

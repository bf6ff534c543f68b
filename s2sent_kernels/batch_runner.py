"""One batch of tokens through encoder and selector, in the fastest way there is: packed, padded, or a CUDA graph's replay."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from . import families
from .batches import TextTokenizer, Tokens, to_device
from .consumers import PooledStates
from .encoder_runner import EncoderRunner
from .export import Pipeline
from .replay import CannotCapture, GraphReplay

if TYPE_CHECKING:
    import numpy as np


class Record(Protocol):
    """Embeddings of batches that were run before, and of those that are run now."""

    def find(self, tokens: Tokens, rows: np.ndarray, skip: int) -> np.ndarray | None:
        """float32 [B, D] of the rows, or None where they have to be run."""
        ...

    def add(self, tokens: Tokens, rows: np.ndarray, skip: int, values: np.ndarray) -> None:
        """Told of what was run: float32 [B, D]."""
        ...


class BatchRunner:
    """Runs batches, one at a time; several threads may call it, and several runners may share an encoder.

    Args:
        pipeline: encoder, selector and pooling, in eval mode.
        tokenizer: says how rows are padded.
        pack, cuda_graphs: as Embedder's ``packed`` and ``cuda_graphs``.

    Attributes:
        device: the encoder's.
        padded_because: why batches are not packed, or None.
        record: batches that it knows are not run.

    Raises:
        ValueError: as EncoderRunner; or ``cuda_graphs=True`` and the encoder is not on a GPU.
    """

    def __init__(
        self, pipeline: Pipeline, tokenizer: TextTokenizer, pack: bool | None, cuda_graphs: bool | None
    ) -> None:
        self._pipeline = pipeline
        self.record: Record | None = None
        self._modules = list(pipeline.modules())
        self.check_mode()
        self._encoder = EncoderRunner(pipeline.capture, tokenizer, pack)
        self.device = self._encoder.device
        if cuda_graphs and self.device.type != "cuda":
            raise ValueError(f"cuda_graphs: expected an encoder on a GPU, got one on {self.device}")
        self._graphs_wanted = bool(cuda_graphs)
        on_gpu = self.device.type == "cuda" and cuda_graphs is not False
        self._graphs: GraphReplay | None = None
        if on_gpu:
            limit = families.positions(pipeline.encoder)
            self._graphs = GraphReplay(self._pool_padded, self.device, self._modules, limit, tokenizer.pad_id)

    @property
    def padded_because(self) -> str | None:
        return self._encoder.padded_because

    def check_mode(self) -> None:
        """Raises a ValueError where a module is in training mode."""
        if any(module.training for module in self._modules):
            raise ValueError("pipeline: expected it in eval mode, got it in training mode")

    def packs(self, tokens: Tokens, skip: int) -> bool:
        """Whether batches of these tokens are packed. Raises a ValueError where they must be and cannot."""
        return self._encoder.packs(tokens) and not skip

    @torch.inference_mode()
    def __call__(self, tokens: Tokens, rows: np.ndarray, skip: int = 0) -> Result:
        """o [B, D] of the rows, on its way to the host.

        Args:
            skip: tokens at the start of a text that do not count in the pooling. Such batches are padded.
        """
        record = self.record
        known = None if record is None else record.find(tokens, rows, skip)
        if known is not None:
            return Result(torch.from_numpy(known))
        # Streams and events are those of the current device.
        here = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with self._encoder.lock, here:
            then = None if record is None else functools.partial(record.add, tokens, rows, skip)
            return Result(self._run(tokens, rows, skip), then)

    def _run(self, tokens: Tokens, rows: np.ndarray, skip: int) -> Tensor:
        if self._graphs is not None and not skip and self._fits_a_graph(tokens, rows):
            try:
                return self._graphs(self._encoder.padded(tokens, rows))
            except CannotCapture as error:
                if self._graphs_wanted:
                    raise
                self._graphs = None
                warnings.warn(str(error), stacklevel=2)
        if self.packs(tokens, skip):
            return self._encoder.run_packed(lambda cu_seqlens: self._pooled(None, cu_seqlens), tokens, rows).result()
        inputs = self._encoder.padded(tokens, rows)
        counted = inputs["attention_mask"]
        if skip:
            counted = counted * (counted.cumsum(1) > torch.from_numpy(tokens.uncounted(skip)[rows])[:, None])
        on_device = {name: to_device(tensor, self.device) for name, tensor in inputs.items()}
        return self._pool_padded(on_device, to_device(counted, self.device) if skip else None)

    def _pool_padded(self, inputs: dict[str, Tensor], counted: Tensor | None = None) -> Tensor:
        """o [B, D] of the tokens that count, by default those of the attention mask; on the device."""
        mask = inputs["attention_mask"] if counted is None else counted
        return self._encoder.run_padded(self._pooled(mask, None), inputs).result()

    def _pooled(self, mask: Tensor | None, cu_seqlens: Tensor | None) -> PooledStates:
        return PooledStates(self._pipeline.selector, mask, cu_seqlens, self._pipeline.pooling)

    @staticmethod
    def _fits_a_graph(tokens: Tokens, rows: np.ndarray) -> bool:
        """Whether these few rows are the whole call: the rest of a large one is no reason for another graph."""
        whole = len(rows) == len(tokens.ids) and tokens.types is None
        return whole and GraphReplay.fits(len(rows), max(map(len, tokens.ids)))


class Result:
    """A batch's output on its way to the host.

    Args:
        then: told of it, float32, when it is there.
    """

    def __init__(self, output: Tensor, then: Callable[[np.ndarray], None] | None = None) -> None:
        self._event = None
        self._then = then
        if output.device.type == "cuda":
            host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
            output = host.copy_(output, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._output = output

    def wait(self) -> Tensor:
        """The output, float32 on the host."""
        if self._event is not None:
            self._event.synchronize()
        output = self._output.float()
        if self._then is not None:
            self._then(output.numpy())
        return output

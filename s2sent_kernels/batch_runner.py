"""One batch of tokens through encoder and selector, in the fastest way there is: packed, padded, or a CUDA graph's replay."""

from __future__ import annotations

import contextlib
import threading
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .batches import TextTokenizer, Tokens, packed, padded, to_device
from .consumers import PooledStates
from .export import Pipeline
from .packed import Layout, PackedEncoder, refusal
from .replay import GraphReplay

if TYPE_CHECKING:
    import numpy as np


class BatchRunner:
    """Runs batches, one at a time; several threads may call it.

    Args:
        pipeline: encoder, selector and pooling, in eval mode.
        tokenizer: says how rows are padded.
        pack, cuda_graphs: as Embedder's ``packed`` and ``cuda_graphs``.

    Attributes:
        padded_because: why batches are not packed, or None.

    Raises:
        ValueError: ``pack=True`` and the encoder cannot be run packed, or ``cuda_graphs=True`` and it is not on a GPU.
    """

    def __init__(
        self, pipeline: Pipeline, tokenizer: TextTokenizer, pack: bool | None, cuda_graphs: bool | None
    ) -> None:
        self._pipeline, self._tokenizer = pipeline, tokenizer
        self._lock = threading.Lock()
        self.device = next(pipeline.encoder.parameters()).device
        self.padded_because = "packed=False" if pack is False else refusal(pipeline.capture, self.device)
        if pack and self.padded_because:
            raise ValueError(f"packed: {type(pipeline.encoder).__name__} cannot be run packed: {self.padded_because}")
        self._packed = None if self.padded_because else PackedEncoder(pipeline.capture, self.device)
        if cuda_graphs and self.device.type != "cuda":
            raise ValueError(f"cuda_graphs: expected an encoder on a GPU, got one on {self.device}")
        self._graphs_wanted = bool(cuda_graphs)
        on_gpu = self.device.type == "cuda" and cuda_graphs is not False
        self._graphs = GraphReplay(self._pool_padded, self.device) if on_gpu else None

    @torch.inference_mode()
    def __call__(self, tokens: Tokens, rows: np.ndarray, skip: int = 0) -> Result:
        """o [B, D] of the rows, on its way to the host.

        Args:
            skip: tokens at the start of a text that do not count in the pooling. Such batches are padded.
        """
        # Streams and events are those of the current device.
        here = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with self._lock, here:
            return Result(self._run(tokens, rows, skip))

    def _run(self, tokens: Tokens, rows: np.ndarray, skip: int) -> Tensor:
        if self._graphs is not None and not skip and self._fits_a_graph(tokens, rows):
            try:
                return self._graphs(self._padded(tokens, rows))
            except RuntimeError as error:
                if self._graphs_wanted:
                    raise
                self._graphs = None
                warnings.warn(str(error), stacklevel=2)
        if self._packed is not None and not skip:
            batch = packed(tokens, rows)
            layout = Layout(batch, self.device)
            pooled = PooledStates(self._pipeline.selector, None, layout.cu_seqlens, self._pipeline.pooling)
            self._packed.run(batch, pooled, layout)
            return pooled.result()
        inputs = self._padded(tokens, rows)
        counted = inputs["attention_mask"]
        if skip:
            later = (rows > 0) & (tokens.text[rows] == tokens.text[rows - 1])  # a text's windows after its first
            counted = counted * (counted.cumsum(1) > skip * torch.from_numpy(~later)[:, None])
        on_device = {name: to_device(tensor, self.device) for name, tensor in inputs.items()}
        return self._pool_padded(on_device, to_device(counted, self.device) if skip else None)

    def _padded(self, tokens: Tokens, rows: np.ndarray) -> dict[str, Tensor]:
        return padded(tokens, rows, self._tokenizer.pad_id, left=self._tokenizer.pad_left)

    def _pool_padded(self, inputs: dict[str, Tensor], counted: Tensor | None = None) -> Tensor:
        """o [B, D] of the tokens that count, by default those of the attention mask; on the device."""
        mask = inputs["attention_mask"] if counted is None else counted
        pooled = PooledStates(self._pipeline.selector, mask, None, self._pipeline.pooling)
        self._pipeline.capture.run(pooled, **inputs)
        return pooled.result()

    @staticmethod
    def _fits_a_graph(tokens: Tokens, rows: np.ndarray) -> bool:
        """Whether these few rows are the whole call: the rest of a large one is no reason for another graph."""
        whole = len(rows) == len(tokens.ids) and tokens.types is None
        return whole and GraphReplay.fits(len(rows), max(map(len, tokens.ids)))


class Result:
    """A batch's output on its way to the host."""

    def __init__(self, output: Tensor) -> None:
        self._event = None
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
        return self._output.float()

"""CUDA graphs of small padded batches: one text then costs the GPU's time and not that of hundreds of launches.

A graph belongs to a shape, so rows are padded to a power of two and tokens to a bucket. Each is captured at its first use, and
all share one pool of memory, since no two run at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batches import pinned

ROWS = (1, 2, 4, 8)
TOKENS = (16, 24, 32, 48, 64, 96, 128, 192, 256)
MOST_GRAPHS = len(ROWS) * len(TOKENS)  # of one Embedder: the sum of their memory is bounded by the table
WARM_UPS = 3  # calls before a capture: libraries choose and allocate at their first ones

Inputs = dict[str, Tensor]  # input_ids and attention_mask, int64 [B, L]
Run = Callable[[Inputs], Tensor]  # to embeddings [B, D]; launches work on the current stream and never waits for it


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    output: Tensor


class GraphReplay:
    """``run`` on small batches as CUDA graphs. The weights must stay where they are, and the device must be the current one.

    Raises:
        RuntimeError: a shape cannot be captured, as where an encoder waits for the GPU to decide what to run.
    """

    def __init__(self, run: Run, device: torch.device) -> None:
        self._run, self._device = run, device
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._pool: Any = None

    @staticmethod
    def fits(rows: int, longest: int) -> bool:
        """Whether a batch is small enough."""
        return 0 < rows <= ROWS[-1] and longest <= TOKENS[-1]

    def __call__(self, inputs: Inputs) -> Tensor:
        """Embeddings [B, D] of a batch on the host. They are overwritten by the next call of the same shape."""
        rows, length = inputs["input_ids"].shape
        shape = (_at_least(rows, ROWS), _at_least(length, TOKENS))
        whole = {name: _grown(tensor, shape) for name, tensor in inputs.items()}
        whole["attention_mask"][rows:, 0] = 1  # a row without any token has no softmax
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._capture(whole)
        for name, tensor in whole.items():
            graph.inputs[name].copy_(pinned(tensor, self._device), non_blocking=True)
        graph.graph.replay()
        return graph.output[:rows]

    def _capture(self, inputs: Inputs) -> _Graph:
        shape = tuple(inputs["input_ids"].shape)
        static = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # With padding: an encoder that sees none may take another attention outside of a capture.
            static["attention_mask"][:, -1] = 0
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._run(static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                output = self._run(static)
        except Exception as error:  # PyTorch's, CUDA's, or the encoder's own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(
                f"a CUDA graph of {shape[0]} x {shape[1]} tokens cannot be captured: {reason}; cuda_graphs=False goes without"
            ) from error
        return _Graph(graph, static, output)


def _at_least(size: int, table: tuple[int, ...]) -> int:
    return next(value for value in table if value >= size)


def _grown(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B, L] in the top left corner of zeros."""
    whole = tensor.new_zeros(shape)
    whole[: tensor.shape[0], : tensor.shape[1]] = tensor
    return whole

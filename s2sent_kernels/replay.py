"""CUDA graphs of small padded batches: one text then costs the GPU's time and not that of hundreds of launches.

A graph belongs to a shape, so rows are padded to a power of two and tokens to a bucket. Each is captured at its first use, and
all share one pool of memory. So no two may run at once: an event orders them where callers use several streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .batches import pinned
from .files import first_line

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


class CannotCapture(RuntimeError):
    """A shape cannot be captured, as where an encoder waits for the GPU to decide what to run."""


class GraphReplay:
    """``run`` on small batches as CUDA graphs. One thread at a time, and the device must be the current one.

    Args:
        modules: whose parameters ``run`` reads. Where one has moved since a capture, all graphs are captured again.
        limit: tokens that the encoder has positions for; None for any number.
        pad_id: a token for padding, which is masked.

    Raises:
        CannotCapture: at a shape's first call. An error of a replay is raised as it is.
    """

    def __init__(
        self,
        run: Run,
        device: torch.device,
        modules: Sequence[nn.Module] = (),
        limit: int | None = None,
        pad_id: int = 0,
    ) -> None:
        self._run, self._device, self._modules = run, device, modules
        self._limit, self._pad_id = limit, pad_id
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._pool: Any = None
        self._done: Any = None  # an event after the last replay, once its output was read
        self._weights: list[tuple[int, torch.dtype]] = []  # that the graphs read

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": {}, "_pool": None, "_done": None, "_weights": []}

    @staticmethod
    def fits(rows: int, longest: int) -> bool:
        """Whether a batch is small enough."""
        return 0 < rows <= ROWS[-1] and longest <= TOKENS[-1]

    def __call__(self, inputs: Inputs) -> Tensor:
        """Embeddings [B, D] of a batch on the host."""
        rows, length = inputs["input_ids"].shape
        bucket = _at_least(length, TOKENS)
        # A position table may have fewer rows than the bucket has tokens, though never fewer than the batch.
        shape = (_at_least(rows, ROWS), bucket if self._limit is None else min(bucket, max(self._limit, length)))
        fill = {"input_ids": self._pad_id}
        whole = {name: _grown(tensor, shape, fill.get(name, 0)) for name, tensor in inputs.items()}
        whole["attention_mask"][rows:, 0] = 1  # a row without any token has no softmax
        self._drop_if_weights_moved()
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._capture(whole)
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
        for name, tensor in whole.items():
            graph.inputs[name].copy_(pinned(tensor, self._device), non_blocking=True)
        graph.graph.replay()
        output = graph.output[:rows].clone()  # the next replay may be on another stream than this output's reader
        if self._device.type == "cuda":
            self._done = self._done or torch.cuda.Event()
            self._done.record()
        return output

    def _drop_if_weights_moved(self) -> None:
        """A graph reads addresses: after the owner's ``.half()`` or ``.to()`` they are of freed memory."""
        parameters = (each for module in self._modules for each in module._parameters.values() if each is not None)
        weights = [(parameter.data_ptr(), parameter.dtype) for parameter in parameters]
        if weights != self._weights:
            if self._graphs and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # a replay may still read the pool
            self._graphs, self._pool, self._weights = {}, None, weights

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
            # What other threads do meanwhile, on streams of their own, spoils no capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                output = self._run(static)
        except Exception as error:  # PyTorch's, CUDA's, or the encoder's own
            raise CannotCapture(
                f"a CUDA graph of {shape[0]} x {shape[1]} tokens cannot be captured: {first_line(error)}; "
                "cuda_graphs=False goes without"
            ) from error
        return _Graph(graph, static, output)


def _at_least(size: int, table: tuple[int, ...]) -> int:
    return next(value for value in table if value >= size)


def _grown(tensor: Tensor, shape: tuple[int, int], fill: int) -> Tensor:
    """[B, L] in the top left corner of ``fill``."""
    whole = tensor.new_full(shape, fill)
    whole[: tensor.shape[0], : tensor.shape[1]] = tensor
    return whole

"""What every engine offers to the ops. An engine is a module; mypy holds each against these protocols.

``Limits`` can be asked without the engine's compiler or library; ``Engine`` computes. Shapes: f [B, D], p and g [B, N, D],
o [B, D], v like a hidden state; dtypes as in ``formula.reference``. Tensors were validated by the op that calls.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..formula.call import (
    KERNEL_DTYPES,
    Batch,
    BatchStatistics,
    Call,
    GateParameters,
    Gating,
    HiddenGradients,
    Layout,
    PartialSums,
    Place,
    Pooling,
    Reading,
)

DTYPE_NAMES = [str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES]
KERNEL_DTYPE_TEXT = f"{', '.join(DTYPE_NAMES[:-1])} and {DTYPE_NAMES[-1]}"  # in messages and limits


class BackendStatus(NamedTuple):
    """Whether a backend can be used here. ``reason``: why not, or on what it runs and what it supports."""

    usable: bool
    reason: str


BackendStatus.__module__ = __name__.partition(".")[0]  # pickles name the public path


class Limits(Protocol):
    """What an engine tells before it is loaded."""

    LIMITS: str  # what it supports, for people

    def status(self) -> BackendStatus:
        """Whether it can be used on this machine at all."""

    def refuses(self, call: Call) -> str | None:
        """Why it cannot compute ``call`` here, or None where it can."""


class Prepared(Protocol):
    """The whole selector for calls with one gate, whose tensors it holds without copies. A function returns nothing where a call
    is one for the engine's functions: those take any tensors, these only what kernels read as it is."""

    def select_pool(
        self,
        hidden_states: Sequence[Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        pooling: Pooling | None,
        keep: bool = False,
    ) -> list[Tensor]:
        """[o], or [o, f, p] with ``keep``."""

    def select(
        self,
        hidden_states: Sequence[Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        keep: bool = False,
    ) -> list[Tensor]:
        """[v], or [v, f, g] with ``keep``."""

    def select_pool_in_training(
        self,
        hidden_states: Sequence[Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        pooling: Pooling | None,
        momentum: float,
    ) -> list[Tensor]:
        """[o, f, p, mean, rstd], the last two of the batch, as ``Engine.select_pool_in_training``."""

    def select_pool_backward(
        self,
        grad_output: Tensor,
        squeezed: Tensor,
        pooled: Tensor,
        statistics: BatchStatistics | None,
        layout: Layout,
        pooling: Pooling | None,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        """The gradients of the hidden states, then those of the gate's tensors in their order; an empty tensor where there is
        none. ``statistics``: those of a call in training."""

    def select_backward(
        self, grad_fused: Tensor, squeezed: Tensor, gates: Tensor, batch: Batch, needed: Sequence[bool]
    ) -> list[Tensor]:
        """As ``select_pool_backward``, for tokens with running statistics."""


class Engine(Protocol):
    def prepare(self, parameters: GateParameters, num_blocks: int, reading: Reading, gating: Gating) -> Prepared | None:
        """For calls with this gate; None where the engine's functions are all there is."""

    def squeeze(self, batch: Batch, reading: Reading) -> tuple[Tensor, Tensor | None]:
        """f and, with a pooling, p, from one read of each hidden state."""

    def squeeze_backward(
        self, grads: HiddenGradients, layout: Layout, needed: Sequence[bool], reading: Reading
    ) -> list[Tensor | None]:
        """The gradient of each needed hidden state, written once; None for the others. At least one is needed."""

    def num_groups(self, num_blocks: int) -> int:
        """G: rows of ``PartialSums.squeezed_groups`` that N blocks are summed into."""

    def squeeze_block(self, batch: Batch, place: Place, sums: PartialSums, reading: Reading) -> None:
        """Adds the single hidden state of ``batch`` to ``sums``, in place. Blocks are added in ascending order."""

    def sum_groups(self, squeezed_groups: Tensor) -> Tensor:
        """f from its partial sums [B, G, D]."""

    def gate(self, squeezed: Tensor, parameters: GateParameters, num_blocks: int, gating: Gating) -> Tensor:
        """g from f, with running statistics and profile "paper"."""

    def gate_backward(
        self, grad_gates: Tensor, squeezed: Tensor, parameters: GateParameters, gating: Gating
    ) -> tuple[Tensor, GateParameters]:
        """df and the gradients of the parameters that are there; the running statistics have none."""

    def gate_pool(
        self, sums: PartialSums, parameters: GateParameters, frequencies: int, gating: Gating, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """o in ``dtype``, the hidden states', and f, from what ``squeeze_block`` left."""

    def gate_pool_backward(
        self, grad_output: Tensor, squeezed: Tensor, pooled: Tensor, parameters: GateParameters, gating: Gating
    ) -> tuple[Tensor, Tensor, GateParameters]:
        """dp, df and the parameters' gradients from do."""

    def gate_in_training(
        self, squeezed: Tensor, pooled: Tensor | None, parameters: GateParameters, gating: Gating, dtype: torch.dtype
    ) -> tuple[Tensor, BatchStatistics]:
        """g, or with p o in ``dtype``, and the statistics of the batch, which the gate used; profile "paper". Updates the running
        statistics, which are there, in place with ``gating.momentum``."""

    def gate_in_training_backward(
        self,
        grad: Tensor,
        squeezed: Tensor,
        pooled: Tensor | None,
        statistics: BatchStatistics,
        parameters: GateParameters,
        gating: Gating,
    ) -> tuple[Tensor | None, Tensor, GateParameters]:
        """dp (None without p), df and the parameters' gradients from dg, or with p from do."""

    def fuse(self, batch: Batch, gates: Tensor) -> Tensor:
        """v: one read of each hidden state."""

    def fuse_backward(self, grad_fused: Tensor, batch: Batch) -> Tensor:
        """dg."""

    def select_pool(
        self, batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(o, f, p): the whole selector, pooled. ``reading`` has a pooling."""

    def select_pool_in_training(
        self, batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating
    ) -> tuple[Tensor, Tensor, Tensor, BatchStatistics]:
        """(o, f, p) of ``select_pool``, with the statistics of the batch as in ``gate_in_training``."""

    def select(
        self, batch: Batch, reading: Reading, parameters: GateParameters, gating: Gating
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(v, f, g): the whole selector, tokens."""


@functools.cache
def say_once(message: str) -> None:
    """Warn of something that changes speed and not results."""
    warnings.warn(message, RuntimeWarning, stacklevel=5)

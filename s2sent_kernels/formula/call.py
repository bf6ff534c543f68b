"""The nouns of a call: which batch, how it is read, how it is gated, and what a backward pass keeps of it.

    Batch, Reading      -> squeeze -> f, p
    GateParameters, Gating -> gate -> g
    Batch, g            -> fuse    -> v

Public functions and ops take these as separate arguments (their signatures and schemas are promised); everything between
them passes the records on. They are NamedTuples: cheap in eager mode, and transparent to torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Pooling = Literal["mean", "cls", "last"]
Profile = Literal["paper", "official"]
# The slope of an activation must be a function of its output: backward passes keep s, not W1 f + b1.
Activation = Literal["tanh", "relu"]

POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
PROFILES: tuple[Profile, ...] = get_args(Profile)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of hidden states, on every engine but the plain one
DTYPES = (torch.float64, *KERNEL_DTYPES)  # on the plain engine


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of f, p and the gates for hidden states of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Layout(NamedTuple):
    """A batch without its hidden states: all that a backward pass keeps of it."""

    shape: Sequence[int]  # of each hidden state: [B, L, D], or packed [T, D]
    dtype: torch.dtype
    device: torch.device
    attention_mask: Tensor | None  # [B, L]
    cu_seqlens: Tensor | None  # int32 [B + 1]

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def hidden_size(self) -> int:
        return self.shape[-1]

    @property
    def num_sentences(self) -> int:
        return self.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class Batch(NamedTuple):
    """N hidden states and which of their tokens are real."""

    hidden_states: Sequence[Tensor]  # N of [B, L, D], lowest block first; or packed [T, D]
    attention_mask: Tensor | None = None  # [B, L], nonzero at real tokens
    cu_seqlens: Tensor | None = None  # int32 [B + 1], the packed sentences' first tokens and T

    @property
    def num_blocks(self) -> int:
        return len(self.hidden_states)

    @property
    def shape(self) -> torch.Size:
        return self.hidden_states[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden_states[0].dtype

    @property
    def device(self) -> torch.device:
        return self.hidden_states[0].device

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def hidden_size(self) -> int:
        size = self.hidden_states[0].shape[-1]
        return int(size) if torch.jit.is_tracing() else size  # where it is a tensor; a graph has one D

    @property
    def num_sentences(self) -> int:
        return self.hidden_states[0].shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def layout(self) -> Layout:
        first = self.hidden_states[0]
        return Layout(first.shape, first.dtype, first.device, self.attention_mask, self.cu_seqlens)


class Reading(NamedTuple):
    """How squeeze reads a batch."""

    frequencies: int  # M, DCT components
    profile: Profile = "paper"
    pooling: Pooling | None = None  # None: f alone, no p


class Gating(NamedTuple):
    """How the gate turns f into g, beside its tensors."""

    activation: Activation = "tanh"
    eps: float = 1e-6  # the batch norm's
    profile: Profile = "paper"  # "official" sums the s-norm over batch and features too
    training: bool = False  # batch statistics, and the running ones updated in place
    momentum: float = 0.1


class GateParameters(NamedTuple):
    """The tensors of the gate, of any floating dtype; N blocks, D features, H bottleneck width.

    ``norm_weight`` to ``running_var`` are all present (batch norm) or all None (no norm).
    """

    down_weight: Tensor  # W1 [H, D]
    down_bias: Tensor  # b1 [H]
    up_weight: Tensor  # W2 [N * D, H], n major
    up_bias: Tensor  # b2 [N * D]
    norm_weight: Tensor | None = None  # [N * D]
    norm_bias: Tensor | None = None  # [N * D]
    running_mean: Tensor | None = None  # [N * D]
    running_var: Tensor | None = None  # [N * D]
    block_prior: Tensor | None = None  # c [N]
    gate_scale: Tensor | None = None  # tau, a scalar

    @staticmethod
    def shapes(num_blocks: int, hidden_size: int, bottleneck: int) -> dict[str, list[int]]:
        """The shape of each tensor, by its name."""
        both = num_blocks * hidden_size
        return {
            "down_weight": [bottleneck, hidden_size],
            "down_bias": [bottleneck],
            "up_weight": [both, bottleneck],
            "up_bias": [both],
            "norm_weight": [both],
            "norm_bias": [both],
            "running_mean": [both],
            "running_var": [both],
            "block_prior": [num_blocks],
            "gate_scale": [],
        }

    @classmethod
    def required(cls) -> tuple[str, ...]:
        """The names of the tensors that every gate has."""
        return tuple(name for name in cls._fields if name not in cls._field_defaults)

    def each(self, function: Callable[[Tensor], Tensor]) -> GateParameters:
        """``function`` of every tensor that is there."""
        return GateParameters(*(None if t is None else function(t) for t in self))  # type: ignore[arg-type]

    @property
    def bottleneck(self) -> int:
        """H."""
        return self.down_weight.shape[0]


GateParameters.__module__ = __name__.partition(".")[0]  # pickles name the public path


class BatchStatistics(NamedTuple):
    """Of every column of z over the sentences of a batch, kept for the backward pass; float32, float64 for float64 inputs."""

    mean: Tensor  # [N * D]
    rstd: Tensor  # [N * D], 1 / sqrt(var + eps) with the biased variance


class PartialSums(NamedTuple):
    """What ``squeeze_block`` accumulates into, one Transformer block after another."""

    squeezed_groups: Tensor  # [B, G, D]: f before its groups of blocks are summed; G is the engine's
    pooled: Tensor | None  # p [B, N, D]


class Place(NamedTuple):
    """Which Transformer block a hidden state is."""

    block: int  # 0 is the lowest
    num_blocks: int  # N


class HiddenGradients(NamedTuple):
    """What the readers of the hidden states pass back: du_n = g_n dv + w dp_n + alpha_n beta df."""

    squeezed: Tensor | None = None  # df [B, D]
    pooled: Tensor | None = None  # dp [B, N, D]
    fused: Tensor | None = None  # dv, shaped like a hidden state
    gates: Tensor | None = None  # g [B, N, D], present with dv


class Call(NamedTuple):
    """What an engine has to compute, as far as its limits and the choice between engines depend on it.

    Neither B nor L is here: a sentence must not change engines, and so bits, with the batch around it.
    """

    device: torch.device
    dtype: torch.dtype
    num_blocks: int | None = None  # N, None where the caller has not determined it

    @classmethod
    def of(cls, batch: Batch) -> Call:
        """Of a batch that need not be validated yet."""
        first = batch.hidden_states[0]
        return cls(first.device, first.dtype, len(batch.hidden_states))

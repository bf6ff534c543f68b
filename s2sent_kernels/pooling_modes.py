"""The poolings of sentence-transformers, one or several side by side, of one squeeze and one gate.

A pooling that is a weighted sum over the tokens commutes with the gated sum over the blocks, so the blocks are pooled and v is
never formed:

    o[b,d] = sum_l w[b,l] sum_n g[b,n,d] u_n[b,l,d] = sum_n g[b,n,d] sum_l w[b,l] u_n[b,l,d]

    mean                  w = 1 / l, l the sentence's tokens that count
    mean_sqrt_len_tokens  w = 1 / sqrt(l)
    weightedmean          w = the token's place from 1, over the sum of those that count
    cls; last, lasttoken  w = 1 at the first, at the last token

The mean, or another of ``formula.call.POOLINGS``, squeeze computes in its own read. The first and the last token are picked, and
the weighted mean reads the block again while it is there. ``max`` does not commute: it is that of the fused tokens v, for which
the hidden states of all blocks are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from . import functional
from .blockwise import BlockwisePool
from .consumers import PooledStates
from .formula import reference
from .formula.call import Batch, Pooling, compute_dtype
from .formula.tokens import Tokens
from .selector import S2SentSelector

_SAME: dict[str, str] = {"lasttoken": "last"}  # of which sentence-transformers has another name
MODES = (*get_args(Pooling), *_SAME, "mean_sqrt_len_tokens", "weightedmean", "max")
_OF_MEAN = ("mean", "mean_sqrt_len_tokens")


def parse(pooling: Any) -> tuple[str, ...]:
    """The modes of ``pooling``, one name or several.

    Raises:
        TypeError, ValueError: it is something else, or a name is unknown.
    """
    names = (pooling,) if isinstance(pooling, str) else pooling
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"pooling: expected a name or a sequence of names, got {pooling!r}")
    for name in names:
        if name not in MODES:
            raise ValueError(f"pooling: expected one of {MODES}, got {name!r}")
    if not names:
        raise ValueError(f"pooling: expected at least one of {MODES}, got none")
    return tuple(_SAME.get(name, name) for name in names)


def by_the_library(pooling: Any) -> str | tuple[str, ...]:
    """``pooling`` as the library's ``pooling_mode`` has it, whose last token is "lasttoken"."""
    theirs = {ours: name for name, ours in _SAME.items()}
    names = tuple(theirs.get(mode, mode) for mode in parse(pooling))
    return names[0] if len(names) == 1 else names


def of_squeeze(modes: Sequence[str]) -> Pooling:
    """The pooling that squeeze computes beside f: the mean, where one is wanted."""
    if any(mode in _OF_MEAN for mode in modes):
        return "mean"
    return "last" if "last" in modes and "cls" not in modes else "cls"


def single(modes: Sequence[str]) -> Pooling | None:
    """The pooling that is all of ``modes``, where the selector has it as one op."""
    return of_squeeze(modes) if len(modes) == 1 and modes[0] in get_args(Pooling) else None


class _Counted:
    """The tokens of a call that count, for the poolings that squeeze does not compute."""

    def __init__(self, like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, places: Tensor | None) -> None:
        self.tokens = Tokens.of(Batch([like], mask, cu_seqlens))
        self._packed, self._places, self._dtype = cu_seqlens, places, compute_dtype(like.dtype)

    def lengths(self) -> Tensor:
        """l [B, 1]."""
        if self._packed is not None:
            return self._packed.diff()[:, None]
        return self.tokens.length

    def pooled(self, mode: str, hidden_state: Tensor) -> Tensor:
        """p [B, D] of one block by ``mode``."""
        if mode == "weightedmean":
            return self._weighted_mean(hidden_state)
        values, last = hidden_state.to(self._dtype), mode == "last"
        if hidden_state.shape[-2] == 0:
            return values.new_zeros(self.tokens.num_sentences, hidden_state.shape[-1])
        if self._packed is not None:
            place = self._packed[1:] - 1 if last else self._packed[:-1]
            picked = hidden_state[place.clamp(0, hidden_state.shape[0] - 1).long()]
        else:
            real = self.tokens.real.int()
            place = real.shape[1] - 1 - real.flip(1).argmax(dim=1) if last else real.argmax(dim=1)
            # A gather, since a graph that is traced would hold the number of sentences as a constant.
            picked = hidden_state.gather(1, place[:, None, None].expand(-1, 1, hidden_state.shape[2]))[:, 0]
        return torch.where(self.lengths() > 0, picked.to(self._dtype), 0)

    def _weighted_mean(self, hidden_state: Tensor) -> Tensor:
        places = self._places
        if places is None:  # without a mask
            places = torch.arange(1, hidden_state.shape[1] + 1, device=hidden_state.device)[None]
        weights = torch.where(self.tokens.real, places, 0)[..., None].to(self._dtype)
        total = self.tokens.sum(weights).clamp(min=1e-9)
        return self.tokens.sum(self.tokens.keep_real(hidden_state.to(self._dtype)) * weights) / total

    def maximum(self, fused: Tensor) -> Tensor:
        """[B, D] of v; -inf for a sentence without tokens, as in sentence-transformers."""
        if self.tokens.sentence is None:
            return fused.masked_fill(~self.tokens.real[..., None], -torch.inf).max(dim=1).values
        lowest = fused.new_full((self.tokens.num_sentences, fused.shape[-1]), -torch.inf)
        return lowest.scatter_reduce(0, self.tokens.sentence[:, None].expand_as(fused), fused, "amax")


class ModePool:
    """Sentence embeddings [B, K * D] of a call, by K modes side by side.

    Args:
        modes: as ``parse`` returns them.
        attention_mask, cu_seqlens: as in ``selector.pool``.
        places: of each token in its sentence, from 1: [B, L], or packed [T]. By default that in the batch.
    """

    def __init__(
        self,
        selector: S2SentSelector,
        modes: Sequence[str],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None = None,
        places: Tensor | None = None,
    ) -> None:
        self.selector, self.modes = selector, modes
        self.mask, self.cu_seqlens, self._places = attention_mask, cu_seqlens, places
        self.of_squeeze = of_squeeze(modes)
        own = (self.of_squeeze, *_OF_MEAN) if self.of_squeeze == "mean" else (self.of_squeeze,)
        self.others = [mode for mode in dict.fromkeys(modes) if mode not in own and mode != "max"]

    def counted(self, like: Tensor) -> _Counted:
        return _Counted(like, self.mask, self.cu_seqlens, self._places)

    def of(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Of all blocks' hidden states at once."""
        gates, pooled = self.selector.gates_and_pooled(
            hidden_states, self.mask, cu_seqlens=self.cu_seqlens, pooling=self.of_squeeze
        )
        counted = self.counted(hidden_states[0])
        others = {
            mode: torch.stack([counted.pooled(mode, state) for state in hidden_states], dim=1) for mode in self.others
        }
        maximum = None
        if "max" in self.modes:
            fused = functional.fuse(
                hidden_states, gates, self.mask, cu_seqlens=self.cu_seqlens, backend=self.selector.backend
            )
            maximum = counted.maximum(fused)
        return self.joined(gates, pooled, others, counted, hidden_states[0].dtype, maximum)

    def joined(
        self,
        gates: Tensor,
        pooled: Tensor,
        others: dict[str, Tensor],
        counted: _Counted,
        dtype: torch.dtype,
        maximum: Tensor | None = None,
    ) -> Tensor:
        """From g, p [B, N, D] of squeeze, and p of the others."""
        found = []
        for mode in self.modes:
            if mode == "max":
                assert maximum is not None
                found.append(maximum)
            elif mode == "mean_sqrt_len_tokens":
                root = counted.lengths().to(pooled.dtype).sqrt()  # [B, 1]
                found.append(reference.pool(gates, pooled * root[..., None], dtype))
            else:
                found.append(reference.pool(gates, others.get(mode, pooled), dtype))
        return torch.cat(found, dim=-1)


class PooledByModes(PooledStates):
    """``ModePool`` of a call's hidden states, without gradients: kept where they are small, else each pooled as it arrives. Not
    for ``max``."""

    def __init__(self, pool: ModePool) -> None:
        super().__init__(pool.selector, pool.mask, pool.cu_seqlens, pool.of_squeeze)
        self._pool = pool
        self._counted: _Counted | None = None
        self._dtype = torch.float32
        self._others: dict[str, list[Tensor]] = {mode: [] for mode in pool.others}

    def _add_to(self, stream: BlockwisePool, block: int, hidden_state: Tensor) -> None:
        stream.add(block, hidden_state)
        if self._counted is None:
            self._counted, self._dtype = self._pool.counted(hidden_state), hidden_state.dtype
        with torch.no_grad():
            for mode, found in self._others.items():
                found.append(self._counted.pooled(mode, hidden_state))

    @torch.no_grad()
    def _result_of(self, stream: BlockwisePool) -> Tensor:
        squeezed, pooled = stream.squeezed_and_pooled()
        assert self._counted is not None
        others = {mode: torch.stack(found, dim=1) for mode, found in self._others.items()}
        return self._pool.joined(self._selector.gate(squeezed), pooled, others, self._counted, self._dtype)

    def _of_kept(self, hidden_states: list[Tensor]) -> Tensor:
        return self._pool.of(hidden_states)

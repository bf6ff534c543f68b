"""The features that sentence-transformers hands from module to module: which of a batch's tokens count, and a call's pooling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .consumers import PooledStates

if TYPE_CHECKING:
    from .sentence_transformers import S2SentPooling


class Counted(NamedTuple):
    """Which tokens of a batch count, in the form that a selector takes."""

    attention_mask: Tensor | None
    cu_seqlens: Tensor | None = None
    kept: Tensor | None = None  # [T] bool, of packed tokens, where prompts are left out

    @classmethod
    def of(cls, features: Mapping[str, Any], include_prompt: bool) -> Counted:
        mask, skip = features.get("attention_mask"), 0
        if mask is not None and "cu_seq_lens_q" not in features and mask.dim() != 2:
            raise ValueError(
                f"features: expected an attention_mask [B, L] to pool by, got shape {list(mask.shape)}: BlockCapture.pool and "
                "S2SentModel take a pooling_mask beside one of another form"
            )
        if not include_prompt and "prompt_length" in features:
            length = features["prompt_length"]
            skip = int(length[0].item()) if isinstance(length, Tensor) else int(length)
        if "cu_seq_lens_q" in features:
            return cls._packed(features["cu_seq_lens_q"].to(torch.int32), skip)
        return cls(mask * (mask.cumsum(1) > skip) if skip and mask is not None else mask)

    @classmethod
    def _packed(cls, cu_seqlens: Tensor, skip: int) -> Counted:
        if not skip:
            return cls(None, cu_seqlens)
        lengths = cu_seqlens.diff()
        place = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
        kept = place - cu_seqlens[:-1].repeat_interleave(lengths) >= skip
        ends = (lengths - skip).clamp(min=0).cumsum(0)
        return cls(None, torch.cat([ends.new_zeros(1), ends]).to(torch.int32), kept)

    def select(self, state: Tensor) -> Tensor:
        """[B, L, D] as it is, or of packed [1, T, D] the tokens that count."""
        if self.cu_seqlens is None:
            return state
        state = state.reshape(-1, state.shape[-1])
        return state if self.kept is None else state[self.kept]


class Stream:
    """Pools the hidden states of a call."""

    def __init__(self, module: S2SentPooling, features: Mapping[str, Any]) -> None:
        self.counted = _counted(features)
        self.tokens = Counted.of(features, module.include_prompt)
        self.selector = module.selector
        self.pool = PooledStates(module.selector, self.tokens.attention_mask, self.tokens.cu_seqlens, module.pooling)

    def add(self, block: int, hidden_state: Tensor) -> None:
        self.pool.add(block, self.tokens.select(hidden_state))

    def result(self, features: Mapping[str, Any]) -> Tensor:
        for name, value in _counted(features).items():
            if value is not self.counted[name]:
                raise ValueError(f"features: expected the {name} that the transformer was called with, got another")
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.selector.parameters()):
            raise RuntimeError(
                "the transformer ran without gradients, and with it the selector: expected one grad mode for both"
            )
        return self.pool.result()


def _counted(features: Mapping[str, Any]) -> dict[str, Any]:
    """The features that decide which tokens count."""
    return {name: features.get(name) for name in ("attention_mask", "prompt_length", "cu_seq_lens_q")}

"""The features that sentence-transformers hands from module to module: which of a batch's tokens count, and a call's pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import input_tokens, pooling_modes
from .consumers import KeptStates, PooledStates, Told
from .pooling_modes import ModePool, PooledByModes
from .selector import S2SentSelector

if TYPE_CHECKING:
    from .sentence_transformers import S2SentPooling


class Counted(NamedTuple):
    """Which tokens of a batch count, in the form that a selector takes."""

    attention_mask: Tensor | None
    cu_seqlens: Tensor | None = None
    kept: Tensor | None = None  # [T] bool, of packed tokens, where prompts are left out
    # [B, L], or [T] of packed tokens that count: each one's place in its text, from 1, prompt included.
    places: Tensor | None = None

    @classmethod
    def of(cls, features: Mapping[str, Any], include_prompt: bool, with_places: bool = False) -> Counted:
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
            return cls._packed(features["cu_seq_lens_q"].to(torch.int32), skip, with_places)
        if mask is None:
            return cls(None)
        counted = mask * (mask.cumsum(1) > skip) if skip else mask
        input_tokens.warn_of_padding(counted)
        if not with_places or not mask.shape[1]:
            return cls(counted)
        index = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return cls(counted, places=index - (mask != 0).int().argmax(dim=1, keepdim=True))

    @classmethod
    def _packed(cls, cu_seqlens: Tensor, skip: int, with_places: bool) -> Counted:
        if not skip and not with_places:
            return cls(None, cu_seqlens)
        lengths = cu_seqlens.diff()
        index = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
        places = index - cu_seqlens[:-1].repeat_interleave(lengths) + 1
        if not skip:
            return cls(None, cu_seqlens, places=places)
        kept = places > skip
        ends = (lengths - skip).clamp(min=0).cumsum(0)
        return cls(None, torch.cat([ends.new_zeros(1), ends]).to(torch.int32), kept, places[kept])

    def select(self, state: Tensor) -> Tensor:
        """[B, L, D] as it is, or of packed [1, T, D] the tokens that count."""
        if self.cu_seqlens is None:
            return state
        state = state.reshape(-1, state.shape[-1])
        return state if self.kept is None else state[self.kept]


def pool(
    selector: S2SentSelector, pooling: Any, features: Mapping[str, Any], include_prompt: bool, states: Sequence[Tensor]
) -> Tensor:
    """Sentence embeddings of a call's hidden states, which were kept."""
    modes = pooling_modes.parse(pooling)
    tokens = Counted.of(features, include_prompt, "weightedmean" in modes)
    states, single = [tokens.select(state) for state in states], pooling_modes.single(modes)
    if single is not None:
        return selector.pool(states, tokens.attention_mask, cu_seqlens=tokens.cu_seqlens, pooling=single)
    return _mode_pool(selector, modes, tokens).of(states)


def streams(pooling: Any) -> bool:
    """Whether hidden states can be pooled one by one."""
    return "max" not in pooling_modes.parse(pooling)


def _pool(selector: S2SentSelector, modes: Sequence[str], tokens: Counted) -> PooledStates:
    single = pooling_modes.single(modes)
    if single is not None:
        return PooledStates(selector, tokens.attention_mask, tokens.cu_seqlens, single)
    return PooledByModes(_mode_pool(selector, modes, tokens))


def _mode_pool(selector: S2SentSelector, modes: Sequence[str], tokens: Counted) -> ModePool:
    return ModePool(selector, modes, tokens.attention_mask, tokens.cu_seqlens, tokens.places)


class OfCall(Told):
    """What a call of a transformer was given and returned: pooled are the hidden states of that call, so that features of another
    one, or tokens that a module has changed since, are an error."""

    def __init__(self, features: Mapping[str, Any]) -> None:
        self.counted = _counted(features)
        self.returned: Any = None

    def ended(self, output: Any) -> None:
        """The listener tells what the transformer returned."""
        self.returned = output.get("token_embeddings") if isinstance(output, Mapping) else None

    def check(self, features: Mapping[str, Any]) -> None:
        for name, value in _counted(features).items():
            if value is not self.counted[name]:
                raise ValueError(f"features: expected the {name} that the transformer was called with, got another")
        given = features.get("token_embeddings")
        if given is not None and self.returned is not None and given is not self.returned:
            raise ValueError(
                "features: expected the token_embeddings that the transformer's last call returned, got others: the hidden "
                "states of its blocks are pooled, those of the last call, which no module in between reaches"
            )


class Kept(OfCall, KeptStates):
    """Keeps the hidden states of a call."""

    def __init__(self, features: Mapping[str, Any]) -> None:
        OfCall.__init__(self, features)
        KeptStates.__init__(self)


class Stream(OfCall):
    """Pools the hidden states of a call."""

    def __init__(self, module: S2SentPooling, features: Mapping[str, Any]) -> None:
        super().__init__(features)
        modes = pooling_modes.parse(module.pooling)
        self.tokens = Counted.of(features, module.include_prompt, "weightedmean" in modes)
        self.selector = module.selector
        self.pool = _pool(module.selector, modes, self.tokens)

    def add(self, block: int, hidden_state: Tensor) -> None:
        self.pool.add(block, self.tokens.select(hidden_state))

    def result(self, features: Mapping[str, Any]) -> Tensor:
        self.check(features)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.selector.parameters()):
            raise RuntimeError(
                "the transformer ran without gradients, and with it the selector: expected one grad mode for both"
            )
        return self.pool.result()


def _counted(features: Mapping[str, Any]) -> dict[str, Any]:
    """The features that decide which tokens count."""
    return {name: features.get(name) for name in ("attention_mask", "prompt_length", "cu_seq_lens_q")}

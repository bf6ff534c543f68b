"""A captured encoder on batches of tokens: packed where it can be, else padded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import families
from .batches import TextTokenizer, Tokens, packed, padded, to_device
from .capture import BlockCapture
from .consumers import Consumer, KeptStates
from .packed import CannotPack, Layout, PackedEncoder, run_lock

C = TypeVar("C", bound=Consumer)


class BlockStates(NamedTuple):
    """Hidden states of a batch, padded on the right."""

    hidden_states: list[Tensor]  # [B, L, D] of each captured block, on the encoder's device; 0 at padding if run packed
    attention_mask: Tensor  # int64 [B, L]


class EncoderRunner:
    """Runs batches, one at a time; several threads may call it, and several runners may share an encoder.

    Args:
        capture: of the encoder, which is on its device and in eval mode.
        tokenizer: says how rows are padded.
        pack: None: if the encoder can be run packed; True: or raise; False: pad.

    Attributes:
        lock: held while the encoder runs.
        padded_because: why batches are not packed, or None.

    Raises:
        ValueError: ``pack=True`` and the encoder cannot be run packed, or its tokenizer gives token types.
    """

    def __init__(self, capture: BlockCapture, tokenizer: TextTokenizer, pack: bool | None = None) -> None:
        self._capture, self._tokenizer = capture, tokenizer
        self.lock = run_lock(capture.encoder)
        self.device = next(capture.encoder.parameters()).device
        self._packed_wanted = bool(pack)
        self._packed, self.padded_because = self._find_packed(pack)
        self._options = families.without_cache(capture.encoder)

    def _find_packed(self, pack: bool | None) -> tuple[PackedEncoder | None, str | None]:
        """The encoder to run packed batches with, or why there is none."""
        if pack is False:
            return None, "packed=False"
        try:
            if self._tokenizer.typed:
                raise CannotPack("its tokenizer gives token types other than 0")
            return PackedEncoder.tried(self._capture, self.device), None
        except CannotPack as error:
            if pack:
                name = type(self._capture.encoder).__name__
                raise ValueError(f"packed: {name} cannot be run packed: {error}") from error
            return None, str(error)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = run_lock(self._capture.encoder)

    def packs(self, tokens: Tokens) -> bool:
        """Whether batches of these tokens are packed. Raises a ValueError where they must be and cannot."""
        if self._packed_wanted and tokens.types is not None:
            raise ValueError("packed: expected texts whose token types are all 0, got others")
        return self._packed is not None and tokens.types is None

    def run_packed(self, consumer: Callable[[Tensor], C], tokens: Tokens, rows: Iterable[int]) -> C:
        """The consumer of the hidden states [T, D] of a batch that ``packs``, made from the sentences' cu_seqlens [B + 1]."""
        assert self._packed is not None
        batch = packed(tokens, rows)
        layout = Layout(batch, self.device)
        made = consumer(layout.cu_seqlens)
        self._packed.run(batch, made, layout)
        return made

    def run_padded(self, consumer: C, inputs: dict[str, Tensor]) -> C:
        """The consumer, once it has the hidden states [B, L, D] of a batch on the device."""
        self._capture.run(consumer, **inputs, **self._options)
        return consumer

    def padded(self, tokens: Tokens, rows: Iterable[int]) -> dict[str, Tensor]:
        """A batch on the host. On the right, whatever the tokenizer's side: absolute positions of a text must not depend on its
        neighbours."""
        return padded(tokens, rows, self._tokenizer.pad_id)

    @torch.no_grad()
    def states(self, tokens: Tokens, rows: Iterable[int]) -> BlockStates:
        """Hidden states of all captured blocks in the order of ``rows``, for whoever reads them in several ways."""
        import numpy as np

        chosen = np.fromiter(rows, np.int64)
        inputs = self.padded(tokens, chosen)
        with self.lock:
            mask = to_device(inputs["attention_mask"], self.device)
            if not self.packs(tokens):
                on_device = {name: to_device(tensor, self.device) for name, tensor in inputs.items()}
                return BlockStates(self.run_padded(KeptStates(), on_device).hidden_states, mask)
            lengths = tokens.lengths[chosen]
            order = np.argsort(-lengths, kind="stable")  # neighbours of one length share a call of the attention
            kept = self.run_packed(lambda cu_seqlens: KeptStates(), tokens, chosen[order])
            ends = lengths[order].cumsum()
            # Of each token: its place among B L, from its sentence's row and its own place in the sentence.
            place = np.repeat(order * mask.shape[1] - (ends - lengths[order]), lengths[order]) + np.arange(ends[-1])
            where = to_device(torch.from_numpy(place), self.device)
            return BlockStates([_unpacked(u, where, mask) for u in kept.hidden_states], mask)


def _unpacked(hidden_state: Tensor, where: Tensor, mask: Tensor) -> Tensor:
    """[T, D] of all sentences to [B, L, D], each token to its place among B L."""
    result = hidden_state.new_zeros(mask.numel(), hidden_state.shape[-1])
    result[where] = hidden_state
    return result.unflatten(0, mask.shape)

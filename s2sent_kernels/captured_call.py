"""One run of a captured encoder: which of its blocks are handed over, and in which form."""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import families, probe
from .consumers import Consumer, KeptStates

if TYPE_CHECKING:
    from .capture import BlockCapture


class CapturedCall:
    """One run of an encoder: the consumer of its hidden states, and the next block to deliver. Keeps none itself."""

    def __init__(
        self, capture: BlockCapture, consumer: Consumer, length: int | None, called: nn.Module | None = None
    ) -> None:
        if not capture._settled:
            capture.settle()
        self.capture = capture
        self.length = length  # L of the input, None where the call does not tell
        self.called = called  # by other code, and followed by a listener
        self.beside = False  # the call below is the same run, followed by another listener
        self.frame: FrameType | None = None  # that runs the followed module
        self.key, self.modules, self.blocks = capture._key, capture._hooked, capture.blocks
        self.runs, self.ran = capture._runs, [0] * len(capture._runs)
        self.norm, self.block_norm = capture._norm, capture.block_norm
        self.consumer = consumer
        self.with_gradients = torch.is_grad_enabled()
        # With gradients kept states are normed at the end. A block under a checkpoint runs again in the backward, hooks and all,
        # where nothing is delivered: what a norm in the hook had saved would be missing.
        self.normed_last = consumer if self.with_gradients and isinstance(consumer, KeptStates) else None
        self.next = 0

    def take(self, slot: int, module: nn.Module, output: Any) -> None:
        # A deep copy of the encoder shares the key; its hooks are ignored during a call of this one.
        if module is not self.modules[slot] or self.ran[slot] == len(self.runs[slot]):
            return
        n = self.runs[slot][self.ran[slot]]
        self.ran[slot] += 1
        if n < self.next:
            return
        if n > self.next:
            raise self.missing()
        checkpointed = module.training and getattr(module, "gradient_checkpointing", False)
        if checkpointed and self.with_gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                f"block {self.blocks[n]} runs under a reentrant checkpoint, where its hidden state has no gradient: "
                "checkpoint with use_reentrant=False"
            )
        hidden_state = families.hidden_state(output)
        if hidden_state is None:
            raise TypeError(
                f"block {self.blocks[n]}: expected a tensor or a tuple led by one, got {type(output).__name__}"
            )
        hidden_state = self.of_input(hidden_state)
        self.next += 1
        self.consumer.add(n, hidden_state if self.normed_last else self.normalised(hidden_state))

    def finish(self) -> None:
        """After the last block."""
        if self.normed_last:
            self.normed_last.hidden_states = [self.normalised(u) for u in self.normed_last.hidden_states]

    def of_input(self, hidden_state: Tensor) -> Tensor:
        """A hidden state without the tokens that the encoder has added to the input."""
        capture, length = self.capture, self.length
        if length is None or capture._adds_none or hidden_state.dim() != 3 or hidden_state.shape[1] <= length:
            return hidden_state
        if capture._front is None:  # BigBird pads long inputs alone
            if not probe.ready(capture.encoder):
                raise RuntimeError(
                    f"the encoder makes hidden states of {hidden_state.shape[1]} tokens of an input of {length}: expected one "
                    "run of such an input before it is traced or compiled"
                )
            capture._front = probe.front(capture.encoder, length, hidden_state.shape[1])
            capture._adds_none = capture._front is None
        return probe.of_input(hidden_state, capture._front, length)

    def normalised(self, hidden_state: Tensor) -> Tensor:
        if self.norm is not None:
            return self.norm(hidden_state)
        if self.block_norm == "layernorm":
            return F.layer_norm(hidden_state, hidden_state.shape[-1:])
        return hidden_state

    def missing(self) -> RuntimeError:
        block = self.blocks[self.next]
        return RuntimeError(
            f"block {block} never ran in this forward: skipped (LayerDrop), or removed or replaced once hooked"
        )


def drop_interrupted(calls: list[CapturedCall]) -> None:
    """Forget followed calls that have ended without ``_end``: torch runs that hook after an Exception, but not after a
    KeyboardInterrupt, SystemExit, CancelledError or GeneratorExit."""
    frame: FrameType | None = sys._getframe()
    running = set()
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    calls[:] = [call for call in calls if call.frame is None or call.frame in running]

"""BlockCapture: the hidden states of chosen blocks of a transformers encoder, kept or consumed as each block finishes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import families, input_tokens, probe, validate
from .captured_call import CapturedCall, drop_interrupted
from .consumers import Consumer, KeptStates, PooledStates, Told
from .formula.call import POOLINGS
from .selector import S2SentSelector

BLOCK_NORMS = ("final", "layernorm", None)

_settling = threading.Lock()  # threads that share a capture may run it first at once


class BlockCapture:
    """Forward hooks on chosen blocks of an encoder; ``output_hidden_states`` is not needed.

        capture = BlockCapture(encoder, blocks=(-3, -2, -1))
        embeddings = capture.pool(selector, input_ids=ids, attention_mask=mask)     # [B, D]

    Args:
        encoder: a transformers model, or a module with such a ``config``, whose blocks are an nn.ModuleList of the
            length that the configuration gives (docs/encoders.md lists what was tried). Where blocks are shared
            (ALBERT), block i is the i-th run.
        blocks: which blocks, 0 the lowest, negative from the last, or "last:N"; None selects all. Hidden states are
            ordered lowest first in any case.
        block_norm: "final" applies the encoder's final norm to each chosen block where the family has one (pre-norm
            families), so that the last block is what the encoder returns and inner ones have its scale; elsewhere it does
            nothing. Which norm that is, one run on a few tokens proves. "layernorm" applies a layer norm without
            parameters to each chosen block of any family. None keeps what the blocks return: block i's output is
            ``hidden_states[i + 1]`` of ``output_hidden_states=True``, but the last one's before the final norm.

    A call's state lives on its own thread until the call ends or fails. So nested calls, and threads that share a
    model, do not mix, and outside of a call (in the encoder's own forward, in a checkpoint's recomputation) the hooks
    do nothing. Where a block that is not shared runs more than once within a call, its first output counts.

    The hooks stay when the capture is forgotten: ``remove`` them, or use the capture as a context manager. Encoder and
    capture can be copied and pickled: a copied or loaded capture belongs to the encoder copied or loaded with it, and
    the hooks of an encoder that is loaded without its capture do nothing.

    torch.compile: the hooks are traced, also with ``fullgraph=True``. Compile ``capture.pool`` or ``capture.collect``
    whole; or capture ``torch.compile(encoder)``, or the encoder before or after ``encoder.compile()``, but before it first
    runs compiled: the capture calls what it was given, and the encoder's own forward, ``collect`` and ``pool`` are compiled
    once each. Where single blocks are compiled results are right, but every block counts against the recompilation limit:
    beyond it the hooks run uncompiled, and ``fullgraph=True`` fails.

    Hidden states are those of the input's tokens. Padding that the encoder adds (Longformer, BigBird, LED) and tokens that it
    puts in front (prompt tuning, CPM-Ant) are left out; which these are, a run on token ids proves.

    An encoder without weights (on the device "meta") is run when the capture first runs. One that does not run on token ids alone
    is trusted by names: its first list of blocks, and a norm beside it that is called like one.

    Raises:
        ValueError, TypeError: an argument is wrong, or the encoder's blocks cannot be found. With "final" also where what the
            encoder returns is no norm of its last block's hidden state; at the first run, if it had no weights before.
    """

    _settled = True  # also of captures that were pickled when the norm was found by its name
    _front: int | None = None  # tokens that the encoder puts in front, None where it was not seen to add any
    _adds_none = False  # it was asked where hidden states were longer than an input, and did not add them of itself

    def __init__(
        self, encoder: nn.Module, blocks: Sequence[int] | str | None = None, *, block_norm: str | None = "final"
    ) -> None:
        found = families.find_blocks(encoder)
        validate.option("block_norm", block_norm, BLOCK_NORMS)
        self.encoder = encoder
        self.blocks = families.indices(blocks, len(found))
        self.block_norm = block_norm
        # Copies of encoder and capture share the key, which is how a copied hook still finds its copied capture.
        self._key = uuid4().hex
        self._removed = False  # a flag that torch.compile can trace, unlike the handles
        self._handles: list[RemovableHandle] = []
        self._settled = probe.ready(encoder)
        if self._settled:
            self._hook(*_asked(encoder, block_norm))
        else:
            self._hook(found, _named_norm(encoder, block_norm))

    def _hook(self, found: list[nn.Module], norm: nn.Module | None, front: int | None = None) -> None:
        """Follow the chosen of these blocks, in the place of those before."""
        for handle in self._handles:
            handle.remove()
        self._norm, self._front = norm, front
        self._modules = [found[index] for index in self.blocks]
        # Which n each run of a module delivers, -1 for none: one run a module, several where it is shared.
        self._hooked = list(dict.fromkeys(self._modules))
        number = {index: n for n, index in enumerate(self.blocks)}
        self._runs = [
            tuple(number.get(index, -1) for index, module in enumerate(found) if module is hooked)
            for hooked in self._hooked
        ]
        self._handles = [
            module.register_forward_hook(partial(_deliver, self._key, slot)) for slot, module in enumerate(self._hooked)
        ]

    def settle(self) -> None:
        """Ask the encoder for its blocks and its final norm, if it had no weights when the capture was made. Its calls do so
        themselves, but not while torch.compile traces them.

        Raises:
            ValueError: as BlockCapture.
        """
        if self._settled or not probe.ready(self.encoder):
            return
        with _settling:
            if not self._settled:
                self._hook(*_asked(self.encoder, self.block_norm))
                self._settled = True

    def __repr__(self) -> str:
        return f"BlockCapture({type(self.encoder).__name__}, blocks={self.blocks}, block_norm={self.block_norm!r})"

    def collect(self, **encoder_inputs: Any) -> list[Tensor]:
        """Run the encoder on its inputs; returns the chosen blocks' N hidden states [B, L, D], lowest first.

        Raises:
            RuntimeError: a block never ran (LayerDrop), or ran where its gradient is lost (a reentrant checkpoint);
                names it. Or the hooks were removed.
        """
        kept = KeptStates()
        self.run(kept, **encoder_inputs)
        return kept.hidden_states

    def pool(
        self,
        selector: S2SentSelector,
        *,
        pooling: str = "mean",
        pooling_mask: Tensor | None = None,
        **encoder_inputs: Any,
    ) -> Tensor:
        """Sentence embeddings o [B, D]: ``selector.pool`` of the blocks. The tokens that count are those of ``pooling_mask``
        [B, L], or of the inputs' ``attention_mask``, where that is [B, L].

        Without gradients (grad mode off, or nothing that requires one) large hidden states are not kept: each block is then
        squeezed and pooled as it finishes and its hidden state freed, so that peak memory is the encoder's own. Hidden states
        that are small for their device (``consumers.KEPT_SHARE``) are kept, which costs the host less.

        Raises:
            ValueError: before the encoder runs: the selector's N or D is not the capture's, or the mask has another shape, as
                those of pairs of tokens have; then ``pooling_mask`` is needed.
            RuntimeError: as ``collect``.
        """
        self.check(selector)
        validate.option("pooling", pooling, POOLINGS)
        mask = input_tokens.mask_of(encoder_inputs, pooling_mask)
        # An exported graph keeps the selector as one public op, independent of an engine's kernels.
        if self.needs_gradient(selector, encoder_inputs) or torch.compiler.is_exporting():
            return selector.pool(self.collect(**encoder_inputs), mask, pooling=pooling)
        pooled = PooledStates(selector, mask, None, pooling)
        self.run(pooled, **encoder_inputs)
        return pooled.result()

    def fuse(self, selector: S2SentSelector, *, pooling_mask: Tensor | None = None, **encoder_inputs: Any) -> Tensor:
        """Fused tokens v [B, L, D], 0 at padding: ``selector`` of the blocks. Mask and errors as in ``pool``."""
        self.check(selector)
        mask = input_tokens.mask_of(encoder_inputs, pooling_mask)
        return selector(self.collect(**encoder_inputs), mask)

    def remove(self) -> None:
        """Remove the hooks; again is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._removed = [], True

    def __enter__(self) -> BlockCapture:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def run(self, consumer: Consumer, **encoder_inputs: Any) -> Any:
        """Run the encoder on its inputs, and return its output; ``consumer`` receives each chosen block's hidden state as the
        block finishes. Errors as in ``collect``."""
        if self._removed:
            raise RuntimeError("the capture's hooks were removed: make a new BlockCapture")
        call = CapturedCall(self, consumer, input_tokens.length_of_call((), encoder_inputs))
        try:  # an interrupt may come at once
            _thread.calls.append(call)
            output = self.encoder(**encoder_inputs)
        finally:
            if _thread.calls and _thread.calls[-1] is call:
                _thread.calls.pop()
        if call.next < len(self.blocks):
            raise call.missing()
        call.finish()
        return output

    def check(self, selector: S2SentSelector) -> None:
        """Raises a ValueError where the selector's N or D is not the capture's."""
        if selector.num_blocks != len(self.blocks):
            raise ValueError(
                f"selector: expected num_blocks = {len(self.blocks)}, as many as captured, got {selector.num_blocks}"
            )
        size = families.hidden_size(self.encoder)
        if size is not None and selector.hidden_size != size:
            raise ValueError(f"selector: expected hidden_size = {size} as the encoder's, got {selector.hidden_size}")

    def find_again(self) -> tuple[int, ...]:
        """``blocks`` by their indices now, since layers may have been removed. ValueError where one of them has been."""
        return families.find_again(self.encoder, self.blocks, self._modules)

    def needs_gradient(self, selector: nn.Module, encoder_inputs: Mapping[str, Any]) -> bool:
        """Whether the hidden states of such a call must be kept for a backward."""
        if not torch.is_grad_enabled():
            return False
        inputs = (value for value in encoder_inputs.values() if isinstance(value, Tensor))
        tensors = chain(inputs, selector.parameters(), self.encoder.parameters())
        return any(tensor.requires_grad for tensor in tensors)


def _named_norm(encoder: nn.Module, block_norm: str | None) -> nn.Module | None:
    return families.find_final_norm(encoder) if block_norm == "final" else None


def _asked(encoder: nn.Module, block_norm: str | None) -> probe.Found:
    """The encoder's blocks, the norm to apply to each, and the tokens in front: as proven, or by their names where the encoder
    cannot be asked."""
    try:
        found = probe.find(encoder)
    except probe.CannotRun:
        return probe.Found(families.find_blocks(encoder), _named_norm(encoder, block_norm))
    except probe.Unproven as error:
        if block_norm == "final":
            raise probe.UnknownNorm(
                f"block_norm: expected None or 'layernorm' for {type(encoder).__name__}, whose final norm is unknown, got "
                f"'final': {error}"
            ) from error
        return probe.Found(families.find_blocks(encoder), None)
    return found if block_norm == "final" else found._replace(norm=None)


class BlockListener:
    """Follows every call of its encoder, made by any code, and keeps its hidden states or hands them to a consumer.

        listener = BlockListener(encoder, "last:3")
        encoder(**inputs)
        hidden_states = listener.take()

    Args:
        encoder, blocks, block_norm: as BlockCapture's.
        called: the module that is called, where it bypasses the encoder's own hooks.
        consumer: called with the positional arguments of each call before it runs. It returns the consumer of that call's
            hidden states as blocks finish, or None to keep them.

    A thread's last call waits for ``take`` or ``take_consumer``, or for the next call. A BlockCapture's own run of the encoder
    is not followed. Several listeners may follow one module.

    Attributes:
        called: the module that is called; None in a listener that was pickled before this attribute was kept.
    """

    def __init__(
        self,
        encoder: nn.Module,
        blocks: Sequence[int] | str | None = None,
        *,
        block_norm: str | None = "final",
        called: nn.Module | None = None,
        consumer: Callable[..., Consumer | None] | None = None,
    ) -> None:
        self.capture = BlockCapture(encoder, blocks, block_norm=block_norm)
        self._consumer = consumer
        self.called: nn.Module | None = encoder if called is None else called
        self._handles = [
            self.called.register_forward_pre_hook(partial(_begin, self), with_kwargs=True),
            self.called.register_forward_hook(partial(_end, self), always_call=True),
        ]

    @property
    def encoder(self) -> nn.Module:
        return self.capture.encoder

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.capture.blocks

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "capture" not in state:  # written when a listener was a capture itself
            consumer, handles = state.pop("_consumer"), state.pop("_handles")
            capture = BlockCapture.__new__(BlockCapture)
            capture.__dict__ = {**state, "_handles": handles[:-2]}
            state = {"capture": capture, "_consumer": consumer, "_handles": handles[-2:]}
        self.__dict__.update({"called": None, **state})  # earlier listeners did not keep it

    def remove(self) -> None:
        """Remove the hooks; again is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.capture.remove()

    @property
    def heard(self) -> bool:
        """Whether a call of this thread waits to be taken."""
        return self in _thread.heard

    def forget(self) -> None:
        """Drop this thread's last call."""
        _thread.heard.pop(self, None)

    def take(self) -> list[Tensor]:
        """The chosen blocks' hidden states, as ``collect`` returns them; once.

        Raises:
            RuntimeError: no call on this thread finished since the last time, or a consumer received its hidden states.
        """
        consumer = _thread.heard.get(self)
        if consumer is not None and not isinstance(consumer, (KeptStates, RuntimeError)):
            raise RuntimeError(
                f"the last call's hidden states were consumed by a {type(consumer).__name__}: see take_consumer"
            )
        kept = self.take_consumer()
        assert isinstance(kept, KeptStates)
        return kept.hidden_states

    def take_consumer(self) -> Consumer:
        """The consumer of the last call, a KeptStates where its hidden states were kept; once.

        Raises:
            RuntimeError: no call on this thread finished since the last time, or a block never ran in it; names it.
        """
        consumer = _thread.heard.pop(self, None)
        if consumer is None:
            raise RuntimeError("no call of the encoder was heard on this thread since the last one was taken")
        if isinstance(consumer, RuntimeError):
            raise consumer
        return consumer


class _Thread(threading.local):
    """This thread's calls in progress, innermost last: a block that runs belongs to the innermost, and to those beside it. And
    the finished calls of listeners that were not taken yet, each as long as its listener lives."""

    def __init__(self) -> None:
        self.calls: list[CapturedCall] = []
        self.heard: WeakKeyDictionary[BlockListener, Consumer | RuntimeError] = WeakKeyDictionary()


_thread = _Thread()


def _deliver(key: str, slot: int, module: nn.Module, args: Any, output: Any) -> None:
    """The hook. A module-level function with plain arguments, so that an encoder that has it can be pickled."""
    for call in reversed(_thread.calls):
        if call.key == key:
            call.take(slot, module, output)
            return
        if not call.beside:
            return


def _begin(listener: BlockListener, module: nn.Module, args: Any, kwargs: Any = None) -> None:
    """Hooks that were pickled before ``kwargs`` were wanted are called without."""
    calls = _thread.calls
    traced = torch.compiler.is_compiling()  # no frame of Python's runs then
    if calls and not traced:
        drop_interrupted(calls)
    beside = bool(calls) and calls[-1].called is module and all(call.capture is not listener.capture for call in calls)
    if calls and not beside:
        return
    listener.forget()
    consumer = None if listener._consumer is None else listener._consumer(*args)
    length = input_tokens.length_of_call(args, kwargs or {})
    call = CapturedCall(listener.capture, KeptStates() if consumer is None else consumer, length, module)
    call.beside = beside
    call.frame = None if traced else sys._getframe(1)
    calls.append(call)


def _end(listener: BlockListener, module: nn.Module, args: Any, output: Any) -> None:
    """Also runs after a call that failed."""
    for call in reversed(_thread.calls):
        if call.capture is listener.capture:
            _thread.calls.remove(call)
            if call.next == len(listener.capture.blocks):
                call.finish()
                if isinstance(call.consumer, Told):
                    call.consumer.ended(output)
                _thread.heard[listener] = call.consumer
            elif output is not None:  # the call has not failed
                _thread.heard[listener] = call.missing()
            return
        if not call.beside:
            return

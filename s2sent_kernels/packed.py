"""An encoder's blocks over packed batches: sentences one behind the other, [1, T], with no padding token computed.

The encoder itself is not changed. Its attention is replaced for the time of a call by a function registered with transformers,
which attends within each sentence; positions start again at each. Whether an encoder can be run this way is found by trying, on
its loaded weights: its hidden states must be those of the padded run, but for rounding.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import families
from .batches import Packed, Tokens, packed, padded, to_device
from .capture import BlockCapture
from .consumers import Consumer, KeptStates
from .files import first_line, require

NAME = "s2sent_packed"  # of the attention function, in transformers' table
# Arguments of an attention that this one does not compute: biases of positions, capped scores, sinks.
UNKNOWN = ("position_bias", "softcap", "s_aux", "head_mask", "layer_head_mask")
HALF = (torch.float16, torch.bfloat16)
LENGTHS = (5, 2, 33, 12, 5)  # of the sentences to try with; a longer one is added for a window
LONGEST = 600  # tokens; a window wider than that is not tried


class CannotPack(Exception):
    """Why an encoder is not run packed."""


class _Running(threading.local):
    """The packed batch that this thread's encoder is run on."""

    layout: Layout | None = None


class Layout:
    """Where the sentences of a packed batch are, as an attention needs it.

    Attributes:
        runs: (start, count, length) of neighbouring sentences of one length, which share a call of an attention.
        calls: how many attentions were computed.
    """

    def __init__(self, batch: Packed, device: torch.device) -> None:
        self.cu_seqlens = to_device(batch.cu_seqlens, device)
        self.longest = max(batch.lengths)
        self.runs: list[tuple[int, int, int]] = []
        self.calls = 0
        start = 0
        for length in batch.lengths:
            if self.runs and self.runs[-1][2] == length:
                before, count, _ = self.runs[-1]
                self.runs[-1] = (before, count + 1, length)
            else:
                self.runs.append((start, 1, length))
            start += length


_running = _Running()
_locks: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # by id: a configuration has no hash
_locks_lock = threading.Lock()


def run_lock(encoder: nn.Module) -> Any:
    """A reentrant lock that whoever runs the encoder holds, packed or padded. Encoders that share a configuration share it,
    since their attention is the configuration's. It lives as long as someone keeps it."""
    with _locks_lock:
        return _locks.setdefault(id(getattr(encoder, "config", None)), threading.RLock())


class PackedEncoder:
    """A captured encoder on its device, run on packed batches.

    While it runs, the encoder's attention is another: its caller holds ``run_lock``.
    """

    def __init__(self, capture: BlockCapture, device: torch.device) -> None:
        self._capture, self._device = capture, device
        self._first = families.first_position(capture.encoder)
        self._options = families.without_cache(capture.encoder)
        self._calls: int | None = None  # attentions of a run, once the trial has counted them

    @classmethod
    def tried(cls, capture: BlockCapture, device: torch.device) -> PackedEncoder:
        """The encoder, if its packed hidden states are the padded ones.

        Raises:
            CannotPack: says why not, whatever went wrong. torch.OutOfMemoryError: there was no memory to try.
        """
        found = cls(capture, device)
        with run_lock(capture.encoder):
            try:
                found._calls = _trial(capture, device)
            except (CannotPack, torch.OutOfMemoryError):  # a full GPU says nothing of the encoder
                raise
            except Exception as error:  # an encoder of remote code raises what it likes
                raise CannotPack(f"a packed batch fails: {type(error).__name__}: {first_line(error)}") from error
        return found

    def run(self, batch: Packed, consumer: Consumer, layout: Layout) -> None:
        """``consumer`` receives each block's hidden state, [T, D].

        Raises:
            RuntimeError: some attention was not the replaced one, so that the hidden states are wrong.
        """
        positions = _after_padding(batch, self._first - 1) if self._first else batch.position_ids
        inputs = {"input_ids": batch.input_ids, "position_ids": positions}
        inputs = {name: to_device(tensor, self._device) for name, tensor in inputs.items()}
        with _attention_replaced(self._capture.encoder, layout):
            self._capture.run(_Flat(consumer), **inputs, **self._options)
        if self._calls is not None and layout.calls != self._calls:
            raise RuntimeError(
                f"{layout.calls} of the encoder's {self._calls} attentions ran packed: "
                "other code changed the encoder or its attention while an Embedder ran it"
            )


def _after_padding(batch: Packed, padding: int) -> Tensor:
    """Positions [1, T] of RoBERTa and its kind, where a token that is the padding one has its position and is not counted."""
    real = batch.input_ids[0] != padding
    counted = real.cumsum(0)
    lengths = torch.tensor(batch.lengths)
    before = (counted - real.long())[batch.cu_seqlens[:-1].long()].repeat_interleave(lengths)
    return ((counted - before) * real + padding)[None]


class _Flat:
    """Hands [1, T, D] on as [T, D]."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    def add(self, block: int, hidden_state: Tensor) -> None:
        self._consumer.add(block, hidden_state[0])


@contextmanager
def _attention_replaced(encoder: nn.Module, layout: Layout) -> Iterator[None]:
    _register()
    config: Any = encoder.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    _running.layout = layout
    try:
        yield
    finally:
        _running.layout = None
        config._attn_implementation = before


@functools.cache
def _register() -> None:
    interface = require("transformers", "transformers", "transformers").AttentionInterface
    interface.register(NAME, attend)


# ---------------------------------------------------------------- the attention


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: [1, H, T, d] to [1, T, H, d], within each sentence of this thread's batch."""
    layout = _running.layout
    if layout is None:
        raise RuntimeError(
            "the encoder was called while an Embedder ran it packed: give each thread an encoder of its own"
        )
    unknown = [name for name in UNKNOWN if options.get(name) is not None]
    if unknown or attention_mask is not None:
        raise CannotPack(f"its attention takes {', '.join(unknown) or 'a mask of its own'}")
    if options.get("dropout") and module.training:
        raise CannotPack("it is in training mode")
    layout.calls += 1
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    window = options.get("sliding_window")
    scale = options.get("scaling")
    if query.device.type == "cuda":
        return _varlen(layout, query[0], key[0], value[0], _window(causal, window), scale)[None], None
    return _by_length(layout, query[0], key[0], value[0], _window(causal, window), scale)[None], None


def _window(causal: bool, window: int | None) -> tuple[int, int]:
    """How many tokens to the left and to the right are seen; -1 for all. transformers counts the token itself to its window."""
    side = -1 if window is None else window - 1
    return side, 0 if causal else side


def _varlen(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int], scale: float | None
) -> Tensor:
    """torch's attention of variable lengths: flash attention, in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[0] // key.shape[0]
    if groups > 1:  # torch 2.11 has no grouped heads here
        key, value = (each.repeat_interleave(groups, dim=0) for each in (key, value))
    query, key, value = (each.transpose(0, 1) for each in (query, key, value))  # [T, H, d]
    bounds: Any = (layout.cu_seqlens, layout.cu_seqlens, layout.longest, layout.longest)
    output: Any = varlen_attn(query, key, value, *bounds, scale=scale, window_size=window)
    return output


def _by_length(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int], scale: float | None
) -> Tensor:
    """torch's attention once for all neighbouring sentences of one length."""
    heads, tokens, _ = query.shape
    output = query.new_empty(tokens, heads, value.shape[-1])
    for start, count, length in layout.runs:
        part = slice(start, start + count * length)
        # [count, H, length, d]
        q, k, v = (each[:, part].unflatten(1, (count, length)).transpose(0, 1) for each in (query, key, value))
        mask = _mask(length, window, query.device)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and window == (-1, 0) and length > 1,
            scale=scale,
            enable_gqa=key.shape[0] != heads,
        )
        output[part].view(count, length, heads, -1).copy_(attended.transpose(1, 2))
    return output


def _mask(length: int, window: tuple[int, int], device: torch.device) -> Tensor | None:
    """[L, L] of the pairs that see each other, or None where no window cuts a sentence of that length."""
    left, right = window
    if left < 0 or (left >= length - 1 and right in (-1, left)):
        return None
    place = torch.arange(length, device=device)
    distance = place[:, None] - place  # > 0: the key is on the left
    return (distance <= left) & (distance >= -right)


# ---------------------------------------------------------------- trying


def refusal(capture: BlockCapture, device: torch.device) -> str | None:
    """Why the captured encoder cannot be run packed on its device, or None if it can."""
    try:
        PackedEncoder.tried(capture, device)
    except CannotPack as error:
        return str(error)
    return None


def _trial(capture: BlockCapture, device: torch.device) -> int:
    """How many attentions a packed run computes. Raises CannotPack, or what the encoder raises."""
    encoder = capture.encoder
    dtype = families.float_parameter(encoder).dtype
    if device.type == "cuda" and dtype not in HALF:
        name = str(dtype).removeprefix("torch.")
        raise CannotPack(f"attention of variable lengths needs float16 or bfloat16 on a GPU, and it is in {name}")
    config = getattr(encoder, "config", None)
    if not isinstance(getattr(config, "_attn_implementation", None), str):
        raise CannotPack("it has no attention that transformers can replace")
    if getattr(config, "attention_chunk_size", None) or "chunked_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        raise CannotPack("its attention is in chunks, of which an attention function is told nothing")
    if "position_ids" not in inspect.signature(encoder.forward).parameters:
        raise CannotPack("it takes no position_ids")
    tokens = _sample(encoder)
    import numpy as np

    rows = np.arange(len(tokens.ids))
    with torch.no_grad():
        kept, batch = KeptStates(), packed(tokens, rows)
        layout = Layout(batch, device)
        PackedEncoder(capture, device).run(batch, kept, layout)
        if not layout.calls:
            raise CannotPack("its attention cannot be replaced")
        together = _padded_states(capture, tokens, rows, device)
        each = [_padded_states(capture, tokens, rows[row : row + 1], device) for row in rows]
        alone = [torch.cat(states) for states in zip(*each, strict=True)]
    _compare(kept.hidden_states, together, alone, len(families.find_blocks(encoder)))
    return layout.calls


def _compare(found: list[Tensor], padded_run: list[Tensor], alone: list[Tensor], depth: int) -> None:
    """Raises CannotPack unless packed states differ from padded ones by rounding. How much that is, two padded runs tell: of all
    sentences together, and of each alone. They may happen to be equal, so a few roundings a block are allowed in any case."""
    unit = torch.finfo(found[0].dtype).eps / 2
    noise = max(_relative(a, b) for a, b in zip(alone, padded_run, strict=True))
    allowed = 8 * max(noise, unit * math.sqrt(depth))
    error = max(_relative(a, b) for a, b in zip(found, padded_run, strict=True))
    if not (math.isfinite(error) and error <= allowed):
        raise CannotPack(
            f"packed hidden states differ from padded ones by {error:.1e}, more than the {allowed:.1e} of rounding"
        )


def _relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; infinite where one is not finite, which no comparison may pass."""
    ratio = float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))
    return ratio if math.isfinite(ratio) else math.inf


def _padded_states(capture: BlockCapture, tokens: Tokens, rows: Any, device: torch.device) -> list[Tensor]:
    """[T, D] of each block, by an ordinary call."""
    inputs = {name: tensor.to(device) for name, tensor in padded(tokens, rows).items()}
    states = capture.collect(**inputs, **families.without_cache(capture.encoder))
    return [state[inputs["attention_mask"].bool()] for state in states]


def _sample(encoder: nn.Module) -> Tokens:
    """Sentences of fixed token ids, among them one longer than the encoder's window, and one with a padding token inside where
    that has a position of its own."""
    import numpy as np

    config: Any = encoder.config
    windows = (getattr(config, name, None) for name in ("sliding_window", "local_attention"))
    widest = max([0, *(window for window in windows if isinstance(window, int) and window <= LONGEST)])
    limit = families.positions(encoder) or LONGEST
    lengths = [min(length, limit) for length in (*LENGTHS, *([widest + 10] if widest else []))]
    generator = np.random.default_rng(0)
    vocabulary = int(config.vocab_size)
    special = {getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    usual = np.array([token for token in range(min(vocabulary, 5000)) if token not in special], np.int32)
    ids = [generator.choice(usual, length) for length in lengths]
    if first := families.first_position(encoder):
        ids[2][len(ids[2]) // 2] = first - 1
    return Tokens(ids, np.arange(len(lengths)), 0)

"""From texts to batches of tokens: tokenized ahead of the encoder in a thread, and cut into batches once lengths are known.

    tokenizer = TextTokenizer(tokenizer, limit)
    for tokens in ahead(tokenizer(some) for some in chunks):
        for rows in cut(tokens.lengths, budget, padded=False):
            packed(tokens, rows)

The order of texts never depends on time: equal texts and options give equal batches.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

OVERFLOWS = ("truncate", "error", "windows")
OVERLAP = 8  # of two windows of a text: the limit's part 1 / OVERLAP
LEAVE = 1.0  # seconds that an iterator which is left waits for its thread
SAMPLES = ("a", "Two words, and a number: 12.", "É 漢字 \u00df …", "")  # a tokenizer's two ways are compared on these


class Tokens(NamedTuple):
    """Token ids of texts. A text is one row, or several if it is cut into windows."""

    ids: list[np.ndarray]  # int32 [length] for each row, special tokens included
    text: np.ndarray  # int64 [rows], ascending: the row's text
    cut: int  # texts that were longer than the limit
    types: list[np.ndarray] | None = None  # token types, where some are not 0
    dropped: np.ndarray | None = (
        None  # int64 [rows]: the text's tokens before the row's, special ones left out; None for 0
    )

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows]."""
        import numpy as np

        return np.fromiter((len(ids) for ids in self.ids), np.int64, len(self.ids))

    def uncounted(self, skip: int) -> np.ndarray:
        """int64 [rows]: how many tokens at the start of a row do not count, of the ``skip`` at the start of its text. A later
        window, or a text that was cut on the left, has fewer of them or none."""
        import numpy as np

        if self.dropped is None:
            return np.full(len(self.ids), skip, np.int64)
        return np.maximum(skip - self.dropped, 0)


class TextError(ValueError):
    """One text cannot be encoded; ``text`` is its number."""

    def __init__(self, text: int, message: str) -> None:
        super().__init__(message)
        self.text = text


class Encoded(NamedTuple):
    """Texts on their way to Tokens: a fast tokenizer's result, or Tokens already."""

    first: int
    found: Any
    tokens: Tokens | None


class TextTokenizer:
    """Texts to token ids of at most ``limit`` tokens.

    A tokenizer of the library tokenizers ("fast") is copied, so that its state stays its owner's, and run in one batch call on
    all cores without the GIL. The copy is compared with the tokenizer's own call on a few samples. If they differ, or if the
    tokenizer is not a fast one, its own call is used.

    Args:
        tokenizer: a tokenizer of transformers.
        limit: tokens at most, special tokens included.
        overflow: what happens to a longer text. "truncate" cuts it; "error" raises; "windows" cuts it into rows of ``limit``
            tokens that overlap by an eighth.

    Raises:
        ValueError: the limit leaves no room for a token between the special ones, or ``overflow`` needs a fast tokenizer.
    """

    def __init__(self, tokenizer: Any, limit: int, overflow: str = "truncate") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        state = None if backend is None else (backend.truncation, backend.padding)
        special = len(tokenizer("", add_special_tokens=True)["input_ids"])
        if limit <= special:
            raise ValueError(f"max_length: expected more than the {special} special tokens of a text, got {limit}")
        self.limit, self.overflow = limit, overflow
        self._tokenizer = tokenizer
        self._left = getattr(tokenizer, "truncation_side", "right") == "left"
        self._before = self._after = 0  # special tokens around a text's others
        # Whether it gives token types other than 0, which a packed batch has no place for.
        self.typed = any(any(types) for types in tokenizer(list(SAMPLES)).get("token_type_ids", ()))
        self._fast = self._copy(tokenizer, special)
        if state is not None:
            _restore(backend, *state)
        if overflow == "windows" and self._fast is None:
            raise ValueError(
                "overflow: 'windows' needs a tokenizer of the library tokenizers whose token types are all 0, "
                f"got {type(tokenizer).__name__}"
            )
        # Padding: masked, so that any id will do where a tokenizer has none of its own.
        self.pad_id: int = getattr(tokenizer, "pad_token_id", None) or 0

    def _copy(self, tokenizer: Any, special: int) -> Any:
        """The tokenizer's backend, which does not truncate: releases of tokenizers differ in what they tell of a text's rest."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        fast = type(backend).from_str(backend.to_str())
        fast.no_padding()
        fast.no_truncation()
        fast.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
        short = special + 2
        wanted = tokenizer(list(SAMPLES), truncation=True, max_length=short)["input_ids"]
        found = fast.encode_batch_fast(list(SAMPLES))
        marks = found[0].special_tokens_mask
        self._before = marks.index(0) if 0 in marks else 0
        self._after = special - self._before
        same = [self._start(each.ids, short) for each in found] == wanted
        return fast if same and not any(any(each.type_ids) for each in found) else None

    def _start(self, ids: list[int], limit: int) -> list[int]:
        """At most ``limit`` of a text's tokens, the special ones among them, as its tokenizer truncates."""
        return ids if len(ids) <= limit else self._window(ids, limit, self._kept_from(len(ids), limit))

    def _kept_from(self, length: int, limit: int) -> int:
        """Where what is kept of a long text starts."""
        return length - limit if self._left else 0

    def _window(self, ids: list[int], limit: int, start: int) -> list[int]:
        """Special tokens around ``limit`` or fewer of a long text's tokens, from ``start`` on of the others."""
        end = len(ids) - self._after
        inner = ids[self._before + start : min(end, start + limit - self._after)]
        return [*ids[: self._before], *inner, *ids[end:]]

    def __call__(self, texts: Sequence[str], first: int = 0) -> Tokens:
        """The tokens of ``texts``, in order.

        Args:
            first: the number of the first text, for error messages.

        Raises:
            TypeError: not every text is a string. ValueError: a text is too long, and ``overflow`` is "error"; or a text has a
                lone surrogate, which is no character.
        """
        return self.convert(self.encode(texts, first))

    def encode(self, texts: Sequence[str], first: int = 0) -> Encoded:
        """The first half of a call, in which a fast tokenizer holds no GIL: two threads can share the work."""
        for number, text in enumerate(texts, first):
            if not isinstance(text, str):
                raise TypeError(f"texts: expected strings, got {type(text).__name__} as text {number}")
        try:
            if self._fast is None:
                return Encoded(first, None, self._by_call([list(texts)], first))
            return Encoded(first, self._fast.encode_batch_fast(list(texts)), None)
        except (TypeError, UnicodeError):
            for number, text in enumerate(texts, first):
                if lone_surrogate(text):
                    message = f"texts: expected Unicode text, got a lone surrogate in text {number}"
                    raise TextError(number, message) from None
            raise

    def whole(self, text: str) -> list[int]:
        """A text's tokens, special ones included, however many there are."""
        return self._tokenizer(text)["input_ids"] if self._fast is None else self._fast.encode(text).ids

    def convert(self, encoded: Encoded) -> Tokens:
        """The second half."""
        import numpy as np

        if encoded.tokens is not None:
            return encoded.tokens
        rows: list[np.ndarray] = []
        text: list[int] = []
        dropped: list[int] = []
        cut, first = 0, encoded.first
        for number, found in enumerate(encoded.found):
            ids = found.ids
            if len(ids) <= self.limit:
                starts, own = [0], [ids]
            else:
                self._too_long(first + number, len(ids))
                cut += 1
                starts = (
                    self._windows(len(ids)) if self.overflow == "windows" else [self._kept_from(len(ids), self.limit)]
                )
                own = [self._window(ids, self.limit, start) for start in starts]
            rows += [np.array(each, np.int32) for each in own]
            text += [number] * len(own)
            dropped += starts
        return Tokens(rows, np.array(text, np.int64), cut, None, np.array(dropped, np.int64) if any(dropped) else None)

    def _windows(self, length: int) -> list[int]:
        """Where the windows of a text of so many tokens start."""
        room = self.limit - self._before - self._after  # for tokens that are not special
        overlap = min(self.limit // OVERLAP, room - 1)
        return list(range(0, length - self._before - self._after - overlap, room - overlap))

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> Tokens:
        """The tokens of pairs of texts, a row each, by the tokenizer's own call. Of a pair that is too long it cuts the longer
        text, a token at a time."""
        return self._by_call([[one for one, _ in pairs], [other for _, other in pairs]], 0)

    def _by_call(self, columns: Sequence[list[str]], first: int) -> Tokens:
        """``columns`` are the arguments of the tokenizer's call: texts, or texts and what each is paired with."""
        import numpy as np

        if not columns[0]:
            return Tokens([], np.zeros(0, np.int64), 0)
        whole = self._tokenizer(*columns)
        long = [row for row, ids in enumerate(whole["input_ids"]) if len(ids) > self.limit]
        if long:
            self._too_long(first + long[0], len(whole["input_ids"][long[0]]))
        # Only a call that truncates is told the limit: some tokenizers warn of texts beyond it.
        kept = self._tokenizer(*columns, truncation=True, max_length=self.limit) if long else whole
        ids, types = ([np.array(each, np.int32) for each in kept.get(n, ())] for n in ("input_ids", "token_type_ids"))
        typed = any(each.any() for each in types)
        dropped = None
        if long and self._left:
            dropped = np.array([len(all_) - len(some) for all_, some in zip(whole["input_ids"], ids, strict=True)])
        return Tokens(ids, np.arange(len(ids)), len(long), types if typed else None, dropped)

    def _too_long(self, number: int, length: int) -> None:
        if self.overflow == "error":
            raise TextError(
                number, f"texts: expected at most {self.limit} tokens, got text {number}, which has {length:,}"
            )


def lone_surrogate(text: str) -> bool:
    """Whether a string holds half of a UTF-16 pair, as of a file read with errors="surrogateescape": no tokenizer takes it."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _restore(backend: Any, truncation: dict[str, Any] | None, padding: dict[str, Any] | None) -> None:
    """The state that a call leaves on a tokenizer is saved with it, and read by programs that call the backend alone."""
    if truncation is None:
        backend.no_truncation()
    else:
        backend.enable_truncation(**truncation)
    if padding is None:
        backend.no_padding()
    else:
        backend.enable_padding(**padding)


# ---------------------------------------------------------------- batches


def cut(lengths: np.ndarray, budget: int, *, padded: bool) -> list[np.ndarray]:
    """Rows of batches, longest first: those of a batch are of similar lengths, and one too large for the device fails at once.
    Rows without tokens are left out.

    Args:
        lengths: tokens of each row.
        budget: tokens of a batch, with their padding if ``padded``. A longer row is a batch of its own. Packed batches of a call
            are of about the same size, since a small last one would leave a GPU idle.
    """
    import numpy as np

    order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
    if not len(order):
        return []
    ends = lengths[order].cumsum()
    if not padded:
        budget = -(-int(ends[-1]) // -(-int(ends[-1]) // budget))  # the smallest that needs no more batches
    found, start = [], 0
    while start < len(order):
        if padded:
            stop = start + max(1, budget // int(lengths[order[start]]))
        else:
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + budget, side="right")))
        found.append(order[start:stop])
        start = stop
    return found


class Packed(NamedTuple):
    """Rows one behind the other, on the host."""

    input_ids: Tensor  # int64 [1, T]
    position_ids: Tensor  # int64 [1, T], from 0 in each row
    cu_seqlens: Tensor  # int32 [B + 1]
    lengths: list[int]


def packed(tokens: Tokens, rows: Iterable[int]) -> Packed:
    import numpy as np

    ids = [tokens.ids[row] for row in rows]
    lengths = np.fromiter((len(each) for each in ids), np.int64, len(ids))
    bounds = np.concatenate([[0], lengths.cumsum()])
    places = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    return Packed(
        torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        torch.from_numpy(places)[None],
        torch.from_numpy(bounds.astype(np.int32)),
        lengths.tolist(),
    )


def padded(tokens: Tokens, rows: Iterable[int], pad_id: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask, and token_type_ids where there are some, int64 [B, L] on the host."""
    import numpy as np

    ids = [tokens.ids[row] for row in rows]
    shape = (len(ids), max(map(len, ids)))
    names = ("input_ids", "attention_mask", "token_type_ids")[: 2 if tokens.types is None else 3]
    arrays = {name: np.full(shape, pad_id if name == "input_ids" else 0, np.int64) for name in names}
    for place, row in enumerate(rows):
        length = len(ids[place])
        arrays["input_ids"][place, :length] = ids[place]
        arrays["attention_mask"][place, :length] = 1
        if tokens.types is not None:
            arrays["token_type_ids"][place, :length] = tokens.types[row]
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor whose copy to the device the host need not wait for."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return pinned(tensor, device).to(device, non_blocking=True)


# ---------------------------------------------------------------- ahead


def ahead(items: Iterable[T], depth: int = 1) -> Generator[T]:
    """``items``, made in a thread ahead of the caller by at most ``depth`` beside the one in the making. An error of theirs is
    raised where its item would have come. The thread ends with the iterator; one that waits for ``items`` ends once they come,
    and an iterator that is left does not wait for it."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def give(good: bool, value: Any) -> None:
        while not stop.is_set():
            try:
                return ready.put((good, value), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                give(True, item)
                if stop.is_set():
                    return
            give(False, None)
        except BaseException as error:
            give(False, error)
        finally:
            if isinstance(items, Generator):  # which may have a thread of its own
                items.close()

    thread = threading.Thread(target=work, name="s2sent-tokenizer", daemon=True)  # it may wait for an item at exit
    thread.start()
    try:
        while True:
            good, value = ready.get()
            if good:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stop.set()
        thread.join(LEAVE)

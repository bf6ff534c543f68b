"""Texts to batches of tokens on an encoder's device, and the encoder's mode while it is run on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import families
from ..batches import TextTokenizer, Tokens, ahead, padded, to_device
from ..capture import BlockCapture
from ..encoder_runner import EncoderRunner

AHEAD = 4  # batches that are tokenized while one is in work
Text = str | tuple[str, str]  # or a pair, which the encoder reads as one input


class TokenBatch(NamedTuple):
    rows: list[int]  # the texts' positions in the sequence they were taken from
    inputs: dict[str, Tensor]  # the encoder's arguments, on its device


class StateBatch(NamedTuple):
    rows: list[int]
    hidden_states: list[Tensor]  # [B, L, D] of each captured block
    attention_mask: Tensor  # [B, L]


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch ``module`` to eval mode, and restore its mode afterwards."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def checked(texts: Sequence[Text]) -> Sequence[Text]:
    """``texts``, where each is a string, or each a tuple of two.

    Raises:
        TypeError: one is something else, or both kinds are there. A string, whose letters would pass, is no sequence of texts.
    """
    if isinstance(texts, (str, bytes, Mapping)):
        raise TypeError(f"texts: expected a sequence of strings, or of tuples of two, got {type(texts).__name__}")
    paired = None
    for number, text in enumerate(texts):
        pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if not (pair or isinstance(text, str)):
            raise TypeError(f"texts: expected strings, or tuples of two, got {type(text).__name__} as text {number}")
        if paired not in (None, pair):
            raise TypeError(f"texts: expected strings or pairs of them alone, got both, text {number} as the first")
        paired = pair
    return texts


def longest_first(texts: Sequence[Text]) -> list[int]:
    """The rows of ``texts`` by descending length: batches need little padding, and one that is too large for the device fails at
    once."""
    lengths = [len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts]
    return sorted(range(len(texts)), key=lambda row: (-lengths[row], row))


def in_batches(rows: Sequence[int], batch_size: int) -> list[list[int]]:
    return [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def token_batches(
    encoder: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    batches: Sequence[Sequence[int]],
    *,
    max_length: int | None,
    skip: int = 0,
    progress: bool = False,
) -> Iterator[TokenBatch]:
    """The inputs of an encoder, batch by batch, tokenized in a thread ahead of the caller.

    Args:
        texts: texts, or pairs of texts, but not both.
        batches: the rows of ``texts`` in each batch.
        max_length: texts are truncated to as many tokens, or to fewer where tokenizer or encoder support fewer. None: to what the
            encoder takes.
        skip: how many batches to leave out at the beginning; progress counts their texts.
        progress: show it as ``Progress`` does.
    """
    tokenize = TextTokenizer(tokenizer, families.max_length(encoder, tokenizer, max_length))
    device = next(encoder.parameters()).device
    for rows, tokens in _tokenized(tokenize, texts, batches, skip, progress):
        inputs = padded(tokens, range(len(rows)), tokenize.pad_id)
        yield TokenBatch(rows, {name: to_device(tensor, device) for name, tensor in inputs.items()})


def state_batches(
    capture: BlockCapture,
    tokenizer: Any,
    texts: Sequence[Text],
    batches: Sequence[Sequence[int]],
    *,
    max_length: int | None,
    skip: int = 0,
    progress: bool = False,
) -> Iterator[StateBatch]:
    """The captured blocks' hidden states, batch by batch, without gradients. The encoder is in eval mode, and run packed where
    it can be. Arguments as of ``token_batches``."""
    tokenize = TextTokenizer(tokenizer, families.max_length(capture.encoder, tokenizer, max_length))
    runner = EncoderRunner(capture, tokenize)
    for rows, tokens in _tokenized(tokenize, texts, batches, skip, progress):
        yield StateBatch(rows, *runner.states(tokens, range(len(rows))))


def _tokenized(
    tokenize: TextTokenizer, texts: Sequence[Text], batches: Sequence[Sequence[int]], skip: int, progress: bool
) -> Iterator[tuple[list[int], Tokens]]:
    def tokens_of(some: Any) -> Tokens:
        return tokenize(some) if isinstance(some[0], str) else tokenize.pairs(some)

    def made() -> Iterator[tuple[list[int], Tokens]]:
        for rows in batches[skip:]:
            yield list(rows), tokens_of([texts[row] for row in rows])

    ready: Iterator[tuple[list[int], Tokens]] = ahead(made(), AHEAD)
    if not progress:
        return ready
    todo = [row for batch in batches[skip:] for row in batch]
    return _shown(ready, sum(map(len, batches[:skip])), todo, lambda some: tokens_of([texts[row] for row in some]))


def _shown(
    batches: Iterator[tuple[list[int], Tokens]], done: int, todo: list[int], tokens_of: Callable[[Any], Tokens]
) -> Iterator[tuple[list[int], Tokens]]:
    from .progress import Progress, spread  # needs tqdm

    with Progress(done + len(todo), done) as progress:
        if todo:
            with contextlib.suppress(ValueError):  # of a text, which its batch says
                progress.expect(float(tokens_of(spread(todo)).lengths.mean()))
        for batch in batches:
            yield batch
            progress.advance(len(batch[0]), int(batch[1].lengths.sum()))

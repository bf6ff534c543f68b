"""Embedder: from texts to sentence embeddings, as fast as the device allows. Needs the extra transformers.

    embedder = Embedder.from_pretrained("all-MiniLM-L6-v2")
    embeddings = embedder.encode(texts)                 # float32 [S, D], in the texts' order
    for embedding in embedder.stream(lines):            # in constant memory
        ...

Texts are tokenized in threads ahead of the encoder, sorted by tokens within a chunk, and cut into batches of a number of tokens.
Where the encoder's attention can be replaced (``packed``) no padding token is computed. On a GPU inputs and results are copied
while batches run, and a few short texts replay a CUDA graph.

The same texts in the same order with the same options give the same bits on one machine; ``encode`` and ``stream`` do, too. A
text alone and the same text in a batch differ by rounding, since an encoder's matrix products depend on the number of tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import families, loading, validate
from .batch_runner import BatchRunner, Result
from .batches import OVERFLOWS, Encoded, TextTokenizer, Tokens, ahead, cut, lone_surrogate
from .chunks import PRECISIONS, Chunk, finished, like, quantized
from .export import Pipeline
from .files import on_terminal, require

if TYPE_CHECKING:
    import numpy as np

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Texts that are sorted together. The first chunk is small, so that the encoder starts early.
FIRST_CHUNK, LARGEST_CHUNK = 2048, 16384
INLINE = 32  # as few texts are tokenized by the caller's thread: a thread would cost more
UNFINISHED = 2  # batches whose results are still being copied from a GPU
CPU_TOKENS = 1024  # of a batch on a CPU, whose caches should hold its states
GPU_TOKENS = (4096, 131072)  # at least and at most, of a batch on a GPU
BYTES_A_TOKEN = 1 << 20  # of a GPU's memory, at which a batch has one token more


@dataclass
class Statistics:
    """What an Embedder has encoded since it was made, or since these were set to 0."""

    texts: int = 0
    tokens: int = 0  # special ones included, padding not
    cut: int = 0  # texts that were longer than the limit: truncated, or cut into windows


class _Options(NamedTuple):
    batch_tokens: int
    normalize: bool
    truncate_dim: int | None
    prompt: str
    skip: int  # tokens of a text that are its prompt's and do not count
    precision: str
    told: Callable[[int, int], object] | None = None  # texts and tokens of each batch


class Embedder:
    """Sentence embeddings of texts, by an encoder and a selector behind its blocks.

    Args:
        pipeline: encoder, selector, pooling and head, in eval mode on one device. They are used, not copied. The encoder's dtype
            is that of the computation; the selector sums in float32.
        tokenizer: a tokenizer of transformers. A fast one is copied.
        max_length: tokens of a text at most, or fewer where tokenizer or encoder support fewer.
        overflow: of a longer text: "truncate" cuts it, "error" raises, "windows" averages the embeddings of overlapping windows,
            weighted by their tokens.
        packed: compute no padding. None: if the encoder can; True: or raise; False: pad.
        cuda_graphs: replay CUDA graphs for a few short texts. None: on a GPU, unless one cannot be captured, which warns once;
            True: or raise; False: never.
        default_prompt: put before each text if ``encode`` is given no prompt.
        include_prompt: whether a prompt's tokens count in the pooling. If not, batches of texts with a prompt are padded.
        truncate_dim: the features that embeddings have if ``encode`` is given no other number: the first ones. None: all.

    Attributes:
        encoder, tokenizer: as given.
        device, dtype: of the encoder.
        dimension: features of an embedding.
        max_length: tokens of a text at most.
        packed: whether batches are packed; ``padded_because`` says why not.
        statistics: how many texts and tokens were encoded, and how many texts were cut.

    Several threads may call one Embedder, or several of one encoder: their batches take turns. While one runs no other code may
    call its encoder. An Embedder can be copied and pickled with its encoder; CUDA graphs are then captured again.

    Raises:
        ValueError, TypeError: an argument is wrong, or ``packed=True`` and the encoder cannot be run so; says why.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        overflow: str = "truncate",
        packed: bool | None = None,
        cuda_graphs: bool | None = None,
        default_prompt: str = "",
        include_prompt: bool = True,
        truncate_dim: int | None = None,
    ) -> None:
        validate.option("overflow", overflow, OVERFLOWS)
        if not isinstance(default_prompt, str):
            raise TypeError(f"default_prompt: expected a string, got {type(default_prompt).__name__}")
        self.device = families.float_parameter(pipeline.encoder).device
        self._features = self._dimension(pipeline)
        self._truncate_dim = self._truncated(truncate_dim)
        self.dimension = self._truncate_dim or self._features
        self._pipeline, self.encoder, self.tokenizer = pipeline, pipeline.encoder, tokenizer
        self.max_length = _limit(pipeline.encoder, tokenizer, max_length)
        self._texts = TextTokenizer(tokenizer, self.max_length, overflow)
        self.default_prompt, self._include_prompt = default_prompt, include_prompt
        self.statistics = Statistics()
        self._run = BatchRunner(pipeline, self._texts, packed, cuda_graphs)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        selector: str | os.PathLike[str] | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | int | torch.device | None = None,
        **options: Any,
    ) -> Embedder:
        """An Embedder of saved parts, which it owns.

        Args:
            name_or_folder: the name of a shipped selector, with its encoder ("all-MiniLM-L6-v2" is bundled with the extra demo);
                the folder of a selector that was trained on an encoder with frozen weights; a folder saved by S2SentModel, with
                its tokenizer, or by a SentenceTransformer with an S2SentPooling, or the hub id of one; or, beside a selector, an
                encoder's folder or hub id.
            selector: a folder or a shipped name.
            dtype: "float32", "bfloat16" or "float16" of the encoder. "auto": bfloat16 on GPUs with tensor cores for it, else
                float32.
            device: a number is a GPU's. By default the current GPU, if there is one.
            options: the other arguments of Embedder.

        Raises:
            ValueError, TypeError: there is no such model, it cannot be loaded, or an argument is wrong.
        """
        where = _device(device)
        kind = _dtype(dtype, where)
        if options.get("max_length") is not None:
            validate.positive_int("max_length", options["max_length"])
        saved = loading.load_parts(os.fspath(name_or_folder), None if selector is None else os.fspath(selector))
        for parameter in saved.pipeline.encoder.parameters():  # not buffers: rotary frequencies stay float32
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(kind)
        limits = [limit for limit in (options.pop("max_length", None), saved.max_length) if limit is not None]
        settings: dict[str, Any] = {
            "default_prompt": saved.default_prompt,
            "include_prompt": saved.include_prompt,
            "truncate_dim": saved.truncate_dim,
        } | options
        return cls(saved.pipeline.to(where), saved.tokenizer, max_length=min(limits, default=None), **settings)

    def __repr__(self) -> str:
        kind = "packed" if self.packed else f"padded: {self.padded_because}"
        name = type(self._pipeline.encoder).__name__
        return f"Embedder({name}, {self.dtype}, {self.device}, max_length={self.max_length}, {kind})"

    @property
    def dtype(self) -> torch.dtype:
        return families.float_parameter(self.encoder).dtype  # which its owner may change

    @property
    def packed(self) -> bool:
        return self._run.padded_because is None

    @property
    def padded_because(self) -> str | None:
        return self._run.padded_because

    # ------------------------------------------------------------ what people call

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        batch_tokens: int | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
        prompt: str | None = None,
        precision: str = "float32",
        progress: bool | Callable[[int, int], None] = True,
    ) -> np.ndarray:
        """Embeddings [S, D] in the texts' order, or [D] of a single text.

        Args:
            batch_tokens: tokens of a batch. By default as many as the device runs well.
            normalize: to length 1, after the truncation.
            truncate_dim: the first features only. None: as many as the model's own setting says.
            prompt: put before each text; None takes the model's own, if it has one.
            precision: "float32"; "float16"; or what ``quantize_embeddings`` of sentence-transformers makes: "binary" and
                "ubinary" have a bit a feature, "int8" and "uint8" divide the range of these embeddings.
            progress: show a bar on stderr, if that is a terminal; or a function that is told each batch's texts and tokens.

        Raises:
            ValueError, TypeError: an argument is wrong, or a text is too long and ``overflow`` is "error".
        """
        single = isinstance(texts, str)
        listed = [texts] if isinstance(texts, str) else list(texts)
        options = self._options(batch_tokens, normalize, truncate_dim, prompt, precision)
        if callable(progress):
            options = options._replace(told=progress)
        bar = _bar(len(listed)) if progress is True and on_terminal() else None
        if bar is not None:
            options = options._replace(told=lambda texts, _: bar.update(texts))
        found: list[Tensor] = []
        with (
            contextlib.closing(self._embeddings(listed, options)) as chunks,
            contextlib.nullcontext() if bar is None else bar,
        ):
            found.extend(chunks)
            if bar is not None:
                bar.update(len(listed) - bar.n)  # texts without a token are in no batch
        size = options.truncate_dim or self._features
        result = quantized(torch.cat(found) if found else torch.empty(0, size, dtype=torch.float32), precision)
        return result[0] if single else result

    def stream(
        self,
        texts: Iterable[str],
        *,
        batch_tokens: int | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
        prompt: str | None = None,
        precision: str = "float32",
    ) -> Generator[np.ndarray]:
        """Yields the embedding [D] of each text, in order, as ``encode`` computes it. Reads at most five chunks of
        ``LARGEST_CHUNK`` texts ahead, in two threads: one reads ``texts`` and runs the tokenizer, one converts what it gives.
        They end with the generator, which ``close`` ends early; while ``texts`` waits for its next one they wait with it.

        Raises:
            ValueError, TypeError: as ``encode``; or the precision is int8 or uint8, whose range is that of all embeddings.
        """
        if precision in ("int8", "uint8"):
            raise ValueError(f"precision: expected another than {precision} for a stream, whose range is not known")
        if isinstance(texts, str):
            raise TypeError("texts: expected an iterable of strings, got one string")
        options = self._options(batch_tokens, normalize, truncate_dim, prompt, precision)
        return self._stream(texts, options)

    def _stream(self, texts: Iterable[str], options: _Options) -> Generator[np.ndarray]:
        with contextlib.closing(self._embeddings(texts, options)) as chunks:
            for values in chunks:
                for embedding in quantized(values, options.precision):
                    yield embedding.copy()  # one that is kept must not keep its chunk

    def _options(
        self, batch_tokens: int | None, normalize: bool, truncate_dim: int | None, prompt: str | None, precision: str
    ) -> _Options:
        self._run.check_mode()
        validate.option("precision", precision, PRECISIONS)
        if batch_tokens is not None:
            validate.positive_int("batch_tokens", batch_tokens)
        cut = self._truncate_dim if truncate_dim is None else self._truncated(truncate_dim)
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"prompt: expected a string or None, got {type(prompt).__name__}")
        text = self.default_prompt if prompt is None else prompt
        skip = self._judged(text) if text else 0
        return _Options(batch_tokens or _usual_tokens(self.device), normalize, cut, text, skip, precision)

    def _truncated(self, truncate_dim: int | None) -> int | None:
        if truncate_dim is not None:
            validate.positive_int("truncate_dim", truncate_dim)
            if truncate_dim > self._features:
                raise ValueError(
                    f"truncate_dim: expected at most {self._features}, as many features as there are, got {truncate_dim}"
                )
        return truncate_dim

    def _judged(self, prompt: str) -> int:
        """How many tokens at the start of a text do not count: its prompt's, and the special ones before it."""
        if lone_surrogate(prompt):
            raise ValueError("prompt: expected Unicode text, got a lone surrogate")
        ids, limit = self._texts.whole(prompt), self.max_length
        most = limit if self._include_prompt else limit - 1  # a token of a text has to count
        if len(ids) > most and (self._texts.overflow == "error" or not self._include_prompt):
            raise ValueError(f"prompt: expected at most {most} tokens, where a text has {limit}, got {len(ids)}")
        if self._include_prompt or not ids:
            return 0
        return len(ids) - (ids[-1] in self.tokenizer.all_special_ids)

    # ------------------------------------------------------------ from texts to embeddings

    def _embeddings(self, texts: Iterable[str], options: _Options) -> Generator[Tensor]:
        """[n, D] of one chunk of texts after another, float32 on the host."""
        encoded, skip = self._encoded(texts, options.prompt), options.skip
        few = isinstance(texts, list) and len(texts) <= INLINE
        open_chunks: deque[Chunk] = deque()
        results: deque[tuple[Chunk, np.ndarray, Result]] = deque()
        # Closed here: after an error its threads would else live as long as the traceback.
        with contextlib.closing(self._converted(encoded) if few else ahead(self._converted(ahead(encoded)))) as parts:
            for tokens in parts:
                chunk = Chunk(tokens, self._pipeline.selector.hidden_size, skip)
                open_chunks.append(chunk)
                for rows in cut(tokens.lengths, options.batch_tokens, padded=not self._run.packs(tokens, skip)):
                    results.append((chunk, rows, self._run(tokens, rows, skip)))
                    if options.told is not None:
                        options.told(*chunk.counts(rows))
                    while len(results) > (UNFINISHED if self.device.type == "cuda" else 0):
                        _keep(*results.popleft())
                    while open_chunks and not open_chunks[0].left:
                        yield self._finished(open_chunks.popleft(), options)
        for result in results:
            _keep(*result)
        for chunk in open_chunks:
            yield self._finished(chunk, options)

    def _encoded(self, texts: Iterable[str], prompt: str) -> Generator[Encoded]:
        size, first, rest = FIRST_CHUNK, 0, iter(texts)
        while some := list(itertools.islice(rest, size)):
            # The tokenizer names what is not a string.
            yield self._texts.encode([prompt + text if isinstance(text, str) else text for text in some], first)
            first += len(some)
            size = min(2 * size, LARGEST_CHUNK)

    def _converted(self, encoded: Generator[Encoded]) -> Generator[Tokens]:
        with contextlib.closing(encoded):
            for each in encoded:
                yield self._texts.convert(each)

    def _finished(self, chunk: Chunk, options: _Options) -> Tensor:
        """[n, D] of the chunk's texts."""
        self.statistics.texts += chunk.texts
        self.statistics.tokens += int(chunk.tokens.lengths.sum())
        self.statistics.cut += chunk.tokens.cut
        return finished(chunk.result(), self._pipeline.head, options.truncate_dim, options.normalize)

    @staticmethod
    def _dimension(pipeline: Pipeline) -> int:
        size = pipeline.selector.hidden_size
        if pipeline.head is None:
            return size
        with torch.no_grad():
            return pipeline.head(like(pipeline.head, torch.ones(1, size))).shape[1]


def _keep(chunk: Chunk, rows: np.ndarray, result: Result) -> None:
    chunk.keep(rows, result.wait())


def _bar(total: int) -> Any:
    return require("tqdm.auto", "tqdm", "encode").tqdm(total=total, desc="encode", unit="text", disable=False)


def _usual_tokens(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_TOKENS
    least, most = GPU_TOKENS
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(most, max(least, memory // BYTES_A_TOKEN))


def _limit(encoder: torch.nn.Module, tokenizer: Any, wanted: int | None) -> int:
    if wanted is not None:
        validate.positive_int("max_length", wanted)
    return families.max_length(encoder, tokenizer, wanted)


def _device(given: str | int | torch.device | None) -> torch.device:
    """The device, with its number where it is a GPU."""
    if given is None:
        given = "cuda" if torch.cuda.is_available() else "cpu"
    where = validate.working_device("device", f"cuda:{given}" if isinstance(given, int) else given)
    if where.type == "cuda" and where.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return where


def usual_dtype(device: torch.device) -> torch.dtype:
    """What "auto" is on a device."""
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if capable else torch.float32


def _dtype(given: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(given, torch.dtype) and given in DTYPES.values():
        return given
    if given == "auto":
        return usual_dtype(device)
    if isinstance(given, str) and given in DTYPES:
        return DTYPES[given]
    raise ValueError(f"dtype: expected 'auto', {', '.join(map(repr, DTYPES))}, got {given!r}")

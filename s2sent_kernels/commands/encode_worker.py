"""What encodes for `s2sent encode`, in its own process or in a worker: an Embedder, made from options that can be pickled."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import __version__, cache, embedder, waiting
from ..batch_runner import Record
from ..embedder import Embedder
from ..files import require
from . import common
from .common import UserError

if TYPE_CHECKING:
    import numpy as np


# Those of EncoderOptions that embeddings record: what they are, not how they were computed.
OPTIONS = ("dtype", "max_length", "overflow", "prompt", "normalize", "truncate_dim", "precision")


class EncoderOptions(NamedTuple):
    """What a worker makes its encoder from; pickled."""

    model: str | None
    selector: str | None
    dtype: str
    max_length: int | None
    overflow: str
    prompt: str | None
    batch_tokens: int | None
    normalize: bool
    truncate_dim: int | None
    precision: str = "float32"
    ranges: np.ndarray | None = None  # [2, D], for int8 and uint8


def make_encoder(options: EncoderOptions, device: str) -> Encoder:
    """The encoder of `s2sent encode`: in each worker once, from the options and the name of a device.

    Raises:
        UserError: model and selector cannot be loaded, or do not fit.
    """
    made = load_encoder(options, device)
    common.within(options.max_length, made.embedder.max_length)
    common.check_truncation(options.truncate_dim, made.embedder.dimension)
    return made


def load_encoder(options: EncoderOptions, device: str, option: str = "--") -> Encoder:
    """The one place where an encoder is made, whether or not it can do what the options ask for.

    Args:
        option: what precedes "model" and "selector" in messages, "--", or nothing where the user has not given them.

    Raises:
        UserError: model and selector cannot be loaded, or do not fit.
    """
    if option:
        common.resolve(options.model, options.selector)  # for errors that name the options
    name = options.model or common.BUNDLED
    limits = {"max_length": options.max_length, "overflow": options.overflow}
    shown = multiprocessing.parent_process() is None  # the lines of a worker would stand in its parent's bar
    if shown:
        common.announce(name)
    try:
        with waiting.told(f"loading {name}", shown):
            made = Embedder.from_pretrained(name, options.selector, options.dtype, device, **limits)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(common.of_option(str(error)) if option else str(error)) from error
    return Encoder(made, options)


class Encoder:
    """``tools.encoding.Encoder`` of an Embedder."""

    def __init__(self, embedder: Embedder, options: EncoderOptions) -> None:
        self.embedder, self.options = embedder, options
        self.told: Callable[[int, int], None] | None = None

    @property
    def record(self) -> Record | None:
        """Of its batches: those that it knows are not run."""
        return self.embedder._run.record

    @record.setter
    def record(self, record: Record | None) -> None:
        self.embedder._run.record = record

    @property
    def tokens(self) -> int:
        return self.embedder.statistics.tokens

    @property
    def max_length(self) -> int | None:
        """None where longer texts are not cut, but encoded window by window."""
        return None if self.options.overflow == "windows" else self.embedder.max_length

    @property
    def cut(self) -> int:
        return self.embedder.statistics.cut

    def about(self) -> dict[str, Any]:
        """What embeddings of this encoder say of their origin, as JSON: the names as they were given, a digest of the weights,
        and the options that an encoder needs to give embeddings that can be compared. No times: the same run gives the same
        bytes."""
        options, own = self.options, self.embedder
        chosen = {name: getattr(options, name) for name in OPTIONS}
        chosen["max_length"] = own.max_length
        chosen["prompt"] = own.default_prompt if options.prompt is None else options.prompt
        return {
            "version": __version__,
            "model": options.model or common.BUNDLED,
            "selector": options.selector,
            "weights": digest_of(self.embedder),
            "options": chosen,
        }

    def encode(self, texts: list[str]) -> np.ndarray:
        options = self.options
        embeddings = self.embedder.encode(
            texts,
            prompt=options.prompt,
            batch_tokens=options.batch_tokens,
            normalize=options.normalize,
            truncate_dim=options.truncate_dim,
            progress=self.told or False,
        )
        if options.precision == "float32":
            return embeddings
        util = require("sentence_transformers.util", "sentence-transformers", "sentence-transformers")
        return util.quantize_embeddings(embeddings, precision=options.precision, ranges=options.ranges)

    def tokens_a_text(self, texts: list[str]) -> float | None:
        """The mean of these texts, as they are encoded; None where there are none, or one of them cannot be."""
        own, prompt = self.embedder, self.options.prompt
        prompt = own.default_prompt if prompt is None else prompt
        try:
            found = own._texts([prompt + text for text in texts])
        except ValueError:  # which encoding it says
            return None
        return int(found.lengths.sum()) / len(texts) if texts else None

    def encode_shown(self, texts: list[str]) -> np.ndarray:
        """``encode``, which shows how far it is where there is more than a moment's work."""
        if len(texts) <= common.BATCH:
            return self.encode(texts)
        from ..tools.progress import Progress, spread

        with Progress(len(texts)) as progress:
            if (tokens := self.tokens_a_text(list(spread(texts)))) is not None:
                progress.expect(tokens)
            self.told = progress.advance
            try:
                return self.encode(texts)
            finally:
                self.told = None


def digest_of(made: Embedder) -> str:
    """Of all weights that the embeddings depend on, in the dtype in which they are computed, of the tokenizer's rules, and of
    what is read from the encoder."""
    pipeline = made._pipeline  # encoder, selector and head in one module
    capture = pipeline.capture
    with waiting.told("computing the digest of the model's weights"):
        weights = cache.fingerprint(pipeline, made.tokenizer)
    read = [list(capture.blocks), str(capture.block_norm), pipeline.pooling]
    return hashlib.sha256(json.dumps([weights, *read]).encode()).hexdigest()


def settled_dtype(devices: Sequence[str]) -> str:
    """What "auto" is on all of these devices.

    Raises:
        UserError: they differ.
    """
    found = {str(embedder.usual_dtype(torch.device(device))).removeprefix("torch.") for device in devices}
    if len(found) > 1:
        raise UserError(
            f"--dtype: expected one for all of {', '.join(devices)}, which are good at {' and '.join(sorted(found))}"
        )
    return found.pop()

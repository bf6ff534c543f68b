"""What encodes for `s2sent encode`, in its own process or in a worker: an Embedder, made from options that can be pickled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from .. import embedder, waiting
from ..embedder import Embedder
from ..files import require
from . import common
from .common import UserError

if TYPE_CHECKING:
    import numpy as np


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
    """The one place where an encoder is made: in each worker once, from the options and the name of a device.

    Raises:
        UserError: model and selector cannot be loaded, or do not fit.
    """
    common.resolve(options.model, options.selector)  # for errors that name the options
    name = options.model or common.BUNDLED
    limits = {"max_length": options.max_length, "overflow": options.overflow}
    common.announce(name)
    try:
        with waiting.told(f"loading {name}"):
            made = Embedder.from_pretrained(name, options.selector, options.dtype, device, **limits)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(common.of_option(str(error))) from error
    common.within(options.max_length, made.max_length)
    size = made.dimension
    if options.truncate_dim is not None and options.truncate_dim > size:
        raise UserError(
            f"--truncate-dim: expected at most {size}, as many features as there are, got {options.truncate_dim}"
        )
    return Encoder(made, options)


class Encoder:
    """``tools.encoding.Encoder`` of an Embedder."""

    def __init__(self, embedder: Embedder, options: EncoderOptions) -> None:
        self.embedder, self.options = embedder, options
        self.told: Callable[[int, int], None] | None = None

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

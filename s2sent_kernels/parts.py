"""An encoder or a selector, each loaded by itself, and a Transformer of sentence-transformers around an encoder."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from . import absent, families, hub
from .checkpoints import folders, pretrained
from .files import importing, require
from .model_kinds import held, read_json
from .quiet import quietly
from .selector import S2SentSelector
from .sources import LoadError, Source, cannot_load, check_encoder, config_of, find_model

# Arguments of a Transformer that it hands on to what it loads.
OF_TRANSFORMER = ("model_kwargs", "processor_kwargs", "config_kwargs")


class Trained(NamedTuple):
    """A selector from a folder, and the folder's configuration."""

    name: str
    selector: S2SentSelector
    config: dict[str, Any]

    @property
    def pooling(self) -> str:
        """The pooling that the selector was trained for."""
        return self.config.get("pooling", "mean")

    @property
    def max_length(self) -> int | None:
        """The tokens at which texts were truncated in its training."""
        return self.config.get("max_length")

    def blocks(self, encoder: nn.Module) -> tuple[int, ...]:
        """The blocks of ``encoder`` that the selector was trained for; the last ones if the configuration does not name any.

        Raises:
            LoadError: the encoder has no such blocks, or another D.
        """
        found = Sizes(type(encoder).__name__, len(families.find_blocks(encoder)), families.hidden_size(encoder))
        return _fitting(self.name, self.config, found)


class Sizes(NamedTuple):
    """Of an encoder."""

    name: str  # of its class
    depth: int  # blocks
    features: int | None  # D


def _fitting(name: str, config: dict[str, Any], encoder: Sizes, option: str = "") -> tuple[int, ...]:
    """The blocks of an encoder for which the selector ``name`` was trained. LoadError, which begins with ``option``, where there
    are none."""
    wanted = config["selector"]
    blocks = config.get("blocks", f"last:{wanted['num_blocks']}")
    try:
        chosen = families.indices(blocks, encoder.depth)
    except (ValueError, TypeError):
        chosen = ()
    if len(chosen) != wanted["num_blocks"] or encoder.features not in (None, wanted["hidden_size"]):
        raise LoadError(
            f"{option}selector {name}: expected an encoder with blocks {blocks} of {wanted['hidden_size']} features, got "
            f"{encoder.name} with {encoder.depth} of {encoder.features}"
        )
    return chosen


def check_fit(source: Source, option: str = "") -> None:
    """LoadError where the selector was trained for other blocks than the encoder has, as far as files without weights tell."""
    if source.whole or source.selector is None or (found := sizes(source.model)) is None:
        return
    try:
        config = pretrained.read_config(pretrained.find(source.selector))
        known = isinstance(config["selector"]["num_blocks"], int) and isinstance(config["selector"]["hidden_size"], int)
    except Exception:  # a file that is not there, or of another structure: who reads it says so
        return
    if known:
        _fitting(source.selector, config, found, option)


def read_selector(name: str) -> Trained:
    """The selector of a folder or a shipped name, in eval mode on the CPU."""
    try:
        config = pretrained.read_config(pretrained.find(name))
        return Trained(name, S2SentSelector.from_pretrained(name), config)
    except (ValueError, TypeError, ImportError) as error:
        raise LoadError(f"selector {name}: {str(error).removeprefix('name_or_folder: ')}") from error


@quietly
def sizes(model: str | None) -> Sizes | None:
    """Those of the encoder ``model``, without its weights: what does not fit them is an error before these are loaded. None where
    there is no such encoder, or its configuration does not tell, which whoever loads it words."""
    try:
        path, _ = find_model(model)
        transformers = require("transformers", "transformers", "demo")
        config = transformers.AutoConfig.from_pretrained(hub.reached(path), **hub.NO_CODE)
    except Exception:  # the loaders raise errors of many kinds
        return None
    depth, name = families.depth_of(config), (getattr(config, "architectures", None) or ["an encoder"])[0]
    return None if depth is None else Sizes(name, depth, families.features_of(config))


def features(source: Source) -> int | None:
    """How many features the embeddings of ``source``, a folder or a selector, have, without its weights. None where its files do
    not tell."""
    try:
        if not source.whole:
            return int(pretrained.read_config(pretrained.find(str(source.selector)))["selector"]["hidden_size"])
        folder = Path(str(source.model)).expanduser()
        config = read_json(folder / "config.json") or {}
        if config.get("model_type") == "s2sent":
            return int(config["selector"]["hidden_size"])
        for entry in reversed(read_json(folder / "modules.json") or []):
            own = read_json(folder / entry["path"] / "config.json") or {}
            if "out_features" in own:  # a Dense behind the pooling
                return int(own["out_features"])
            if "selector_arguments" in own:
                return int(own["selector_arguments"]["hidden_size"])
    except Exception:  # a file that is not there, or of another structure: who reads it says so
        return None
    return None


@quietly
def load_model(model: str | None, device: torch.device) -> tuple[Any, Any, str]:
    """Encoder, tokenizer and name; ``model`` as in ``find_model``."""
    transformers = require("transformers", "transformers", "demo")
    path, name = find_model(model)
    check_encoder(path, f"model {name}")
    try:
        path = hub.reached(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **hub.NO_CODE)
    except Exception as error:  # the loaders raise errors of many kinds
        raise cannot_load(name, error) from error
    return _load_encoder(path, name, torch.float32).to(device).eval(), tokenizer, name


@quietly
def _load_encoder(path: str, name: str, dtype: torch.dtype | str) -> Any:
    """An encoder whose weights are all in its checkpoint. Of an encoder with a decoder, the encoder alone."""
    transformers = require("transformers", "transformers", "demo")
    if config_of(Path(path), name).get("model_type") == "s2sent":
        raise LoadError(
            f"model {name}: expected an encoder alone, got {held(path)}: in Python, S2SentModel.from_pretrained(folder).encoder "
            "is one, to be saved beside the tokenizer"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, **hub.NO_CODE)
        kind = importlib.import_module("s2sent_kernels.saved_model").auto_class(config)
        folders.check_shapes(Path(path), lambda: kind.from_config(config, **hub.NO_CODE))
        encoder, found = kind.from_pretrained(path, dtype=dtype, output_loading_info=True, **hub.NO_CODE)
        absent.check(path, encoder, found["missing_keys"])
    except Exception as error:  # as above
        raise cannot_load(name, error) from error
    return encoder


@quietly
def load_transformer(model: str | None, max_length: int | None = None, **options: Any) -> Any:
    """The encoder as a module of sentence-transformers, on the CPU, truncating texts to ``max_length`` tokens; ``options`` are
    those of Transformer. Its dtype is float32, unless they say otherwise."""
    with importing("sentence-transformers 6 or newer", "sentence-transformers"):
        from sentence_transformers.base.modules import Transformer
    path, name = find_model(model)
    check_encoder(path, f"model {name}")
    # Only for its error message: Transformer does not report missing weights. It has no public way to be given an encoder that is
    # already in memory either, so the weights are read twice.
    try:
        path = hub.reached(path)
    except ValueError as error:
        raise cannot_load(name, error) from error
    _load_encoder(path, name, "auto")
    given = {name: {**hub.NO_CODE, **(options.pop(name, None) or {})} for name in OF_TRANSFORMER}
    given["model_kwargs"] = {"dtype": torch.float32, **given["model_kwargs"]}
    try:
        module = Transformer(path, **given, **options)
    except Exception as error:  # as above
        raise cannot_load(name, error) from error
    limit = _least(max_length, module.max_seq_length, families.positions(module.auto_model))
    if limit is not None:
        module.max_seq_length = limit
    return module


def max_length(model: str | None, trained: Trained | None = None) -> int | None:
    """Tokens at which the texts of an encoder are cut, as its folder and that of its selector say; None where neither does. Who
    loads both uses this number: training, evaluation, encoding and export see the same tokens.

    Raises:
        LoadError: a file of the folder cannot be read.
    """
    return _least(max_seq_length(model), None if trained is None else trained.max_length)


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def limit_of(source: Source) -> int | None:
    """``max_length`` of both folders by their configurations, for an error before weights are loaded."""
    own = None
    if source.selector is not None:
        with contextlib.suppress(ValueError, TypeError):  # who reads it says so
            own = pretrained.read_config(pretrained.find(source.selector)).get("max_length")
    return _least(max_seq_length(source.model), own)


def max_seq_length(model: str | None) -> int | None:
    """What sentence-transformers saved beside an encoder, in a folder or on the hub."""
    path, name = find_model(model)
    try:
        found = require("transformers.utils", "transformers", "demo").cached_file(
            hub.reached(path), "sentence_bert_config.json", _raise_exceptions_for_missing_entries=False
        )
        return None if found is None else read_json(Path(found)).get("max_seq_length")
    except Exception as error:  # the loaders raise errors of many kinds
        raise cannot_load(name, error) from error

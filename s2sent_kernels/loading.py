"""Models with encoder and selector, loaded for those who use them: a whole SentenceTransformer, a classifier, a Pipeline for
export, or what an Embedder is made of. ``sources`` decides what is meant, and ``parts`` loads what stands alone.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from . import absent, export, hub, model_kinds
from .capture import BlockCapture
from .checkpoints import folders
from .files import require
from .parts import Trained, load_model, max_length, read_selector
from .quiet import quietly
from .sources import LoadError, Source, architectures, cannot_load, resolve


def _complete(model: Any, folder: Path) -> Any:
    """An S2SentModel or a classifier as it was loaded from a folder, once it is sure that it has its own weights."""
    absent.check(folder, model.base_model.encoder, model.missing_weights, model.unexpected_weights)
    return model


@quietly
def load_whole(model: str) -> tuple[Any, Any]:
    """A SentenceTransformer, on the CPU in eval mode, and the encoder within it, from a folder that ``holds_selector``. If
    S2SentModel wrote the folder, the tokenizer must have been saved there, too."""
    folder = Path(model).expanduser()
    try:
        if (folder / "modules.json").is_file():
            from .sentence_transformers import load

            sentences = load(folder, device="cpu").eval()
            return sentences, sentences[0].auto_model
        from .sentence_transformers import SentenceTransformer  # first: its ImportError names the extra

        _check_shapes(folder)  # also registers S2SentModel
        from sentence_transformers.base.modules import Transformer

        module = Transformer(
            str(folder),
            modality_config={"text": {"method": "forward", "method_output_name": "embedding"}},
            module_output_name="sentence_embedding",
        )
        encoder = _complete(module.auto_model, folder).encoder
        return SentenceTransformer(modules=[module], device="cpu").eval(), encoder
    except Exception as error:  # the loaders raise errors of many kinds
        raise cannot_load(model, error) from error


@quietly
def load_classifier(model: str) -> tuple[Any, Any]:
    """An S2SentForSequenceClassification and its tokenizer from a folder, on the CPU in eval mode."""
    folder = Path(model).expanduser()
    transformers = require("transformers", "transformers", "demo")
    expected = f"model {model}: expected the folder of a classifier"
    if not folder.is_dir():
        raise LoadError(f"{expected}, {'got a file' if folder.exists() else 'and there is no such directory'}")
    if "S2SentForSequenceClassification" not in architectures(model):
        got = model_kinds.held(folder) or "a folder without a config.json that says so"
        raise LoadError(f"{expected}, as `s2sent train --task classification` writes it, got {got}")
    try:
        kind: Any = importlib.import_module("s2sent_kernels.transformers").S2SentForSequenceClassification
        _check_shapes(folder, kind)
        whole = _complete(kind.from_pretrained(folder), folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **hub.NO_CODE)
    except Exception as error:  # the loaders raise errors of many kinds
        raise cannot_load(model, error) from error
    return whole.eval(), tokenizer


@quietly
def load_saved(model: str) -> Any:
    """What a folder that ``holds_selector`` was saved from, on the CPU: a SentenceTransformer or an S2SentModel. Needs no
    tokenizer in the latter case."""
    folder = Path(model).expanduser()
    try:
        if (folder / "modules.json").is_file():
            from .sentence_transformers import load

            return load(folder, device="cpu")
        from .transformers import S2SentModel

        _check_shapes(folder)
        return _complete(S2SentModel.from_pretrained(folder), folder)
    except Exception as error:  # as above
        raise cannot_load(model, error) from error


def _check_shapes(folder: Path, kind: Any = None) -> None:
    """``folders.check_shapes`` of a folder that S2SentModel wrote, or another ``kind``."""
    module: Any = importlib.import_module("s2sent_kernels.transformers")
    kind = kind or module.S2SentModel
    folders.check_shapes(folder, lambda: kind(kind.config_class.from_pretrained(folder)))


def load_pipeline(source: Source) -> export.Pipeline:
    """Encoder, selector and pooling, on the CPU in eval mode. Needs no tokenizer if ``source`` is an S2SentModel's folder."""
    if source.model is None or not source.whole:
        assert source.selector is not None  # resolve required one
        trained = read_selector(source.selector)
        encoder, _, _ = load_model(source.model, torch.device("cpu"))
        return fuse(encoder, trained)
    return export.as_pipeline(load_saved(source.model)).eval()


class Parts(NamedTuple):
    """What an Embedder is made of."""

    pipeline: export.Pipeline  # on the CPU, in eval mode
    tokenizer: Any
    max_length: int | None  # tokens of a text, where the folder says so
    default_prompt: str = ""
    include_prompt: bool = True
    truncate_dim: int | None = None  # features of an embedding, where the folder says so


@quietly
def load_parts(name: str, selector: str | None) -> Parts:
    """Encoder, selector, tokenizer and settings of what ``sources.resolve`` finds."""
    source = resolve(name, selector)
    if source.model is not None and source.whole:
        saved = load_saved(source.model)
        if isinstance(saved, nn.Sequential):
            return _parts_of(saved.eval(), source.model)
        try:
            auto = require("transformers", "transformers", "demo").AutoTokenizer
            tokenizer = auto.from_pretrained(source.model, **hub.NO_CODE)
        except Exception as error:  # as above
            raise cannot_load(source.model, error) from error
        return Parts(export.as_pipeline(saved).eval(), tokenizer, None)
    assert source.selector is not None  # resolve required one
    trained = read_selector(source.selector)
    encoder, tokenizer, _ = load_model(source.model, torch.device("cpu"))
    return Parts(fuse(encoder, trained), tokenizer, max_length(source.model, trained))


def _parts_of(model: Any, name: str) -> Parts:
    """The parts of a SentenceTransformer: a Transformer, an S2SentPooling, and what follows them."""
    try:
        pipeline = export.of_modules(model)
        own = pipeline.own_limit()
    except ValueError as error:
        raise LoadError(f"model {name}: {str(error).removeprefix('model: ')}") from error
    prompt = (model.prompts or {}).get(model.default_prompt_name or "", "")
    limits = [limit for limit in (model.max_seq_length, own) if limit is not None]
    return Parts(
        pipeline, model.tokenizer, min(limits, default=None), prompt, model[1].include_prompt, model.truncate_dim
    )


def fuse(encoder: Any, trained: Trained) -> export.Pipeline:
    """The selector behind the encoder, with the blocks and the pooling that it was trained for."""
    capture = BlockCapture(encoder, trained.blocks(encoder))
    return export.Pipeline(capture, trained.selector, trained.pooling)

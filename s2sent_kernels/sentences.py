"""A whole SentenceTransformer with an S2SentPooling: read from the folder of a saved one, or put together of a selector and the
encoder that it was trained for."""

from __future__ import annotations

import os
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from . import model_kinds, onnx_backend, parts, saved_modules, sources
from .files import importing

if TYPE_CHECKING:
    from .sentence_transformers import S2SentPooling

with importing("sentence-transformers 6 or newer", "sentence-transformers"):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

BACKENDS = ("torch", "onnx")
_ROUTERS = (f"{Router.__module__}.Router", "sentence_transformers.models.Router")  # as modules.json names them
# Options of SentenceTransformer that tell where to find its Transformer.
_OF_HUB = ("cache_folder", "revision", "token", "local_files_only", "trust_remote_code")


def load(kind: type[S2SentPooling], path: str | os.PathLike[str], **options: Any) -> SentenceTransformer:
    """See ``sentence_transformers.load``; ``kind`` is the class of the pooling."""
    backend = options.pop("backend", "torch")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    name = os.fspath(path)
    if not (Path(name).expanduser() / "modules.json").is_file():
        source = sources.resolve(name, None, required=False)
        if source.selector is not None:
            return _behind_its_encoder(kind, source, name, backend, options)
        name = str(source.model)
    return _saved(Path(name).expanduser(), str(path), backend, options)


def _saved(folder: Path, name: str, backend: str, options: dict[str, Any]) -> SentenceTransformer:
    listing = folder / "modules.json"
    if not listing.is_file():
        raise ValueError(
            "path: expected the folder of a saved SentenceTransformer, with a modules.json, its id on the hub, or a trained "
            f"selector's folder or shipped name, {model_kinds.got(name)}"
        )
    own: dict[str, Any] = {}
    for entry in saved_modules.classes_in(folder):
        package, _, kind = entry.rpartition(".")
        if package.split(".")[0] == __package__:
            own[entry] = getattr(import_module(package), kind)
        elif entry in _ROUTERS:  # one inside another is not told of ``own`` by the library
            own[entry] = SimpleNamespace(load=partial(Router.load, module_classes=own))
        elif package.split(".")[0] != "sentence_transformers" and not options.get("trust_remote_code"):
            raise ValueError(f"{listing}: expected modules of sentence_transformers or {__package__}, got {entry!r}")
    of_runtime: dict[str, Any] = {}
    graph = None
    if backend == "onnx":
        of_encoder = dict(options.get("model_kwargs") or {})  # the caller's own stays as it is
        of_runtime = {option: of_encoder.pop(option, None) for option in onnx_backend.OPTIONS}
        options["model_kwargs"] = of_encoder
        others = {option: options.get(option) for option in ("model_kwargs", "config_kwargs")}
        graph = onnx_backend.find(folder, of_runtime, others)
    # The public way to load a class of this package needs trust_remote_code, which would also run code from the folder.
    model = SentenceTransformer._load_with_module_classes(str(folder), own, **options)
    if backend == "onnx":
        onnx_backend.compute_by_runtime(model, graph, of_runtime)
    return model


def _behind_its_encoder(
    kind: type[S2SentPooling], source: sources.Source, name: str, backend: str, options: dict[str, Any]
) -> SentenceTransformer:
    if backend != "torch":
        raise ValueError(
            f"backend: expected 'torch' for {name!r}, which is a selector and an encoder, got {backend!r}: save the model first"
        )
    for option in _OF_HUB:
        if options.pop(option, None):
            raise ValueError(f"{option}: expected none for {name!r}, whose encoder decides where it is found, got some")
    of_transformer = {option: options.pop(option, None) for option in parts.OF_TRANSFORMER}
    assert source.selector is not None
    trained = parts.read_selector(source.selector)
    transformer = parts.load_transformer(source.model, parts.max_length(source.model, trained), **of_transformer)
    blocks = trained.blocks(transformer.auto_model)
    pooling = kind.behind(transformer, blocks, pooling=trained.pooling, **trained.config["selector"])
    pooling.selector.load_state_dict(trained.selector.state_dict())
    return SentenceTransformer(modules=[transformer, pooling], **options).eval()

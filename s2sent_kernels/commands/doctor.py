"""Print versions, what is usable here and why not, and what a model holds: the contents of a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__, families, parts, sources, waiting
from ..capture import BlockCapture
from ..engines.choice import BACKEND_VARIABLE, LIMITS, backends, choose
from ..engines.native import limits as native_limits
from ..export import Pipeline
from ..files import first_line, installs, require
from ..formula.call import Call
from ..packed import refusal
from ..validate import DEBUG_VARIABLE
from . import common

VARIABLES = (BACKEND_VARIABLE, DEBUG_VARIABLE, "TRITON_INTERPRET", "HF_HUB_OFFLINE")
OF_DEVELOPERS = ("test", "bench", "lint")  # extras that no user installs
PURPOSES = {  # what the others are for: commands, or what is imported
    "triton": "backend triton",
    "transformers": "S2SentModel",
    "sentence-transformers": "S2SentPooling",
    "onnx": "export",
    "demo": "demo, inspect",
    "evaluate": "evaluate",
    "encode": "encode, search, predict",
    "ray": "encode --engine ray",
    "train": "train",
    "completion": "completion in a shell",
    "mteb": "evaluate --mteb",
}
CPU = torch.device("cpu")
NO_CUDA = "this torch is built for the CPU, without CUDA"
Row = tuple[str, Callable[[], str]]  # its name, known at once, and what looks at the rest


def add(commands: Any) -> None:
    about = "print versions, what is usable here and why not, and what a model holds"
    command = commands.add_parser("doctor", help=about, description=about)
    command.add_argument(
        "--model",
        help="path or hub id of an encoder, folder of encoder and selector, or shipped name: what it holds, and how it is run "
        "(default: none)",
    )


def run(arguments: argparse.Namespace) -> None:
    source = None if arguments.model is None else common.resolve(arguments.model, None, required=False)
    rows: list[Row] = [*_libraries(), *_devices(), *_settings()]
    rows += [(name, partial(_usable, tried)) for name, tried in ABILITIES.items()]
    about = f"model {arguments.model}"
    width = max(len(name) for name in (*(name for name, _ in rows), "" if source is None else about))

    def show(name: str, value: str) -> None:
        print(f"{name:<{width}}  {value}", flush=True)

    for name, ask in rows:
        with waiting.told(f"looking at {name}"):
            value = ask()
        show(name, value)
    if source is not None:
        for line in _model(source, arguments.model):
            show(about, line)


def _said(value: str) -> Callable[[], str]:
    return lambda: value


# ---------------------------------------------------------------- what is installed


def _libraries() -> Iterator[Row]:
    """This package and torch, and every library that an extra installs: its version or how to install it, and what it is for."""
    yield "s2sent_kernels", _said(__version__)
    yield "python", _said(f"{platform.python_version()}, {platform.platform()}")
    yield "torch", _said(f"{torch.__version__}, for everything")
    try:
        importlib.metadata.requires("s2sent_kernels")
    except importlib.metadata.PackageNotFoundError:
        what = f"unknown: the package is not installed, but imported from {Path(__file__).parents[1]}"
        yield "extras", _said(what)
        return
    for library, extras in sorted(_of_extras().items()):
        yield library, partial(_library, library, extras)


def _library(name: str, extras: list[str]) -> str:
    what = f"for {', '.join(PURPOSES[extra] for extra in extras)}"
    try:
        return f"{importlib.metadata.version(name)}, {what}"
    except importlib.metadata.PackageNotFoundError:
        return f"not installed, {what}: {installs(extras[0])}"


def _of_extras() -> dict[str, list[str]]:
    """The extras that install each library, as this package's own metadata says."""
    found: dict[str, list[str]] = defaultdict(list)
    for requirement in importlib.metadata.requires("s2sent_kernels") or ():
        library = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if extra is not None and extra[1] not in OF_DEVELOPERS and library.replace("_", "-") != "s2sent-kernels":
            found[library].append(extra[1])
    return found


def _devices() -> Iterator[Row]:
    if torch.version.cuda is None:
        yield "CUDA", _said(NO_CUDA)
    elif not torch.cuda.is_available():
        yield "CUDA", _said(f"torch was built for CUDA {torch.version.cuda}, and sees no device")
    else:
        yield "CUDA", _said(f"torch was built for CUDA {torch.version.cuda}")
        for index in range(torch.cuda.device_count()):
            capability = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
            yield f"cuda:{index}", _said(f"{torch.cuda.get_device_name(index)}, {capability}")


def _settings() -> Iterator[Row]:
    """What the environment sets, and the backends that are taken there."""
    for name in VARIABLES:
        yield name, _said(os.environ.get(name, "not set"))
    for name in LIMITS:
        yield f"backend {name}", partial(_backend_status, name)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        yield f"'auto' on {device}", partial(_chosen, device)


def _backend_status(name: str) -> str:
    status = backends()[name]
    return f"{'usable' if status.usable else 'not usable'}: {status.reason}"


# ---------------------------------------------------------------- what is usable


def _chosen(device: str) -> str:
    try:
        return choose("auto", Call(torch.device(device), torch.float32))
    except ValueError as error:
        return f"raises: {error}"


def _usable(ask: Callable[[], str]) -> str:
    """``ask`` returns what was seen, or raises."""
    try:
        return f"usable: {ask()}"
    except Exception as error:  # of any library
        return f"not usable: {first_line(error)}"


def _compiled_for_cuda() -> str:
    if torch.version.cuda is None:
        raise ValueError(NO_CUDA)
    usable, reason = native_limits.status()
    if not usable:
        raise ValueError(reason)
    refusal = native_limits.cuda_refusal(None)
    if refusal is not None:
        raise ValueError(refusal)
    return torch.cuda.get_device_name()


def _packed() -> str:
    """Tried on an encoder of two tiny blocks: an encoder of another family may refuse (see --model)."""
    transformers = require("transformers", "transformers", "transformers")
    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    with BlockCapture(transformers.BertModel(transformers.BertConfig(**sizes)).eval()) as capture:
        reason = refusal(capture, CPU)
    if reason is not None:
        raise ValueError(reason)
    return "a tiny BertModel on the CPU"


def _versions(*modules: str, extra: str) -> Callable[[], str]:
    """Import them all, and return their versions."""

    def ask() -> str:
        found = [require(module, module, extra) for module in modules]
        return ", ".join(f"{module.__name__} {module.__version__}" for module in found)

    return ask


ABILITIES: dict[str, Callable[[], str]] = {
    "compiled CUDA part": _compiled_for_cuda,
    "packed encoding": _packed,
    "export to ONNX": _versions("onnx", "onnxscript", extra="onnx"),
    "ONNX Runtime": _versions("onnxruntime", extra="onnx"),
    "Ray": _versions("ray", extra="ray"),
}


# ---------------------------------------------------------------- a model


def _model(source: common.Source, model: str) -> Iterator[str]:
    """What it holds, and what would run."""
    if source.selector is None and not source.whole:
        encoder, tokenizer, _ = common.load_model(source.model, CPU)
        yield "an encoder alone"
        with BlockCapture(encoder) as capture:
            yield from _how_it_runs(capture, tokenizer, parts.max_seq_length(model))
        return
    if source.whole:
        yield f"{_kind(Path(str(source.model)))}, encoder and selector"
    else:
        yield f"a selector alone, {source.selector}, for the encoder {source.model or sources.BUNDLED}"
    if source.whole and not (Path(str(source.model)).expanduser() / "tokenizer_config.json").is_file():
        pipeline, tokenizer, limit = common.load_pipeline(source), None, None
    else:  # as an Embedder's
        pipeline, tokenizer, limit = common.load_parts(model, None)[:3]
    selector = pipeline.selector
    yield f"{selector.extra_repr()}: {sum(one.numel() for one in selector.parameters()):,} parameters"
    yield f"blocks {', '.join(map(str, pipeline.capture.blocks))}, pooling {pipeline.pooling!r}, backend {_backend(pipeline)}"
    yield from _how_it_runs(pipeline.capture, tokenizer, limit)


def _kind(folder: Path) -> str:
    if (folder / "modules.json").is_file():
        return "a SentenceTransformer"
    return (sources.architectures(str(folder)) or ["S2SentModel"])[0]


def _backend(pipeline: Pipeline) -> str:
    """That of calls on the CPU."""
    dtype = families.float_parameter(pipeline.encoder).dtype
    try:
        return choose(pipeline.selector.backend, Call(CPU, dtype, num_blocks=pipeline.selector.num_blocks))
    except ValueError as error:
        return f"raises: {error}"


def _how_it_runs(capture: BlockCapture, tokenizer: Any, limit: int | None) -> Iterator[str]:
    encoder: Any = capture.encoder
    dtype = str(families.float_parameter(encoder).dtype).removeprefix("torch.")
    yield f"{type(encoder).__name__} of {len(families.find_blocks(encoder))} blocks, {dtype}"
    if tokenizer is None:
        positions = families.positions(encoder)
        known = "no limit of tokens is known" if positions is None else f"it takes {positions} tokens"
        yield f"there is no tokenizer beside it; {known}"
    else:
        yield f"texts are cut at {families.max_length(encoder, tokenizer, limit)} tokens"
    with waiting.told("running it on a few tokens, with padding and without"):
        reason = refusal(capture, CPU)
    yield "batches without padding" if reason is None else f"batches are padded: {reason}"

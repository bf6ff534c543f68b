"""Write encoder, selector and pooling as one file: ONNX (FILE.onnx), or a package that AOTInductor compiles for this kind of
machine (FILE.pt2). Tokens in, sentence embeddings out, any batch and length."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from .. import export, pretrained
from ..capture import BlockCapture
from ..engines.choice import BACKENDS
from ..selector import S2SentSelector
from . import common
from .common import BUNDLED, UserError

WRITERS = {".onnx": export.export_onnx, ".pt2": export.export_aot}


def add(commands: Any) -> None:
    about = "write encoder and selector as one file, ONNX or AOTInductor"
    command = commands.add_parser("export", help=about, description=__doc__)
    command.add_argument("--output", type=common.path, required=True, metavar="FILE", help="FILE.onnx or FILE.pt2")
    command.add_argument(
        "--model",
        help="folder of a saved S2SentModel or SentenceTransformer, or, beside --selector, path or hub id of an encoder "
        "(default: all-MiniLM-L6-v2, bundled, with its shipped selector)",
    )
    command.add_argument("--selector", help="folder or shipped name")
    command.add_argument(
        "--backend", choices=("auto", *BACKENDS),
        help="of the selector; with reference a FILE.pt2 needs torch alone where it is loaded (default: its own, or auto)",
    )  # fmt: skip
    command.add_argument("--device", help="a torch device (default: cuda where there is one, else cpu)")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    path = Path(arguments.output)
    if path.suffix not in WRITERS:
        raise UserError(f"--output: expected a name that ends in {' or '.join(WRITERS)}, got {arguments.output}")
    if path.is_dir():
        raise UserError(f"--output: expected a file, got a directory, {path}")
    common.check_writable(path.parent)
    device = common.device_of(arguments.device)
    common.quiet_transformers()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names what it has no use for, torchvision
    try:
        pipeline = _load(arguments.model, arguments.selector).to(device).eval()
        if arguments.backend is not None:
            pipeline.selector.backend = arguments.backend
        WRITERS[path.suffix](pipeline, path)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # RuntimeError: whatever a compiler says
        raise UserError(common.first_line(error)) from error
    print(f"wrote {path}: {', '.join(export.INPUTS)} [batch, length] to {export.OUTPUT} [batch, D]")


def _load(model: str | None, selector: str | None) -> export.Pipeline:
    if model is None or selector is not None:
        return _encoder_and_selector(model, selector or BUNDLED)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise UserError(f"model {model}: there is no such directory")
    try:
        saved = _read(folder)
    except UserError:
        raise
    except Exception as error:  # whatever a broken checkpoint makes a loader raise
        raise UserError(f"model {model} cannot be loaded: {common.first_line(error)}") from error
    try:
        return export.as_pipeline(saved)
    except ValueError as error:
        raise UserError(f"{error} (beside an encoder: --selector)") from error


def _read(folder: Path) -> Any:
    if (folder / "modules.json").is_file():
        from ..sentence_transformers import load

        return load(folder, device="cpu")
    from ..transformers import S2SentConfig, S2SentModel

    kind = S2SentConfig.get_config_dict(folder)[0].get("model_type")
    if kind is None:
        raise UserError(f"model {folder}: expected a config.json that names a model_type, and there is none")
    if kind != S2SentConfig.model_type:
        raise UserError(f"--selector: expected a folder or a shipped name beside an encoder ({kind}), got none")
    return S2SentModel.from_pretrained(folder)


def _encoder_and_selector(model: str | None, name: str) -> export.Pipeline:
    """With the blocks and the pooling that the selector was trained for, where its folder says so."""
    config = pretrained.read_config(pretrained.find(name))
    selector = S2SentSelector.from_pretrained(name)
    encoder, _, _ = common.load_model(model, torch.device("cpu"))
    capture = BlockCapture(encoder, pretrained.blocks_of(config, encoder))
    return export.Pipeline(capture, selector, config.get("pooling", "mean"))

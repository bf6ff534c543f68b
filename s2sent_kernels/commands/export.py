"""Write encoder, selector and pooling as one file: ONNX (FILE.onnx), or a package that AOTInductor compiles for this kind of
machine (FILE.pt2). Tokens in, sentence embeddings out, any batch and length."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from .. import export
from ..engines.choice import BACKENDS
from . import common
from .common import UserError

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
        "--backend",
        choices=("auto", *BACKENDS),
        help="of the selector; with reference a FILE.pt2 needs torch alone where it is loaded (default: its own, or auto)",
    )
    common.add_device(command)


def run(arguments: argparse.Namespace) -> None:
    path = Path(arguments.output)
    if path.suffix not in WRITERS:
        raise UserError(f"--output: expected a name that ends in {' or '.join(WRITERS)}, got {arguments.output}")
    if path.is_dir():
        raise UserError(f"--output: expected a file, got a directory, {path}")
    common.check_writable(path.parent)
    device = common.device_of(arguments.device)
    common.quiet_transformers()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing, which is not needed
    try:
        pipeline = common.load_pipeline(common.resolve(arguments.model, arguments.selector)).to(device)
        if arguments.backend is not None:
            pipeline.selector.backend = arguments.backend
        WRITERS[path.suffix](pipeline, path)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # RuntimeError: any error of a compiler
        raise UserError(common.first_line(error)) from error
    print(f"wrote {path}: {', '.join(export.INPUTS)} [batch, length] to {export.OUTPUT} [batch, D]")

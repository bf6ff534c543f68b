"""Write encoder, selector and pooling for use elsewhere: ONNX (FILE.onnx), a package that AOTInductor compiles for this kind of
machine (FILE.pt2), or a folder that Text Embeddings Inference and NVIDIA Triton serve (FOLDER/). Tokens in, sentence embeddings
out, any batch and length."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from .. import export, hub, servers, sources, waiting
from ..engines.choice import BACKENDS
from ..files import require
from ..quiet import quiet_exporter
from . import common
from .common import UserError

WRITERS = {".onnx": export.export_onnx, ".pt2": export.export_aot}
_FOLDER_ONLY = ("max_length", "quantize")


def add(commands: Any) -> None:
    about = "write encoder and selector for use elsewhere: ONNX, AOTInductor, servers"
    command = commands.add_parser("export", help=about, description=__doc__)
    model = command.add_argument_group("model")
    files = command.add_argument_group("files")
    files.add_argument(
        "--output",
        type=common.path,
        required=True,
        metavar="FILE",
        help="FILE.onnx for ONNX Runtime, FILE.pt2 for torch, or FOLDER/, with the slash, for servers: model.onnx and tokenizer",
    )
    model.add_argument(
        "--model",
        help="folder of a saved S2SentModel or SentenceTransformer, or, beside --selector, path or hub id of an encoder "
        "(default: all-MiniLM-L6-v2, bundled, with its shipped selector)",
    )
    model.add_argument("--selector", help="folder or shipped name (default: that of --model)")
    model.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        help="of the selector; with reference a FILE.pt2 needs torch alone where it is loaded (default: its own, or auto)",
    )
    files.add_argument(
        "--quantize",
        choices=servers.QUANTIZED,
        help="weights of matrix products as int8; prints how near the embeddings stay (default: float32)",
    )
    files.add_argument(
        "--max-length",
        type=common.positive,
        metavar="TOKENS",
        help="where servers truncate a text (default: the model's)",
    )
    common.add_force(files)
    common.add_device(model)
    common.say_modes(command, dict.fromkeys(_FOLDER_ONLY, "only with FOLDER/") | {"force": "not with FOLDER/"})


def run(arguments: argparse.Namespace) -> None:
    path, folder = Path(arguments.output), arguments.output.endswith("/")
    _check_output(arguments, path, folder)
    common.check_writable(path if folder else path.parent, of_file=not folder)
    device = common.device_of(arguments.device)
    if folder or path.suffix == ".onnx":
        for module in ("onnx", "onnxscript", *(["onnxruntime"] if arguments.quantize else [])):
            require(module, module, "onnx")
    common.quiet_transformers()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing, which is not needed
    source = common.resolve(arguments.model, arguments.selector)
    common.say_of_classifier(source, "exported")
    try:
        pipeline = common.load_pipeline(source).to(device)
        if arguments.backend is not None:
            pipeline.selector.backend = arguments.backend
        with quiet_exporter(), waiting.told(f"exporting to {path}"):
            if folder:
                _write_folder(pipeline.float(), source, path, arguments)
            else:
                WRITERS[path.suffix](pipeline, path)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # RuntimeError: any error of a compiler
        raise UserError(common.first_line(error)) from error
    print(f"wrote {path}: {', '.join(export.INPUTS)} [batch, length] to {export.OUTPUT} [batch, D]")


def _check_output(arguments: argparse.Namespace, path: Path, folder: bool) -> None:
    if folder:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise common.taken(path, common.EMPTIED)
        if arguments.force:
            raise UserError("--force: expected with a file; a folder is filled only where it is empty")
        return
    if path.suffix not in WRITERS:
        raise UserError(
            f"--output: expected a name that ends in {', '.join(WRITERS)} or, as a folder of model.onnx and tokenizer for "
            f"servers, in /, got {arguments.output}"
        )
    if path.is_dir():
        raise UserError(f"--output: expected a file, got a directory, {path}")
    common.check_new([path], arguments.force)
    for name in _FOLDER_ONLY:
        if getattr(arguments, name) is not None:
            raise UserError(
                f"{common.option(name)}: expected with an --output FOLDER/ for servers, got the file {path}"
            )


def _write_folder(pipeline: Any, source: common.Source, path: Path, arguments: argparse.Namespace) -> None:
    tokenizer = pipeline.tokenizer or _tokenizer(source)
    own = None
    if not source.whole and source.selector is not None:
        own = common.max_length(source.model, common.read_selector(source.selector))
    limit = common.within(arguments.max_length, own)
    agreement = servers.export_folder(pipeline, path, tokenizer, max_length=limit, quantize=arguments.quantize)
    if agreement is not None:
        print(
            f"{arguments.quantize} against float32 on {agreement.texts} sentences: cosine {agreement.mean:.4f} on average, "
            f"{agreement.lowest:.4f} at least"
        )


def _tokenizer(source: common.Source) -> Any:
    """The encoder's, or the one that was saved beside an S2SentModel."""
    folder = (
        str(Path(source.model).expanduser()) if source.whole and source.model else sources.find_model(source.model)[0]
    )
    try:
        return common.quiet_transformers().AutoTokenizer.from_pretrained(hub.reached(folder), **hub.NO_CODE)
    except Exception as error:  # the loaders raise errors of many kinds
        raise ValueError(f"model {folder}: expected a tokenizer beside it: {common.first_line(error)}") from error

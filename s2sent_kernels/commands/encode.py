"""Encode texts into a file of embeddings: chunk by chunk, in constant memory; the output appears when it is whole, and the same
command goes on where an interrupted one stopped."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..tools.tables import STDIN
from . import common
from .common import UserError, positive

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
# Options that may change between an interrupted run and its resumption: they do not change the result, except --chunk and
# --keep-text, which encode_texts compares itself. All other options, also new ones, are part of the key.
IRRELEVANT = frozenset(("command", "output", "force", "device", "chunk", "keep_text"))
FILES = ("inputs", "model", "selector", "calibration")  # in the key by the files' sizes and times


def add(commands: Any) -> None:
    about = "encode files of texts into one file of embeddings"
    command = commands.add_parser("encode", help=about, description=__doc__)
    command.add_argument(
        "inputs",
        type=common.path,
        nargs="+",
        metavar="FILE",
        help=".txt (one text a line), .jsonl or .parquet, in this order; - is standard input",
    )
    command.add_argument(
        "--output", type=common.path, required=True, metavar="FILE", help=".parquet (id, embedding) or .npy"
    )
    command.add_argument("--column", default="text", help="of .jsonl and .parquet (default: text)")
    command.add_argument("--id-column", help="whose values become the ids (default: the row's number)")
    command.add_argument("--keep-text", action="store_true", help="a column text in the output, too")
    command.add_argument(
        "--model",
        metavar="FOLDER",
        help="encoder and selector in one folder, or an encoder with --selector (default: all-MiniLM-L6-v2, bundled)",
    )
    command.add_argument("--selector", metavar="NAME", help="a folder, or the name of a shipped selector")
    command.add_argument("--max-length", type=positive, help="tokens at most (default: the model's)")
    command.add_argument("--prompt", help="put before each text")
    command.add_argument("--normalize", action="store_true", help="to length 1")
    command.add_argument("--truncate-dim", type=positive, metavar="D", help="the first D features")
    command.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    command.add_argument(
        "--calibration", type=common.path, metavar="FILE", help="texts whose embeddings' ranges int8 and uint8 divide"
    )
    command.add_argument("--batch-size", type=positive, default=32, help="default: 32")
    command.add_argument(
        "--chunk", type=positive, default=4096, help="texts between two places to go on from (default: 4096)"
    )
    command.add_argument(
        "--device", nargs="+", action="extend", help="one or several (default: cuda where there is one, else cpu)"
    )
    command.add_argument("--force", action="store_true", help="replace an output that is there")


def run(arguments: argparse.Namespace) -> None:
    # First: without pyarrow sentence-transformers fails, too, and names itself.
    from ..tools import encoding

    # isort: split
    from .. import sentence_transformers  # noqa: F401  its error names the extra

    output, inputs = Path(arguments.output), arguments.inputs
    _check_output(output, arguments.force, encoding.OUTPUTS)
    scaled = arguments.precision in ("int8", "uint8")
    if scaled != (arguments.calibration is not None):
        raise UserError("--calibration: expected with --precision int8 or uint8, and only then")
    _check_inputs([*inputs, *([arguments.calibration] if scaled else [])], output)
    model = load(arguments.model, arguments.selector)
    if arguments.max_length is not None:
        model.max_seq_length = min(arguments.max_length, model.max_seq_length or arguments.max_length)
    if arguments.truncate_dim is not None and arguments.truncate_dim > (size := model.get_embedding_dimension()):
        raise UserError(
            f"--truncate-dim: expected at most {size}, as many features as there are, got {arguments.truncate_dim}"
        )
    devices = [str(common.device_of(name)) for name in arguments.device or [None]]
    model.to(devices[0])
    pool = model.start_multi_process_pool(devices) if len(devices) > 1 else None
    options = {
        "prompt": arguments.prompt,
        "batch_size": arguments.batch_size,
        "normalize_embeddings": arguments.normalize,
        "truncate_dim": arguments.truncate_dim,
        "show_progress_bar": False,
        "pool": pool,
    }

    def encode(texts: list[str]) -> Any:
        return model.encode(texts, **options)

    try:
        result: encoding.Encode = encode
        if arguments.precision != "float32":
            result = _quantized(encode, arguments.precision, arguments.calibration, arguments.column)
        count = encoding.encode_texts(
            encoding.read_texts(inputs, arguments.column, arguments.id_column),
            result,
            output,
            chunk=arguments.chunk,
            key=resumption_key(vars(arguments)),
            keep_text=arguments.keep_text,
            progress=sys.stderr.isatty(),
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"output {output}: {error.strerror or error}") from error
    finally:
        if pool is not None:
            model.stop_multi_process_pool(pool)
    print(f"wrote {output}: {count} texts")


def _check_output(output: Path, force: bool, suffixes: tuple[str, ...]) -> None:
    common.check_writable(output.parent)
    if output.exists() and not force:
        raise UserError(f"output {output}: it is there already; --force replaces it")
    if output.is_dir():
        raise UserError(f"output {output}: expected a file, got a directory")
    if output.suffix.lower() not in suffixes:
        raise UserError(f"output {output}: expected a file of {', '.join(suffixes)}")


def _check_inputs(paths: list[str], output: Path) -> None:
    for path in paths:
        if path != STDIN and not os.path.isfile(path):
            raise UserError(f"{path}: there is no such file")
        if path != STDIN and output.exists() and output.samefile(path):
            raise UserError(f"output {output}: expected another file than {path}, whose texts would be lost")


def load(model: str | None, selector: str | None) -> Any:
    """A SentenceTransformer on the CPU, from a folder that holds encoder and selector, or from one of each."""
    from ..sentence_transformers import S2SentPooling, SentenceTransformer

    source = common.resolve(model, selector)
    if source.model is not None and source.whole:
        return common.load_whole(source.model)[0]
    assert source.selector is not None  # resolve required one
    transformer = common.load_transformer(source.model)
    trained = common.read_selector(source.selector)
    blocks = trained.blocks(transformer.auto_model)
    try:
        pooling = S2SentPooling.behind(transformer, blocks, pooling=trained.pooling, **trained.config["selector"])
        pooling.selector.load_state_dict(trained.selector.state_dict())
    except (ValueError, TypeError) as error:
        raise UserError(f"selector {source.selector}: {error}") from error
    return SentenceTransformer(modules=[transformer, pooling], device="cpu").eval()


def _quantized(encode: Callable[[list[str]], Any], precision: Any, calibration: str | None, column: str) -> Any:
    """``encode`` with embeddings of another precision; int8 and uint8 divide the ranges of the calibration texts' embeddings."""
    import numpy as np
    from sentence_transformers.util import quantize_embeddings

    from ..tools import encoding

    ranges = None
    if calibration is not None:
        seen = encode([row.text for row in encoding.read_texts([calibration], column)])
        ranges = np.stack([seen.min(axis=0), seen.max(axis=0)])
        if not (ranges[0] < ranges[1]).all():
            count = len(seen)
            raise UserError(f"--calibration {calibration}: expected texts that differ in every feature, got {count}")
    return lambda texts: quantize_embeddings(encode(texts), precision=precision, ranges=ranges)


def resumption_key(options: Mapping[str, Any]) -> Any:
    """Everything that the result depends on, as JSON. None, which prevents resuming, if an input is standard input: it cannot be
    read again."""
    if STDIN in options["inputs"]:
        return None
    settings = {name: value for name, value in options.items() if name not in IRRELEVANT and name not in FILES}
    paths = [*options["inputs"], *(options[name] for name in FILES[1:])]
    return [__version__, settings, [None if path is None else _state(path) for path in paths]]


def _state(path: str) -> Any:
    """Names, sizes and times of the files; the name itself if there are none, as for a hub id."""
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        return path
    files = sorted(p for p in Path(path).rglob("*") if p.is_file()) if os.path.isdir(path) else [Path(path)]
    return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]

"""Encode texts into a file of embeddings: chunk by chunk, in constant memory; the output appears when it is whole, and the same
command goes on where an interrupted one stopped."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ..selector import S2SentSelector
from . import common
from .common import BUNDLED, UserError, positive

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


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
        "--model", metavar="FOLDER",
        help="encoder and selector in one folder, or an encoder with --selector (default: all-MiniLM-L6-v2, bundled)",
    )  # fmt: skip
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
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    try:
        from .. import encoding, sentence_transformers  # noqa: F401  each names its extra
    except ImportError as error:
        raise UserError(str(error)) from error
    output = Path(arguments.output)
    common.check_writable(output.parent)
    if output.exists() and not arguments.force:
        raise UserError(f"output {output}: it is there already; --force replaces it")
    if output.is_dir():
        raise UserError(f"output {output}: expected a file, got a directory")
    if output.suffix.lower() not in encoding.OUTPUTS:
        raise UserError(f"output {output}: expected a file of {', '.join(encoding.OUTPUTS)}")
    scaled = arguments.precision in ("int8", "uint8")
    if scaled != (arguments.calibration is not None):
        raise UserError("--calibration: expected with --precision int8 or uint8, and only then")
    for path in (*arguments.inputs, *([arguments.calibration] if scaled else [])):
        if path != encoding.STDIN and not os.path.isfile(path):
            raise UserError(f"{path}: there is no such file")
        if path != encoding.STDIN and output.exists() and output.samefile(path):
            raise UserError(f"output {output}: expected another file than {path}, whose texts would be lost")
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
        "prompt": arguments.prompt, "batch_size": arguments.batch_size, "normalize_embeddings": arguments.normalize,
        "truncate_dim": arguments.truncate_dim, "show_progress_bar": False, "pool": pool,
    }  # fmt: skip

    def encode(texts: list[str]) -> Any:
        return model.encode(texts, **options)

    try:
        result = encode
        if arguments.precision != "float32":
            result = _quantized(arguments, encode)
        rows = encoding.read_texts(arguments.inputs, arguments.column, arguments.id_column)
        count = encoding.encode_texts(
            rows, result, output, chunk=arguments.chunk, key=_key(arguments), keep_text=arguments.keep_text,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"output {output}: {error.strerror or error}") from error
    finally:
        if pool is not None:
            model.stop_multi_process_pool(pool)
    print(f"wrote {output}: {count} texts")


def load(model: str | None, selector: str | None) -> Any:
    """A SentenceTransformer: from a folder that holds it all, or of an encoder and a selector."""
    from ..sentence_transformers import S2SentPooling, SentenceTransformer

    common.find_model(model)
    pipeline = None if model is None else common.load_pipeline(model)
    if pipeline is not None:
        if selector is not None:
            raise UserError(f"--selector: expected none beside --model {model}, which has its own")
        return pipeline[0]
    if selector is None and model is not None:
        raise UserError(f"--selector: expected one, since --model {model} holds an encoder alone")
    from .. import pretrained

    transformer = common.load_transformer(model)
    try:
        name = selector or BUNDLED
        config = pretrained.read_config(pretrained.find(name))
        trained = S2SentSelector.from_pretrained(name)  # first, since it judges the configuration
        blocks, arguments = pretrained.blocks_of(config, transformer.auto_model), config["selector"]
        pooling = S2SentPooling.behind(transformer, blocks, pooling=config.get("pooling", "mean"), **arguments)
        pooling.selector.load_state_dict(trained.state_dict())
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"selector {selector or BUNDLED}: {error}") from error
    return SentenceTransformer(modules=[transformer, pooling], device="cpu").eval()


def _quantized(arguments: argparse.Namespace, encode: Any) -> Any:
    import numpy as np
    from sentence_transformers.util import quantize_embeddings

    from .. import encoding

    ranges = None
    if arguments.calibration is not None:
        seen = encode([row.text for row in encoding.read_texts([arguments.calibration], arguments.column)])
        ranges = np.stack([seen.min(axis=0), seen.max(axis=0)])
        if not (ranges[0] < ranges[1]).all():
            raise UserError(
                f"--calibration {arguments.calibration}: expected texts that differ in every feature, got {len(seen)}"
            )
    return lambda texts: quantize_embeddings(encode(texts), precision=arguments.precision, ranges=ranges)


def _key(arguments: argparse.Namespace) -> Any:
    """What the result depends on; None where that cannot be said, since standard input cannot be read again."""
    from .. import __version__
    from ..encoding import STDIN

    if STDIN in arguments.inputs:
        return None

    def state(path: str) -> Any:
        path = os.path.expanduser(path)
        if not os.path.exists(path):
            return path
        files = sorted(p for p in Path(path).rglob("*") if p.is_file()) if os.path.isdir(path) else [Path(path)]
        return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]

    paths = [*arguments.inputs, arguments.model, arguments.selector, arguments.calibration]
    settings = {
        name: getattr(arguments, name)
        for name in (
            "column",
            "id_column",
            "max_length",
            "prompt",
            "normalize",
            "truncate_dim",
            "precision",
            "batch_size",
        )
    }
    return [__version__, settings, [None if path is None else state(path) for path in paths]]

"""The options of `s2sent encode`."""

from __future__ import annotations

from typing import Any

from ..batches import OVERFLOWS
from ..embedder import DTYPES
from . import common
from .common import positive

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
OF_RAY = ("address", "workers", "gpus_per_worker")
_MODES = {  # for the help; _check_options refuses the others
    "device": "only with --engine local",
    "shard": "only with an --output that is a folder, and without --force",
    "finish": "alone",
    "calibration": "only with --precision int8 or uint8, and needed there",
    "output_dtype": "only with --precision float32",
    "keep_text": "not with .npy",
}


def add(command: Any) -> None:
    _add_files(command)
    _add_model(command.add_argument_group("model"))
    _add_embeddings(command.add_argument_group("embeddings"))
    _add_run(command.add_argument_group("run"))
    common.say_modes(command, dict.fromkeys(OF_RAY, "only with --engine ray") | _MODES)


def _add_files(command: Any) -> None:
    command.add_argument(
        "inputs",
        type=common.path,
        nargs="*",
        metavar="FILE",
        help=".txt (one text a line), .jsonl, .parquet, .csv, .tsv, .arrow, .feather, also .gz and .zst, in this order; folders "
        "and globs of them; a dataset on disk; - is standard input; an empty text gets an embedding, too",
    )
    group = command.add_argument_group("files")
    group.add_argument(
        "--output",
        type=common.path,
        metavar="FILE or FOLDER/",
        help=".parquet (id, embedding) or .npy; with a slash at the end, a folder of parts; no default",
    )
    group.add_argument("--column", default="text", help="where there are columns, dotted for a field (default: text)")
    group.add_argument("--id-column", help="whose values become the ids (default: the row's number)")
    group.add_argument(
        "--columns", metavar="WHAT=COLUMN,...", help="both in one: text=doc.body,id=key (default: text=text)"
    )
    common.add_format(group)
    group.add_argument("--keep-text", action="store_true", help="a column text in the output, too")
    group.add_argument(
        "--on-error",
        choices=("skip", "fail"),
        default="fail",
        help="of a row that cannot be encoded: NaN in its place and a line in OUTPUT.failed.jsonl (of a folder: in its "
        "failed.jsonl), or an error (default: fail)",
    )
    common.add_force(group)


def _add_model(group: Any) -> None:
    group.add_argument(
        "--model",
        metavar="FOLDER",
        help="encoder and selector in one folder, a shipped name, or an encoder with --selector "
        "(default: all-MiniLM-L6-v2, bundled)",
    )
    group.add_argument(
        "--selector", metavar="NAME", help="a folder, or the name of a shipped selector (default: that of --model)"
    )
    group.add_argument("--max-length", type=positive, help="tokens at most (default: the model's)")
    group.add_argument(
        "--overflow",
        choices=OVERFLOWS,
        default="truncate",
        help="of texts longer than --max-length: cut, refuse, or average overlapping windows (default: truncate)",
    )
    group.add_argument("--prompt", help="put before each text (default: the model's)")
    group.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of the encoder (default: auto, what the device is good at)",
    )


def _add_embeddings(group: Any) -> None:
    group.add_argument("--normalize", action="store_true", help="to length 1")
    group.add_argument(
        "--truncate-dim", type=positive, metavar="D", help="the first D features (default: as many as the model gives)"
    )
    group.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    group.add_argument(
        "--output-dtype",
        choices=("float16",),
        help="in which embeddings of float32 are stored (default: float32)",
    )
    group.add_argument(
        "--calibration",
        type=common.path,
        metavar="FILE",
        help="texts whose embeddings' ranges int8 and uint8 divide; no default",
    )


def _add_run(group: Any) -> None:
    group.add_argument("--batch-tokens", type=positive, metavar="N", help="default: as many as the device runs well")
    group.add_argument(
        "--part-rows",
        "--chunk",
        type=positive,
        metavar="N",
        help="texts of a part, within which they are sorted by length (default: 65536 in a folder, 4096 on the way to a "
        "file)",
    )
    group.add_argument(
        "--shard", type=shard, metavar="I/N", help="every N-th part from part I on, I from 0 to N - 1 (default: all)"
    )
    group.add_argument(
        "--finish", type=common.path, metavar="FOLDER/", help="check the shards' parts; write the manifest; no default"
    )
    group.add_argument("--engine", choices=("local", "ray"), default="local", help="who encodes (default: local)")
    group.add_argument(
        "--device",
        nargs="+",
        action="extend",
        help="one, or several with a process each (default: cuda where there is one, else cpu)",
    )
    group.add_argument("--address", help="of a running cluster, as auto (default: RAY_ADDRESS, or one is started)")
    group.add_argument("--workers", type=positive, metavar="N", help="default: as many as there is room for")
    group.add_argument("--gpus-per-worker", type=share, metavar="G", help="default: 1 where there are GPUs, else 0")


def shard(text: str) -> tuple[int, int]:
    """An argparse type."""
    index, count = map(int, text.split("/"))
    if not 0 <= index < count:
        raise ValueError
    return index, count


shard.__name__ = "I/N with I from 0 to N - 1"  # as the parser quotes it


def share(text: str) -> float:
    """An argparse type: whole GPUs, or a part of one."""
    value = float(text)
    if value < 0 or not (value < 1 or value.is_integer()):
        raise ValueError
    return value


share.__name__ = "a whole number of GPUs, or a part of one"

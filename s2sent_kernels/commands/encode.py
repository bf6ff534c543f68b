"""Encode texts into a file of embeddings or a folder of parts, in constant memory. A file appears when it is whole, a folder gets
its manifest then; the same command goes on where an interrupted one stopped."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..files import require
from ..tools import columns
from ..tools.tables import STDIN
from . import common, encode_options
from .common import UserError
from .encode_options import OF_RAY
from .encode_worker import Encoder, EncoderOptions, make_encoder, settled_dtype

if TYPE_CHECKING:
    import numpy as np

    from ..tools import encoding

# Options that may change between an interrupted run and its resumption: they say how and where, not what. All other options, also
# new ones, are part of the plan's key.
IRRELEVANT = frozenset(
    (
        "command",
        "output",
        "force",
        "on_error",
        "device",
        "engine",
        "address",
        "workers",
        "gpus_per_worker",
        "shard",
        "finish",
    )
)
# In the key as fields of Request; columns says what column and id_column are.
REQUESTED = ("inputs", "column", "id_column", "keep_text", "output_dtype", "part_rows", "format", "columns")
FILES = ("model", "selector", "calibration")  # in the key by the files' sizes and times


def add(commands: Any) -> None:
    about = "encode files of texts into embeddings"
    command = commands.add_parser("encode", help=about, description=__doc__)
    encode_options.add(command)


def run(arguments: argparse.Namespace) -> None:
    from ..tools import encoding

    if arguments.finish is not None:
        _finish(arguments)
        return
    _check_options(arguments)
    _take_columns(arguments)
    as_folder = arguments.output.endswith("/")
    output = Path(os.path.realpath(arguments.output))  # a link is followed: what it leads to is replaced
    _check_output(arguments, output)
    with _told(arguments.output):
        inputs = encoding.expand(arguments.inputs, str(output) if as_folder else None)
    calibration = [arguments.calibration] if arguments.calibration is not None else []
    _check_inputs([*inputs, *calibration], output, arguments.output)
    if arguments.engine == "ray":
        require("ray", "ray", "ray")
    if arguments.precision != "float32":
        require("sentence_transformers.util", "sentence-transformers", "sentence-transformers")
    devices = _devices(arguments)
    if arguments.dtype == "auto":  # settled here, since it is part of the key
        arguments.dtype = "bfloat16" if arguments.gpus_per_worker else settled_dtype(devices)
    source = common.resolve_here(arguments.model, arguments.selector)
    if source is not None:
        common.say_of_classifier(source, "written")
    if source is not None and arguments.truncate_dim is not None:
        common.check_truncation(arguments.truncate_dim, common.features(source))
    texts = _calibration(arguments)
    made = functools.cache(
        lambda: _engine(arguments, devices, texts)
    )  # it loads the model: after all inputs are judged

    asked = []  # once where something was left to encode

    def engine(job: Any, parts: Any, progress: Any) -> Any:
        asked.append(job)
        chosen, _, encoder = made()
        with contextlib.suppress(ValueError, OSError):  # of a row or a file, which who encodes it says
            if (tokens := encoder.tokens_a_text(encoding.sample(job, parts))) is not None:
                progress.expect(tokens)
        progress.begin()
        return chosen(job, parts, progress)

    request = request_of(arguments, inputs, output)._replace(about=lambda: made()[1])
    part = arguments.shard and encoding.Shard(*arguments.shard)
    before = _manifest(output)
    with (
        common.interrupted(_kept, output if as_folder else encoding.hidden(output)),
        _told(arguments.output, arguments),
    ):
        write = encoding.encode_folder if as_folder else encoding.encode_file
        count = write(
            request,
            engine,
            output,
            encoding.Options(part, arguments.force, skip=arguments.on_error == "skip", ready=made),
        )
    which = f"shard {part.number} of {part.total}, " if part else ""
    nothing = as_folder and not asked and (part is not None or _manifest(output) == before)
    _report(arguments.output, f"{which}{count:,} texts", wrote=not nothing)


def _manifest(folder: Path) -> bytes | None:
    """That of a finished folder."""
    from ..tools import encoding

    try:
        return (folder / encoding.MANIFEST).read_bytes()
    except OSError:  # there is none, or ``folder`` is a file
        return None


def _report(place: object, what: str, *, wrote: bool) -> None:
    print(f"wrote {place}: {what}" if wrote else f"{place}: is finished already: {what}")


def _kept(folder: Path) -> str:
    """What an interruption leaves."""
    from ..tools import encoding

    texts = encoding.kept(folder)
    if texts:
        return f"{texts:,} text{'s are' if texts > 1 else ' is'} encoded and kept: the same command goes on after them"
    return "nothing is kept: no text was encoded yet"


def _finish(arguments: argparse.Namespace) -> None:
    from ..tools import encoding

    add((parser := argparse.ArgumentParser()).add_subparsers())
    defaults = vars(parser.parse_args(["encode"]))
    for name, value in defaults.items():
        if name != "finish" and getattr(arguments, name) != value:
            got = ", ".join(arguments.inputs) if name == "inputs" else common.option(name)
            raise UserError(f"--finish: expected nothing beside the folder, got {got}")
    folder = Path(arguments.finish)
    if not folder.is_dir():
        got = "got a file" if folder.exists() else "there is no such folder"
        raise UserError(f"--finish {arguments.finish}: expected the folder that shards were written into, {got}")
    before = _manifest(folder)
    with _told(arguments.finish):
        count = encoding.finish(folder)
    if _manifest(folder) == before:
        _report(arguments.finish, f"{count:,} texts", wrote=False)
    else:
        _report(folder / encoding.MANIFEST, f"{count:,} texts", wrote=True)


@contextlib.contextmanager
def _told(output: str, arguments: argparse.Namespace | None = None) -> Iterator[None]:
    """Errors of the tools, as those of the user. With the ``arguments`` of a run that of a row says how to do without it."""
    from ..tools import encoding

    try:
        yield
    except (encoding.DataError, encoding.Failed) as error:
        skips = arguments is None or arguments.on_error == "skip" or arguments.precision != "float32"
        hint = "" if skips or error.row is None else "; --on-error skip goes on with NaN in its place"
        raise UserError(f"{error}{hint}") from error
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"output {output}: {error.strerror or error}") from error


# ---------------------------------------------------------------- what fits together


def _check_options(arguments: argparse.Namespace) -> None:
    if not arguments.inputs or arguments.output is None:
        got = "no --output" if arguments.inputs else "no files"
        raise UserError(f"expected files of texts and --output, or --finish FOLDER/ alone, got {got}")
    scaled = arguments.precision in ("int8", "uint8")
    if scaled and arguments.calibration is None:
        raise UserError(
            f"--precision {arguments.precision}: expected --calibration FILE beside it, texts that give the ranges"
        )
    if not scaled and arguments.calibration is not None:
        raise UserError(f"--calibration: expected with --precision int8 or uint8, got {arguments.precision}")
    if arguments.output_dtype is not None and arguments.precision != "float32":
        raise UserError(f"--output-dtype: expected with --precision float32, got {arguments.precision}")
    if arguments.on_error == "skip" and arguments.precision != "float32":
        raise UserError(
            f"--on-error skip: expected --precision float32, whose NaN a skipped row gets, got {arguments.precision}"
        )
    common.check_format(arguments.format, arguments.inputs)
    if arguments.engine == "ray" and arguments.device is not None:
        raise UserError("--device: expected with --engine local; --gpus-per-worker tells Ray what a worker uses")
    for name in OF_RAY:
        if arguments.engine != "ray" and getattr(arguments, name) is not None:
            raise UserError(f"{common.option(name)}: expected with --engine ray")
    if arguments.shard is not None:
        if not arguments.output.endswith("/"):
            raise UserError(f"--shard: expected a folder as --output, with a slash at its end, got {arguments.output}")
        if arguments.force:
            raise UserError("--shard: expected without --force, which would remove what other shards wrote")
        if STDIN in arguments.inputs:
            raise UserError("--shard: expected files, which every shard can read, got standard input")


def _take_columns(arguments: argparse.Namespace) -> None:
    """What ``--columns`` says, where ``--column`` and ``--id-column`` say it."""
    if arguments.columns is None:
        return
    if arguments.column != "text" or arguments.id_column is not None:
        raise UserError(
            f"--columns: expected no --column and --id-column, which say the same, got {arguments.columns!r} beside one"
        )
    try:
        named = columns.parse(arguments.columns, ("text", "id"))
    except ValueError as error:
        raise UserError(str(error)) from error
    arguments.column, arguments.id_column = named.get("text", "text"), named.get("id")
    arguments.columns = None


def _check_output(arguments: argparse.Namespace, output: Path) -> None:
    from ..tools.encoding import OUTPUTS, remove_leftovers, sidecar

    name = arguments.output
    if name.endswith("/"):
        common.check_writable(output, Path(name))
        return
    if output.is_dir():
        raise UserError(f"--output {name}: expected a file, got a directory; with a slash at the end it gets parts")
    if Path(name).suffix.lower() not in OUTPUTS:
        raise UserError(
            f"--output {name}: expected a file of {', '.join(OUTPUTS)}, or a folder with a slash at the end"
        )
    if arguments.keep_text and name.lower().endswith(".npy"):
        raise UserError(
            f"--keep-text: expected a file of .parquet or a folder, since an array holds no texts, got {name}"
        )
    parent = Path(name).parent if output.parent == Path(name).parent.absolute() else None
    common.check_writable(output.parent, parent, of_file=True)
    beside = [sidecar(output)] if output.suffix.lower() == ".npy" else []
    if output.exists() and not arguments.force:
        remove_leftovers(output)
    common.check_new([Path(name)], arguments.force)
    common.check_new(beside, arguments.force)


def _check_inputs(paths: list[str], output: Path, name: str) -> None:
    for path in paths:
        if path == STDIN:
            continue
        if not os.path.isfile(path):
            raise UserError(f"{path}: there is no such file")
        real = Path(os.path.realpath(path))
        if real == output or (output.exists() and output.samefile(path)):
            raise UserError(f"output {name}: expected another file than {path}, whose texts would be lost")
        if output in real.parents:
            raise UserError(f"output {name}: expected another folder than that of {path}")


# ---------------------------------------------------------------- who encodes


def _devices(arguments: argparse.Namespace) -> list[str]:
    """Those of the local engine; for Ray's workers, which may be elsewhere, what they are taken to have."""
    if arguments.engine == "ray" and arguments.gpus_per_worker == 0:
        return ["cpu"]
    return [str(common.device_of(name)) for name in arguments.device or [None]]


def _engine(
    arguments: argparse.Namespace, devices: list[str], calibration: list[str] | None
) -> tuple[encoding.Engine, dict[str, Any], Encoder]:
    """Who encodes, what the embeddings say of it, and the model, which is loaded here in any case: what is wrong with it is told
    before anything is begun."""
    from ..tools import encoding

    options = EncoderOptions(*(getattr(arguments, name) for name in EncoderOptions._fields[:-2]))
    alone = arguments.engine == "local" and len(devices) == 1
    encoder = make_encoder(options, devices[0] if alone else "cpu")
    ranges = None
    if calibration is not None:
        ranges = _ranges(encoder, arguments.calibration, calibration)
    options = options._replace(precision=arguments.precision, ranges=ranges)
    encoder = Encoder(encoder.embedder, options)
    about = encoder.about()
    about["options"] |= {"output_dtype": arguments.output_dtype, "calibration": arguments.calibration}
    make = functools.partial(make_encoder, options)
    if alone:
        engine = encoding.in_this_process(encoder)
    elif arguments.engine == "ray":
        engine = encoding.Cluster(make, arguments.address, arguments.workers, arguments.gpus_per_worker).engine
    else:
        engine = encoding.one_process_a_device(make, devices)
    return engine, about, encoder


def _calibration(arguments: argparse.Namespace) -> list[str] | None:
    """The calibration texts, read before the model is loaded."""
    from ..tools import encoding

    if arguments.calibration is None:
        return None
    try:
        return [row.text for row in encoding.read_texts([arguments.calibration], arguments.column)]
    except (ValueError, ImportError) as error:
        raise UserError(f"--calibration {error}") from error


def _ranges(encoder: Encoder, calibration: str, texts: list[str]) -> np.ndarray:
    """Least and greatest of each feature over the embeddings of the calibration texts."""
    import numpy as np

    try:
        seen = encoder.encode_shown(texts)
    except ValueError as error:
        raise UserError(f"--calibration {calibration}: {error}") from error
    ranges = np.stack([seen.min(axis=0), seen.max(axis=0)])
    if not (ranges[0] < ranges[1]).all():
        count = len(seen)
        raise UserError(f"--calibration {calibration}: expected texts that differ in every feature, got {count}")
    return ranges


# ---------------------------------------------------------------- what the result depends on


def request_of(arguments: argparse.Namespace, inputs: Sequence[str], output: Path) -> encoding.Request:
    """What the options ask for. Runs whose requests are equal give the same result."""
    from ..tools import encoding

    default = encoding.IN_A_FOLDER if arguments.output.endswith("/") else encoding.IN_A_FILE
    return encoding.Request(
        inputs,
        encoding.Columns(arguments.column, arguments.id_column),
        arguments.keep_text,
        arguments.output_dtype,
        arguments.part_rows or default,
        _settings(vars(arguments), output),
        arguments.format,
    )


def _settings(options: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """All that the result depends on beside the inputs and how they are divided, as JSON."""
    left_out = IRRELEVANT.union(REQUESTED, FILES)
    chosen = {name: value for name, value in options.items() if name not in left_out}
    files = {name: None if options[name] is None else _state(options[name], output) for name in FILES}
    return {"version": __version__, **chosen, **files}


def _state(path: str, output: Path) -> Any:
    """Names, sizes and times of the files; the name itself if there are none, as for a hub id. What this command writes is no
    part of a model: outputs may lie in the model's folder. Nor is a link that leads nowhere."""
    from ..tools.encoding import OUTPUTS, state

    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        return state(path) if os.path.exists(path) else path
    found = []
    for place, folders, names in os.walk(path):
        real = Path(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and real / name != output)
        if "_plan.json" in names:
            folders.clear()
            continue
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix not in OUTPUTS and not name.endswith(".npy.json"):
                found.append(os.path.join(place, name))
    return [state(file) for file in found if os.path.exists(file)]

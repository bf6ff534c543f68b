"""Search in what `s2sent encode` wrote: the texts nearest to a query by cosine, exactly, in constant memory. The query is encoded
by the model, and with the options, that the index records."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .. import waiting
from ..batches import OVERFLOWS
from ..embedder import DTYPES
from ..files import require
from ..tools import searching
from ..tools.tables import STDIN, read_lines
from . import common
from .common import UserError, positive
from .encode_worker import OPTIONS, Encoder, EncoderOptions, digest_of, load_encoder

if TYPE_CHECKING:
    from ..tools.encoding import Stored

# What a record may hold, by option.
_KNOWN: dict[str, Any] = {
    "dtype": lambda value: value in DTYPES,
    "max_length": lambda value: value is None or (type(value) is int and value > 0),
    "overflow": lambda value: value in OVERFLOWS,
    "prompt": lambda value: value is None or isinstance(value, str),
    "normalize": lambda value: isinstance(value, bool),
    "truncate_dim": lambda value: value is None or (type(value) is int and value > 0),
    "precision": lambda value: isinstance(value, str),
}


def add(commands: Any) -> None:
    about = "find the texts nearest to a query in a file of embeddings"
    command = commands.add_parser("search", help=about, description=__doc__)
    command.add_argument("queries", nargs="+", metavar="QUERY", help="texts; - is standard input, a query a line")
    command.add_argument(
        "--index",
        type=common.path,
        required=True,
        metavar="FILE or FOLDER",
        help="what encode wrote: .parquet, .npy, or a folder of parts",
    )
    command.add_argument("--top", type=positive, default=10, metavar="K", help="how many of each query (default: 10)")
    command.add_argument("--model", metavar="FOLDER", help="as of encode (default: the one that the index records)")
    command.add_argument("--selector", metavar="NAME", help="as of encode (default: the one that the index records)")
    command.add_argument("--prompt", help="put before each query (default: the one that the index records)")
    command.add_argument(
        "--engine",
        choices=tuple(searching.ENGINES),
        default="torch",
        help="who compares; both are exact (default: torch)",
    )
    command.add_argument("--json", action="store_true", help="a JSON object a line, for programs")
    common.add_device(command)


def run(arguments: argparse.Namespace) -> None:
    from ..tools import encoding

    if arguments.engine == "faiss":
        require("faiss", "faiss-cpu", None)
    queries = list(_queries(arguments.queries))
    if arguments.selector is not None:
        common.check_selector(arguments.selector)
    try:
        index = encoding.open_stored(arguments.index)
    except (ValueError, ImportError) as error:
        raise UserError(f"--index {error}") from error
    encoder = _encoder(arguments, index)
    try:
        asked = encoder.encode_shown(queries)
        with waiting.told(f"comparing with {arguments.index}"):
            found, without = searching.nearest(asked, index.blocks(), arguments.top, arguments.engine)
            items = index.items(sorted({hit.row for hits in found for hit in hits}))
    except (ValueError, OSError) as error:
        raise UserError(f"--index {arguments.index}: {error}") from error
    if without:
        waiting.say(f"{arguments.index}: left out are rows without an embedding: {without}")
    if items and not any(item.text is not None for item in items.values()):
        waiting.say(f"{arguments.index}: keeps no texts: `s2sent encode --keep-text` would show them")
    for number, (query, hits) in enumerate(zip(queries, found, strict=True)):
        if len(queries) > 1 and not arguments.json:
            print("\n" * (number > 0) + " ".join(query.split()))
        for rank, hit in enumerate(hits, 1):
            item = items[hit.row]
            if arguments.json:
                line = {"query": query, "rank": rank, "score": hit.score, "id": item.id, "text": item.text}
                print(json.dumps(line, ensure_ascii=False, default=str))
            else:
                text = "" if item.text is None else "  " + " ".join(item.text.split())
                print(f"{hit.score:.4f}  {item.id}{text}")


def _queries(given: Sequence[str]) -> Iterator[str]:
    if given.count(STDIN) > 1:
        raise UserError(
            f"{STDIN}: expected once, since standard input can be read once, got it {given.count(STDIN)} times"
        )
    empty = True
    for one in given:
        try:
            lines = [text for _, text in read_lines(STDIN)] if one == STDIN else [one]
        except ValueError as error:
            raise UserError(str(error)) from error
        for text in lines:
            if not text.strip():
                raise UserError("expected a query, got an empty text")
            empty = False
            yield text
    if empty:
        raise UserError(f"{STDIN}: expected queries, got none")


def _encoder(arguments: argparse.Namespace, index: Stored) -> Encoder:
    """What encodes queries as the index's texts were.

    Raises:
        UserError: the model is not recorded and not given, cannot be loaded, or is another than the recorded one.
    """
    where, about = arguments.index, index.about
    given = {name: getattr(arguments, name) for name in ("model", "selector")}
    typed = " and ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
    if about is None and not typed:
        raise UserError(
            f"--index {where}: does not say which model wrote it: give --model, and --selector where it had one"
        )
    known = _record(where, about)
    if known["precision"] != "float32":
        raise UserError(
            f"--index {where}: has embeddings of precision {known['precision']}, which a query's cannot be compared with: "
            "encode with --precision float32"
        )
    model, selector = given["model"], given["selector"]
    recorded = model is None and about is not None  # --selector alone stands behind the model that the index records
    if recorded:
        model, selector = about["model"], selector or about["selector"]
    prompt = known["prompt"] if arguments.prompt is None else arguments.prompt
    chosen = known | {"prompt": prompt, "batch_tokens": None, "model": model, "selector": selector}
    device = common.device_of(arguments.device)
    try:
        made = load_encoder(EncoderOptions(**chosen), str(device), "" if recorded else "--")
    except UserError as error:
        if not recorded:
            raise
        if typed:
            said = str(error).removeprefix(f"selector {selector}: ").removeprefix("selector: ")
            raise UserError(f"{typed}: does not go with the model that {where} records, {model}: {said}") from error
        raise UserError(
            f"--index {where}: cannot load the model that it records; --model names another place: {error}"
        ) from error
    if about is not None and digest_of(made.embedder) != about["weights"]:
        raise UserError(
            f"{typed or f'model {model}'}: is another than the one that wrote {where} ({about['model']}"
            + (f" with selector {about['selector']}" if about["selector"] else "")
            + "), or was trained since: encode the texts again"
        )
    size = known["truncate_dim"] or made.embedder.dimension
    if size != index.size:
        raise UserError(
            f"--index {where}: expected embeddings of {size} features, as the model gives, got {index.size}"
        )
    return made


def _record(where: str, about: Any) -> dict[str, Any]:
    """The options with which the index was encoded; the usual ones where nothing is recorded."""
    if about is None:
        plain = dict.fromkeys(OPTIONS)
        return {**plain, "dtype": "auto", "overflow": "truncate", "normalize": False, "precision": "float32"}
    try:
        options = {name: about["options"][name] for name in OPTIONS}
        names = [about["model"], about["selector"] or "", about["weights"]]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"--index {where}: its record of the model cannot be read, which lacks {error}: encode the texts again"
        ) from error
    wrong = [name for name, value in options.items() if not _KNOWN[name](value)]
    if wrong or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"--index {where}: its record of the model cannot be read, which has another kind of {', '.join(wrong) or 'model'}"
        )
    return options

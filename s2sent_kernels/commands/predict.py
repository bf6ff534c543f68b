"""Label texts, or pairs of sentences, by a classifier that `s2sent train --task classification` wrote: for each row of the files,
in their order, a label and the probability of every label."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from .. import sources, waiting
from ..files import write_atomically
from ..tools import columns, encoders
from ..tools.encoders import Text
from ..tools.labelled import PAIR, TEXT, read_texts, said
from ..tools.problems import CLASSES, LABELS, NUMBERS
from . import common
from .common import UserError, positive

SUFFIXES = (".tsv", ".jsonl")


def add(commands: Any) -> None:
    about = "label files of texts by a trained classifier"
    command = commands.add_parser("predict", help=about, description=__doc__)
    files = command.add_argument_group("files")
    run = command.add_argument_group("run")
    command.add_argument(
        "inputs",
        type=common.path,
        nargs="+",
        metavar="FILE",
        help=".txt (one text a line), or .tsv, .csv, .jsonl or .parquet with the columns that it was trained on: text, or "
        "sentence1 and sentence2; an empty text gets a label, too",
    )
    files.add_argument(
        "--columns",
        metavar="WHAT=COLUMN,...",
        help="other names that the files have for these columns: text=review (default: their own)",
    )
    run.add_argument("--model", type=common.path, required=True, metavar="FOLDER", help="of the classifier")
    files.add_argument(
        "--output",
        type=common.path,
        required=True,
        metavar="FILE",
        help=".tsv (label, then a column for each label's probability) or .jsonl",
    )
    run.add_argument("--batch-size", type=positive, default=common.BATCH, help=f"default: {common.BATCH}")
    common.add_format(files)
    common.add_force(files)
    common.add_device(run)


def run(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output: expected a file of {', '.join(SUFFIXES)}, got {output}")
    common.check_format(arguments.format, arguments.inputs)
    common.check_new([output], arguments.force)
    for path in arguments.inputs:
        if output.exists() and os.path.exists(path) and output.samefile(path):
            raise UserError(f"output {output}: expected another file than {path}, whose texts would be lost")
    common.check_writable(output.parent, of_file=True)
    pairs = _takes_pairs(arguments.model)
    try:
        named = {} if arguments.columns is None else columns.parse(arguments.columns, (*TEXT, *PAIR))
        given = columns.Columns(named, format=arguments.format, judged=False)
        with waiting.told("reading the texts"):
            files = {path: read_texts(path, given, pairs, empty=True) for path in arguments.inputs}
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    texts = [text for path in arguments.inputs for text in files[path]]
    kinds = {isinstance(found[0], str): path for path, found in files.items()}
    if len(kinds) > 1:
        raise UserError(f"{kinds[False]}: expected texts, as {kinds[True]} has, got pairs of sentences")
    if pairs is not None and pairs == isinstance(texts[0], str):
        raise UserError(
            f"{arguments.inputs[0]}: expected {said(pairs)}, of which {arguments.model} is a classifier, got {said(not pairs)}"
        )
    device = common.device_of(arguments.device)
    with common.interrupted(lambda: "nothing is kept: a file of labels is written when all texts have theirs"):
        model, tokenizer = common.load_classifier(arguments.model)
        logits = _logits(model.to(device), tokenizer, texts, arguments.batch_size)
    rows = _rows(model.config, logits)
    content = _tsv(rows) if output.suffix == ".tsv" else "".join(json.dumps(row) + "\n" for row in rows)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, content.encode())
    except OSError as error:
        raise UserError(f"output {output}: {error.strerror}") from error
    print(f"wrote {output}: {len(rows):,} rows")


def _takes_pairs(model: str) -> bool | None:
    """Whether the classifier labels pairs, by its folder's config.json; None where no command trained it, or there is no such
    folder, which who loads it says."""
    try:
        found = sources.config_of(Path(model), model).get("pairs")
    except sources.LoadError:
        return None
    return found if isinstance(found, bool) else None


def _logits(model: Any, tokenizer: Any, texts: list[Text], batch_size: int) -> torch.Tensor:
    """[S, labels] of all texts, float32 on the CPU."""
    found = torch.empty(len(texts), model.config.num_labels)
    batches = encoders.in_batches(encoders.longest_first(texts), batch_size)
    encoder, limit = model.model.encoder, tokenizer.model_max_length
    with torch.no_grad():
        for rows, inputs in encoders.token_batches(encoder, tokenizer, texts, batches, max_length=limit, progress=True):
            found[rows] = model(**inputs).logits.float().cpu()
    return found


def _rows(config: Any, logits: torch.Tensor) -> list[dict[str, Any]]:
    """A label and probabilities for each row; of a regression a number and no probabilities."""
    names = [config.id2label[number] for number in range(config.num_labels)]
    # transformers takes one that is not named from the labels' number.
    kind = config.problem_type or (NUMBERS if config.num_labels == 1 else CLASSES)
    if kind == CLASSES:
        labels: list[Any] = [names[best] for best in logits.argmax(dim=1)]
        values = logits.softmax(dim=1)
    elif kind == LABELS:
        labels = [[name for name, logit in zip(names, row, strict=True) if logit > 0] for row in logits.tolist()]
        values = logits.sigmoid()
    else:
        return [{"label": round(value, 6)} for value in logits[:, 0].tolist()]
    probabilities = [[round(value, 6) for value in row] for row in values.tolist()]
    return [
        {"label": label, "probabilities": dict(zip(names, row, strict=True))}
        for label, row in zip(labels, probabilities, strict=True)
    ]


def _tsv(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0].get("probabilities", {}))
    lines = ["\t".join(["label", *(f"p({name})" for name in names)])]
    for row in rows:
        label = ",".join(row["label"]) if isinstance(row["label"], list) else str(row["label"])
        lines.append("\t".join([label, *(str(value) for value in row.get("probabilities", {}).values())]))
    return "\n".join(lines) + "\n"

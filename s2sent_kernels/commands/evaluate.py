"""Score a selector, or the embeddings of a model that has one, beside the mean of the last block, the first-last average, a
scalar mix and cls, on STS files and on classification files: a table, evaluation.json and evaluation.png."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import waiting
from ..embedder import Embedder
from ..files import require
from ..formula.call import POOLINGS
from ..tools import columns, evaluation, labelled, mteb_tasks, pictures
from ..tools.baselines import ScalarMix
from . import common
from .common import UserError, positive

FILES = ("evaluation.json", "evaluation.png")
# Who scores, and which option asks for it: missing ones are told before anything is encoded.
_LIBRARIES = (
    ("scipy.stats", "scipy", "evaluate", "sts"),
    ("sklearn.linear_model", "scikit-learn", "evaluate", "transfer"),
    ("mteb", "mteb", "mteb", "mteb"),
)


def add(commands: Any) -> None:
    about = "score embeddings on STS and classification files, beside other poolings"
    command = commands.add_parser("evaluate", help=about, description=__doc__)
    data = command.add_argument_group("data")
    model = command.add_argument_group("model")
    run = command.add_argument_group("run")
    model.add_argument(
        "--model",
        help="path, hub id or shipped name of an encoder, or folder of encoder and selector (default: all-MiniLM-L6-v2, bundled)",
    )
    model.add_argument("--selector", help="folder or shipped name (default: that of the model's shipped name)")
    data.add_argument(
        "--sts",
        type=common.path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help=".tsv, .csv, .jsonl or .parquet with columns score, sentence1, sentence2 and optionally split (default: none)",
    )
    data.add_argument(
        "--transfer",
        type=common.path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="with columns label, text or sentence1 and sentence2, and optionally split: train and test, or all (default: none)",
    )
    data.add_argument(
        "--mteb",
        nargs="+",
        action="extend",
        default=[],
        metavar="TASK",
        help="tasks of mteb; needs a network (default: none)",
    )
    data.add_argument("--split", help="split of STS files (default: test; all rows of a file without the column)")
    model.add_argument("--pooling", choices=POOLINGS, help="of the selector (default: what it was trained for)")
    model.add_argument("--max-length", type=positive, help="tokens at most (default: the model's)")
    run.add_argument("--batch-size", type=positive, default=128, help="texts at once (default: 128)")
    data.add_argument(
        "--columns",
        metavar="WHAT=COLUMN,...",
        help="other names that the files have for their columns: sentence1=query.text,score=similarity (default: their own)",
    )
    common.add_format(data)
    common.add_device(run)
    run.add_argument(
        "--output-dir", type=common.path, default="evaluation", help="where results go (default: ./evaluation)"
    )
    common.add_force(run)


def _named(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Each file with its name in the table: without folder and suffix, unless two files would share that name."""
    stems = [Path(path).stem for path in paths]
    names = [stem if stems.count(stem) == 1 else path for stem, path in zip(stems, paths, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name}: expected each file once, got it {names.count(name)} times")
    return list(zip(names, paths, strict=True))


SCORED = (*labelled.SCORED, "subset")  # columns of an STS file


class _Files(NamedTuple):
    """The data to score on, by name in the table."""

    sts: dict[str, list[evaluation.Pair]]
    transfer: dict[str, tuple[str, dict[str, list[evaluation.Labelled]]]]  # path and splits
    split: str | None  # of ``sts``; None where no file of them has any


def run(arguments: argparse.Namespace) -> None:
    if not (arguments.sts or arguments.transfer or arguments.mteb):
        raise UserError("expected files or tasks to score on: --sts, --transfer or --mteb")
    directory = Path(arguments.output_dir)
    common.check_writable(directory)
    require("matplotlib.figure", "matplotlib", "demo")
    try:
        common.check_format(arguments.format, [*arguments.sts, *arguments.transfer])
        files = _read(arguments)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    common.check_new((directory / name for name in FILES), arguments.force)
    common.device_of(arguments.device)
    for module, package, extra, wanted in _LIBRARIES:
        if getattr(arguments, wanted):
            require(module, package, extra)
    source = common.resolve(arguments.model, arguments.selector, required=False)
    if source.whole and arguments.pooling is not None:
        raise UserError(f"--pooling: expected none beside --model {source.model}, which has its own")
    limits = {"max_length": arguments.max_length, "batch_size": arguments.batch_size}
    embed, model = _embedder(source, arguments.device, arguments.pooling, limits)
    content: dict[str, Any] = {"model": model, "selector": source.selector, "split": files.split}
    content["examples"] = _examples(files)
    try:
        content |= _scores(embed, files)
        if arguments.mteb:
            content["mteb"] = mteb_tasks.run(arguments.mteb, embed)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    print(table(content))
    # Identical embeddings have no correlation: NaN, which JSON cannot represent.
    valid = json.loads(json.dumps(content), parse_constant=lambda _: None)
    common.write_files(
        directory,
        {
            "evaluation.json": (json.dumps(valid, indent=1) + "\n").encode(),
            "evaluation.png": _draw(content),
        },
    )


def _examples(files: _Files) -> dict[str, int]:
    """How many examples each score is of: a split's pairs, or the texts that a classifier was tested on."""
    scored = {task: len(pairs) for task, pairs in files.sts.items()}
    return scored | {task: len(splits.get("all") or splits["test"]) for task, (_, splits) in files.transfer.items()}


def _draw(content: Mapping[str, Any]) -> bytes:
    """evaluation.png: under each task its measure and how many examples it has."""
    counts = content["examples"]
    about = {task: f"Spearman\n{counts[task]} pairs" for task in content["sts"]}
    about |= {task: f"accuracy\n{counts[task]} examples" for task in content["transfer"]}
    about |= dict.fromkeys(content.get("mteb", ()), "mteb's main score")
    selector = "" if content["selector"] is None else f"; selector {content['selector']}"
    with common.warnings_in_lines():
        return pictures.scores_picture(_columns(content), f"{content['model']}{selector}", about)


def _read(arguments: argparse.Namespace) -> _Files:
    sts, transfer = arguments.sts, arguments.transfer
    known = dict.fromkeys([*(SCORED if sts else ()), *(labelled.LABELLED if transfer else ())])
    if arguments.columns is not None and not known:
        raise ValueError(
            f"--columns: expected --sts or --transfer, whose columns it names, got {arguments.columns!r} beside --mteb alone"
        )
    chosen = {} if arguments.columns is None else columns.parse(arguments.columns, known)

    def of(tell: Callable[[str], None], own: Sequence[str]) -> columns.Columns:
        """Those of a file: one of STS has no label."""
        named = {what: name for what, name in chosen.items() if what in own}
        return columns.Columns(named, tell=tell, format=arguments.format, judged=False)

    named, unsplit = _named([*sts, *transfer]), []

    def tell(line: str) -> None:
        unsplit.append(line)
        waiting.say(line)

    scored = {task: evaluation.read_sts(path, arguments.split, of(tell, SCORED)) for task, path in named[: len(sts)]}
    split = None if len(unsplit) == len(sts) else arguments.split or "test"
    classes = of(tell, labelled.LABELLED)
    labels = {task: (path, evaluation.read_transfer(path, classes)) for task, path in named[len(sts) :]}
    return _Files(scored, labels, split)


def _embedder(
    source: common.Source, device_name: str | None, pooling: str | None, limits: Mapping[str, Any]
) -> tuple[evaluation.Embed, str]:
    """A function from texts to embeddings by every pooling, and the model's name. A folder with its own selector gives the
    embeddings of the whole model."""
    limit = common.within(limits["max_length"], common.limit_of(source))  # before anything is loaded
    trained = None if source.selector is None else common.read_selector(source.selector)
    device = common.device_of(device_name)
    encoder: Any
    whole: Embedder | None = None
    if source.model is not None and source.whole:
        try:
            with waiting.told(f"loading {source.model}"):
                whole = Embedder.from_pretrained(source.model, None, "float32", device, max_length=limits["max_length"])
            limit = common.within(limit, whole.max_length)
        except ValueError as error:
            raise UserError(common.of_option(str(error))) from error
        encoder, tokenizer, model = whole.encoder, whole.tokenizer, source.model
    else:
        encoder, tokenizer, model = common.load_model(source.model, device)
    limits = {**limits, "max_length": limit}
    modules = {} if trained is None else _modules(trained, encoder, device)
    if trained is not None and pooling is None:
        pooling = trained.pooling

    def embed(texts: Sequence[str]) -> Mapping[str, Tensor]:
        found = evaluation.side_by_side(
            encoder, tokenizer, texts, modules, pooling=pooling or "mean", progress=True, **limits
        )
        if whole is not None:
            from ..tools.progress import Progress

            with Progress(len(texts)) as progress:
                embeddings = whole.encode(list(texts), progress=progress.advance)
            found[evaluation.S2SENT] = torch.from_numpy(embeddings)
        return found

    return embed, model


def _modules(trained: common.Trained, encoder: Any, device: torch.device) -> dict[str, evaluation.Fusion]:
    """The selector and, if its configuration has one, the scalar mix that was trained in the same way."""
    modules: dict[str, Any] = {evaluation.S2SENT: trained.selector}
    if "scalar_mix" in trained.config:
        try:
            modules[evaluation.SCALAR_MIX] = ScalarMix.of_weights(trained.config["scalar_mix"])
        except ValueError as error:
            raise UserError(f"selector {trained.name}: {error}") from error
    blocks = trained.blocks(encoder)
    return {name: evaluation.Fusion(module.to(device), blocks) for name, module in modules.items()}


def _scores(embed: evaluation.Embed, files: _Files) -> dict[str, Any]:
    sts, transfer = {}, {}
    for task, pairs in files.sts.items():
        sts[task] = {name: value._asdict() for name, value in evaluation.sts(embed, pairs).items()}
    for task, (path, splits) in files.transfer.items():
        try:
            accuracies = evaluation.transfer(embed, splits)
        except ValueError as error:  # scikit-learn's: too few texts, or a label that is too rare
            raise UserError(f"{path}: {error}") from error
        transfer[task] = {name: value._asdict() for name, value in accuracies.items()}
    return {"sts": sts, "transfer": transfer}


def _columns(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The main score of each pooling, by task."""
    columns = {}
    for section, key in (("sts", "spearman"), ("transfer", "accuracy"), ("mteb", "main_score")):
        for task, found in content.get(section, {}).items():
            columns[task] = {pooling: values[key] for pooling, values in found.items()}
    return columns


def table(content: Mapping[str, Any]) -> str:
    """A row per pooling, a column per task: Spearman/Pearson on STS, accuracy (and F1) on transfer. A line says which row there
    cannot be: a scalar mix whose weights nobody has trained."""
    cells: dict[str, dict[str, str]] = {}
    for task, found in content["sts"].items():
        for pooling, values in found.items():
            cells.setdefault(pooling, {})[task] = f"{values['spearman']:.2f}/{values['pearson']:.2f}"
    for task, found in content["transfer"].items():
        for pooling, values in found.items():
            f1 = "" if values["f1"] is None else f"/{values['f1']:.2f}"
            cells.setdefault(pooling, {})[task] = f"{values['accuracy']:.2f}{f1}"
    for task, found in content.get("mteb", {}).items():
        for pooling, values in found.items():
            cells.setdefault(pooling, {})[task] = f"{values['main_score']:.2f}"
    tasks = [*content["sts"], *content["transfer"], *content.get("mteb", {})]
    first = max(map(len, cells))
    widths = {task: max(len(task), *(len(row.get(task, "")) for row in cells.values())) for task in tasks}
    lines = [" " * first + "".join(f"  {task:>{widths[task]}}" for task in tasks)]
    for pooling, row in cells.items():
        lines.append(f"{pooling:<{first}}" + "".join(f"  {row.get(task, ''):>{widths[task]}}" for task in tasks))
    legend = ["STS: Spearman/Pearson"] if content["sts"] else []
    legend += ["classification: accuracy, with F1 of label 1 where labels are 0 and 1"] if content["transfer"] else []
    notes = ["; ".join(legend) + "; all times 100"] if legend else []
    if evaluation.S2SENT in cells and evaluation.SCALAR_MIX not in cells:
        notes.append(
            f"no row {evaluation.SCALAR_MIX}: {content['selector'] or content['model']} has no weights of one, which "
            "s2sent train --freeze-encoder learns with --dev"
        )
    return "\n".join([*lines, *([""] if notes else []), *notes])

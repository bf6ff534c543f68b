"""Score a selector, or the embeddings of a model that has one, beside the mean of the last block, the first-last average, a
scalar mix and cls, on STS files and on classification files: a table, evaluation.json and evaluation.png."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import evaluation, mteb_tasks, pictures, pretrained
from ..formula.call import POOLINGS
from ..frozen import ScalarMix
from ..selector import S2SentSelector
from . import common
from .common import BUNDLED, UserError, positive


def add(commands: Any) -> None:
    about = "score embeddings on STS and classification files, beside other poolings"
    command = commands.add_parser("evaluate", help=about, description=__doc__)
    command.add_argument(
        "--model",
        help="path or hub id of an encoder, or folder of encoder and selector (default: all-MiniLM-L6-v2, bundled)",
    )
    command.add_argument("--selector", help="folder or shipped name (default: the shipped one of the default model)")
    command.add_argument(
        "--sts",
        type=common.path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="TSV with columns split, score, sentence1, sentence2",
    )
    command.add_argument(
        "--transfer", type=common.path, nargs="+", action="extend", default=[], metavar="FILE",
        help="TSV with columns split, label and text, or sentence1 and sentence2; splits train and test, or all",
    )  # fmt: skip
    command.add_argument(
        "--mteb", nargs="+", action="extend", default=[], metavar="TASK", help="tasks of mteb (needs a network)"
    )
    command.add_argument("--split", default="test", help="split of STS files (default: test)")
    command.add_argument("--pooling", choices=POOLINGS, help="of the selector (default: what it was trained for)")
    command.add_argument("--max-length", type=positive, default=256, help="tokens at most (default: 256)")
    command.add_argument("--batch-size", type=positive, default=128, help="texts at once (default: 128)")
    command.add_argument("--device", help="a torch device (default: cuda where there is one, else cpu)")
    command.add_argument(
        "--output-dir", type=common.path, default="evaluation", help="where results go (default: ./evaluation)"
    )
    command.set_defaults(run=run)


def _modules(name: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The selector, and the scalar mix that was trained like it where its folder says one; and what the folder says."""
    if name is None:
        return {}, {}
    config = pretrained.read_config(pretrained.find(name))
    modules: dict[str, Any] = {evaluation.S2SENT: S2SentSelector.from_pretrained(name)}
    if "scalar_mix" in config:
        modules[evaluation.SCALAR_MIX] = ScalarMix.of_weights(config["scalar_mix"])
    return modules, config


def _named(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Each file with its name in the table: without folder and suffix, unless another file's is the same."""
    stems = [Path(path).stem for path in paths]
    names = [stem if stems.count(stem) == 1 else path for stem, path in zip(stems, paths, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name}: expected each file once")
    return list(zip(names, paths, strict=True))


def run(arguments: argparse.Namespace) -> None:
    if not (arguments.sts or arguments.transfer or arguments.mteb):
        raise UserError("expected files or tasks to score on: --sts, --transfer or --mteb")
    directory = Path(arguments.output_dir)
    common.check_writable(directory)
    common.require("matplotlib.figure", "matplotlib")
    name = arguments.selector
    if name is None and arguments.model is None:
        name = BUNDLED
    try:
        files = _named([*arguments.sts, *arguments.transfer])
        count = len(arguments.sts)
        sts_files = [(task, evaluation.read_sts(path, arguments.split)) for task, path in files[:count]]
        transfer_files = [(task, path, evaluation.read_transfer(path)) for task, path in files[count:]]
        modules, config = _modules(name)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    device = common.device_of(arguments.device)
    pipeline = None if arguments.model is None else common.load_pipeline(arguments.model)
    if pipeline is None:
        encoder, tokenizer, model = common.load_model(arguments.model, device)
    else:
        for option in ("selector", "pooling"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--{option}: expected none beside --model {arguments.model}, which has its own")
        whole, encoder, model = pipeline[0].to(device), pipeline[1], arguments.model
        whole.max_seq_length = min(whole.max_seq_length, arguments.max_length)
        tokenizer = whole.tokenizer
    try:
        reads = {key: pretrained.blocks_of(config, encoder) for key in modules}
    except ValueError as error:
        raise UserError(str(error)) from error
    modules = {key: module.to(device) for key, module in modules.items()}
    pooling = arguments.pooling or config.get("pooling", "mean")

    def embed(texts: Sequence[str]) -> Mapping[str, Tensor]:
        found = evaluation.side_by_side(
            encoder, tokenizer, texts, modules, reads=reads, pooling=pooling, max_length=arguments.max_length,
            batch_size=arguments.batch_size, progress=True,
        )  # fmt: skip
        if pipeline is not None:
            own = whole.encode(
                list(texts), batch_size=arguments.batch_size, show_progress_bar=True, convert_to_tensor=True
            )
            found[evaluation.S2SENT] = own.float().cpu()
        return found

    content: dict[str, Any] = {"model": model, "selector": name, "split": arguments.split, "sts": {}, "transfer": {}}
    try:
        for task, pairs in sts_files:
            found = evaluation.sts(embed, pairs)
            content["sts"][task] = {key: value._asdict() for key, value in found.items()}
        for task, path, splits in transfer_files:
            try:
                accuracies = evaluation.transfer(embed, splits)
            except ValueError as error:  # scikit-learn's, of too few texts or of a label that is too rare
                raise UserError(f"{path}: {error}") from error
            content["transfer"][task] = {key: value._asdict() for key, value in accuracies.items()}
        if arguments.mteb:
            content["mteb"] = mteb_tasks.run(arguments.mteb, embed)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    print(table(content))
    columns = _columns(content)
    # Embeddings that are all alike have no correlation: NaN, which JSON does not know.
    valid = json.loads(json.dumps(content), parse_constant=lambda _: None)
    common.write_files(
        directory,
        {
            "evaluation.json": (json.dumps(valid, indent=1) + "\n").encode(),
            "evaluation.png": pictures.scores_picture(columns, f"{model}: Spearman or accuracy, times 100"),
        },
    )


def _columns(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each task each pooling's main score."""
    columns = {}
    for section, key in (("sts", "spearman"), ("transfer", "accuracy"), ("mteb", "main_score")):
        for task, found in content.get(section, {}).items():
            columns[task] = {pooling: values[key] for pooling, values in found.items()}
    return columns


def table(content: Mapping[str, Any]) -> str:
    """Poolings downwards, tasks to the right: Spearman/Pearson of STS, accuracy (and F1) of transfer."""
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
    return "\n".join([*lines, *(["", "; ".join(legend) + "; all times 100"] if legend else [])])

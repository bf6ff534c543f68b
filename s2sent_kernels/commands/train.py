"""Train a selector: contrastively, on triplets or pairs of sentences; on scored pairs (--task sts); or with a classifier's head,
on labelled texts or pairs (--task classification). With --freeze-encoder all but the encoder is trained, in seconds. Without,
plain sentences will do, too. The folder that is written is what `s2sent evaluate` takes, as --selector with a frozen encoder,
else as --model; a classifier's is what `s2sent predict` takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from .. import cache_files, files, frozen, frozen_tasks, model_kinds, waiting
from ..files import disk_is_full
from ..formula.call import POOLINGS
from ..tools import processes, recipe
from ..tools.problems import CLASSES, PROBLEMS
from ..tools.recipe import GATE_SCALE
from ..tools.tables import STDIN, WrongColumns
from . import common, train_classifier, train_finished, train_pairs
from .common import UserError, positive
from .train_task import CACHE, CLASSIFICATION, CONTRASTIVE, MAX_LENGTH, STS, TASKS, Stage, Task, another_task


class _Only(NamedTuple):
    """Which ways of training take an option."""

    tasks: tuple[str, ...] = TASKS
    frozen: bool | None = None  # None: with --freeze-encoder and without

    def said(self) -> str:
        """For the help."""
        tasks = [] if self.tasks == TASKS else [f"only with --task {' or '.join(self.tasks)}"]
        frozen = [] if self.frozen is None else [f"{'only with' if self.frozen else 'not with'} --freeze-encoder"]
        return ", ".join([*tasks, *frozen])


_ONLY = {
    "cache": _Only(frozen=True),
    "verify_cache": _Only(frozen=True),
    "selector_learning_rate": _Only(frozen=False),
    "accumulation": _Only(frozen=False),
    "mini_batch": _Only((CONTRASTIVE,), frozen=False),
    "precision": _Only(frozen=False),
    "report_to": _Only(frozen=False),
    "save_minutes": _Only(frozen=False),
    "temperature": _Only((CONTRASTIVE, STS)),
    "symmetric": _Only((CONTRASTIVE,), frozen=True),
    "widths": _Only((CONTRASTIVE,), frozen=True),
    "loss": _Only((STS,)),
    "problem_type": _Only((CLASSIFICATION,)),
    "dropout": _Only((CLASSIFICATION,)),
}
_SEVERAL = ("learning_rate", "seed", "dropout")  # values, with --freeze-encoder


def add(commands: Any) -> None:
    about = "train a selector, or a classifier, with its encoder or behind a frozen one"
    command = commands.add_parser("train", help=about, description=__doc__)
    command.add_argument(
        "--task", choices=TASKS, default=CONTRASTIVE, help="what the data says of its sentences (default: contrastive)"
    )
    command.add_argument("--freeze-encoder", action="store_true", help="train all but the encoder, from a cache")
    command.add_argument(
        "--output",
        type=common.path,
        required=True,
        metavar="FOLDER",
        help="where the result goes, a new folder or an empty one",
    )
    _add_data(command.add_argument_group("data"))
    _add_selector(command.add_argument_group("model"))
    _add_recipe(command.add_argument_group("recipe"))
    _add_run(command.add_argument_group("run"))
    common.say_modes(command, {name: only.said() for name, only in _ONLY.items()})


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data",
        type=common.path,
        required=True,
        metavar="FILE",
        help=".tsv, .csv, .jsonl, .parquet or .arrow, also .gz and .zst, a dataset on disk, or - (standard input), with columns "
        "anchor, positive and, optionally, negative or negative_1, negative_2, ..., or a list negatives; sts: score, sentence1, "
        "sentence2; classification: label and text, or sentence1 and sentence2; or sentences, one a line, as .txt: each its own "
        "positive under dropout",
    )
    group.add_argument(
        "--columns",
        metavar="WHAT=COLUMN,...",
        help="other names that --data has for these columns, dotted for fields within one: anchor=query,positive=doc.text "
        "(default: their own)",
    )
    group.add_argument(
        "--ignore-columns",
        metavar="COLUMN,...",
        help="columns of --data to leave out, though they look like training data (default: none)",
    )
    common.add_format(group)
    group.add_argument("--split", help="of --data, where it has a column split (default: train)")
    group.add_argument(
        "--dev",
        type=common.path,
        metavar="FILE",
        help="scored pairs (score, sentence1, sentence2), or for a classifier a table like --data: chooses the epoch and among "
        "what is tried (default: none; for a classifier a tenth of --data is held out)",
    )
    group.add_argument("--dev-split", help="its split, where it has a column split (default: dev)")
    group.add_argument(
        "--problem-type", choices=PROBLEMS, help=f"of a classifier, in transformers' words (default: {CLASSES})"
    )


def _add_selector(group: Any) -> None:
    group.add_argument(
        "--model",
        help="path or hub id of an encoder (default: all-MiniLM-L6-v2, bundled); of a SentenceTransformer with a selector the "
        "encoder alone, with a new selector",
    )
    group.add_argument(
        "--blocks", type=common.blocks, metavar=common.BLOCKS, help="blocks to fuse, 0 the lowest (default: all)"
    )
    group.add_argument("--bottleneck", type=positive, help="H (default: D / 12)")
    group.add_argument("--frequencies", type=positive, default=4, help="M (default: 4)")
    group.add_argument("--no-prior", action="store_true", help="without block prior: the paper's formula")
    scale = group.add_mutually_exclusive_group()
    scale.add_argument(
        "--gate-scale",
        type=float,
        metavar="NUMBER",
        help=f"where the learned factor of the gate's logits starts (default: {GATE_SCALE:g}; none with --no-prior)",
    )
    scale.add_argument("--no-gate-scale", action="store_true", help="without it: the paper's formula")
    group.add_argument("--no-norm", action="store_true", help="without batch norm in the gate")
    group.add_argument("--pooling", choices=POOLINGS, default="mean", help="default: mean")
    group.add_argument(
        "--max-length",
        type=positive,
        help=f"tokens at most (default: the encoder's, where its folder says, else {MAX_LENGTH})",
    )


def _add_recipe(group: Any) -> None:
    for name, kind, what in (
        ("--epochs", positive, "passes over the data"),
        ("--batch-size", positive, "examples a step, on each device"),
        ("--temperature", float, "of the contrastive loss and of CoSENT"),
    ):
        key = name[2:].replace("-", "_")
        group.add_argument(name, type=kind, help=f"{what} (default: {_defaults(key)})")
    group.add_argument("--loss", choices=recipe.LOSSES, help=f"default: {recipe.LOSSES[0]}")
    rates = ", ".join(f"{rate:g}" for rate in frozen_tasks.LEARNING_RATES)
    group.add_argument(
        "--learning-rate",
        type=float,
        nargs="+",
        help=f"of the encoder (default: {recipe.DEFAULT.learning_rate:g}); with --freeze-encoder, of the selector and the head: "
        f"of several each is tried (default: {frozen.DEFAULT.learning_rate:g}; of a classifier {rates})",
    )
    rate = recipe.DEFAULT.selector_learning_rate
    group.add_argument("--selector-learning-rate", type=float, help=f"of selector and head (default: {rate:g})")
    group.add_argument(
        "--prior-learning-rate",
        type=float,
        help=f"of block prior and gate scale (default: {frozen.DEFAULT.prior_learning_rate:g})",
    )
    dropouts = " ".join(f"{dropout:g}" for dropout in frozen_tasks.DROPOUTS)
    group.add_argument(
        "--dropout",
        type=float,
        nargs="+",
        help=f"of the embedding, before the head (default: {recipe.DROPOUT:g}; with --freeze-encoder {dropouts} are tried)",
    )
    group.add_argument(
        "--symmetric",
        action="store_const",
        const=True,
        help="each positive also against every anchor",
    )
    group.add_argument(
        "--widths",
        type=positive,
        nargs="+",
        metavar="FEATURES",
        help="numbers of first features that embeddings may be cut to, as by encode's --truncate-dim; the loss is the mean over "
        "these and all (default: all alone)",
    )
    group.add_argument(
        "--accumulation",
        type=positive,
        help="batches whose gradients are one step; an anchor has the negatives of its own batch alone (default: 1)",
    )
    group.add_argument(
        "--mini-batch",
        type=positive,
        help="examples that the encoder runs on at once, twice each: less memory for a --batch-size with the same negatives and "
        "gradients; needs --no-norm (default: the batch)",
    )
    group.add_argument("--precision", choices=recipe.PRECISIONS, help="autocast (default: float32)")
    group.add_argument(
        "--patience", type=positive, help="stop after so many epochs without a better score on --dev (default: never)"
    )
    group.add_argument(
        "--seed", type=common.seed, nargs="+", help="with --freeze-encoder, of several each is tried (default: 0)"
    )


def _add_run(group: Any) -> None:
    group.add_argument(
        "--resume",
        action="store_const",
        const=True,
        help="go on from the newest whole checkpoint in --output, if there is one; with --freeze-encoder from what is encoded, "
        "as without this option, but a finished result is left as it is",
    )
    group.add_argument(
        "--save-minutes",
        type=float,
        metavar="MINUTES",
        help="after which there is a checkpoint within an epoch, too, beside those at the ends of epochs; 0: never (default: "
        f"{recipe.DEFAULT.save_minutes:g})",
    )
    group.add_argument(
        "--report-to",
        choices=recipe.REPORTERS,
        help="tell the training to this library, too, without --freeze-encoder; history.jsonl is always written (default: none)",
    )
    group.add_argument("--cache", type=common.path, metavar="FOLDER", help=f"of f and p (default: ./{CACHE})")
    group.add_argument(
        "--verify-cache",
        action="store_const",
        const=True,
        help="compare a cache that is there with its checksums; reads all of it",
    )
    common.add_device(group)


def _defaults(key: str) -> str:
    """The values of a recipe's field, for the help."""
    tuned, of_pairs, of_scored = (getattr(one, key) for one in (recipe.DEFAULT, frozen.DEFAULT, frozen.SCORED))
    found = [] if of_pairs == tuned else [f"{of_pairs:g}"]
    found += [] if of_scored == of_pairs else [f"{of_scored:g} of scored pairs"]
    of_classifier = getattr(frozen_tasks.DEFAULT, key, of_pairs)
    found += [] if of_classifier == of_pairs else [f"{of_classifier:g} of a classifier"]
    return f"{tuned:g}" + (f"; with --freeze-encoder {', '.join(found)}" if found else "")


def run(arguments: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    task = Task(arguments.task, given, Path(arguments.output), Stage())
    _check_options(task)
    common.check_format(arguments.format, [arguments.data, *([] if arguments.dev is None else [arguments.dev])])
    if processes.count() > 1 and STDIN in (arguments.data, arguments.dev):
        raise UserError(f"{STDIN}: expected a file, which every process can read")
    common.check_writable(task.output)
    try:
        way = train_classifier if task.kind == CLASSIFICATION else train_pairs
        if "resume" in task.given and _is_finished(task, way):
            if processes.is_first():
                print(f"{task.output}: the model is finished")
            return
        _check_empty(task)
        _say_left_out(task)
        if task.frozen:  # the result is there whole or not at all, and no other process makes it
            with files.new_folder(task.output, alone=True) as whole, common.interrupted(_what_is_kept, task):
                way.run(task._replace(output=whole))
        else:
            with common.interrupted(_what_is_kept, task):
                way.run(task)
    except WrongColumns as error:
        raise UserError(another_task(error, task) or str(error)) from error
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    except Exception as error:
        place = getattr(error, "filename", None) or f"output folder {task.output}"
        if disk_is_full(error):  # also as safetensors and torch.save say it, which the trainer calls
            going_on = "; with room made, --resume goes on from the newest whole checkpoint, if there is one"
            raise UserError(f"{place}: no space left on its disk{'' if task.frozen else going_on}") from error
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{place}: {error.strerror or error}") from error
    if processes.is_first():
        print(f"wrote {task.output}")


def _say_left_out(task: Task) -> None:
    """What is in the folder of the encoder and not trained."""
    model = task.given.get("model")
    if processes.is_first() and common.leaves_selector(model):
        waiting.say(
            f"{model}: its encoder is taken, and its selector left out: a new one is trained; to go on with both, train what "
            "s2sent_kernels.sentence_transformers.load returns, as any SentenceTransformer"
        )


def _check_options(task: Task) -> None:
    """No option is taken and ignored."""
    for name, only in _ONLY.items():
        option = common.option(name)
        if name not in task.given:
            continue
        if only.frozen is not None and only.frozen != task.frozen:
            raise UserError(f"{option}: {'not' if task.frozen else 'only'} with --freeze-encoder")
        if task.kind not in only.tasks:
            raise UserError(f"{option}: not with --task {task.kind}")
    if "patience" in task.given and "dev" not in task.given and task.kind != CLASSIFICATION:
        raise UserError("--patience: expected --dev, whose score it waits for")
    if "report_to" in task.given:
        try:
            files.require(task.given["report_to"], task.given["report_to"], None)
        except ImportError as error:
            raise UserError(f"--report-to: {error}") from error
    for name in _SEVERAL:
        if not task.frozen and len(task.several(name) or ()) > 1:
            raise UserError(f"{common.option(name)}: several values only with --freeze-encoder")
    if "mini_batch" in task.given and not task.given["no_norm"]:
        raise UserError(
            "--mini-batch: expected --no-norm beside it: batch norm would normalise each mini-batch by its own"
        )
    if "prior_learning_rate" in task.given and task.given["no_prior"] and "gate_scale" not in task.given:
        raise UserError("--prior-learning-rate: not with --no-prior, unless with --gate-scale")
    if task.given.get("loss") == "cosine" and "temperature" in task.given:
        raise UserError("--temperature: not with --loss cosine")


def _check_empty(task: Task) -> None:
    """Nothing in the output folder is overwritten: it may be the encoder."""
    output = task.output
    if task.frozen:
        if output.is_dir():
            # Of a killed process, where the folder itself cannot be replaced.
            files.sweep(output, output.resolve().name)
        cache, real = Path(task.cache).resolve(), output.resolve()
        if cache == real or cache in real.parents or real in cache.parents:
            raise UserError(f"output folder {output}: expected one apart from the cache's, {task.cache}")
    found = list(output.iterdir()) if output.is_dir() else []
    advice = ""
    if not task.frozen:
        from ..tools import resuming

        found = [path for path in found if path.name != resuming.CHECKPOINTS]
        if (output / resuming.CHECKPOINTS).is_dir():
            if "resume" in task.given and (not found or resuming.is_training(output)):
                return
            if not found and not resuming.begun(output):
                return  # before the first checkpoint nothing is lost
            found, advice = found or [output], "--resume goes on from a checkpoint in it"
    if found:
        raise common.taken(output, advice or common.EMPTIED)


def _what_is_kept(task: Task) -> str:
    """Of a training that was interrupted."""
    if task.frozen:  # the encoder's work, by far the longest, is kept; how much of it the cache has said
        if task.stage.encoded:
            what = f"all texts are encoded and kept in {task.cache}: the same command begins with the first epoch"
        elif cache_files.kept(Path(task.cache)):
            what = f"the same command goes on after what is encoded and kept in {task.cache}"
        else:
            return "nothing is encoded yet: the same command begins anew"
        return f"{what}, with --resume or without"
    from ..tools import resuming

    if resuming.begun(task.output):
        return f"the checkpoints in {task.output} are kept: the same command with --resume goes on from the newest"
    minutes = task.given.get("save_minutes", recipe.DEFAULT.save_minutes)
    within = f" after {minutes:g} minutes, or" if minutes else ""
    return f"nothing is kept: the first checkpoint is written{within} at the end of an epoch"


def _check_kind(task: Task) -> None:
    """What is finished is of the kind that was asked for."""
    selector = model_kinds.SELECTOR if task.frozen else model_kinds.WHOLE
    wanted = model_kinds.CLASSIFIER if task.kind == CLASSIFICATION else selector
    found = model_kinds.held(task.output)
    if found != wanted:
        raise UserError(f"output folder {task.output}: expected {wanted}, got {found}: name another")


def _is_finished(task: Task, way: Any) -> bool:
    """Whether there is nothing left to do but to remove checkpoints: a model is never trained again unasked.

    Args:
        way: the module that trains.
    """
    from ..tools import resuming

    last = resuming.OF_CLASSIFIER if task.kind == CLASSIFICATION else resuming.OF_MODEL
    if not (resuming.finished_frozen(task.output) if task.frozen else resuming.finished(task.output, last)):
        return False
    _check_kind(task)
    if others := train_finished.differences(task, way.used):
        raise UserError(
            f"--resume: {task.output} holds a finished result, made with {'; '.join(others)}: name another --output, or give "
            "what it was made with"
        )
    return task.frozen or resuming.remove_leftovers(task.output, last)

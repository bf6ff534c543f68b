"""Train a selector on triplets or pairs of sentences, contrastively; without --freeze-encoder the encoder too, and then on plain
sentences if need be. The folder that is written is what `s2sent evaluate` takes: as --selector with a frozen encoder, else as
--model.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import cache, families, frozen
from ..formula.call import POOLINGS
from ..selector import S2SentSelector
from ..tools import evaluation, recipe
from ..tools.examples import Examples, read_examples
from . import common
from .common import UserError, positive

_FROZEN_ONLY = ("cache",)
_TUNED_ONLY = ("selector_learning_rate", "accumulation", "precision", "patience", "resume")


def add(commands: Any) -> None:
    about = "train a selector, with its encoder or behind a frozen one"
    command = commands.add_parser("train", help=about, description=__doc__)
    command.add_argument(
        "--data",
        type=common.path,
        required=True,
        metavar="FILE",
        help="columns anchor, positive and, optionally, negative or negative_1, negative_2, ... as .tsv, .csv, .jsonl or "
        ".parquet; or sentences, one a line, as .txt: each its own positive under dropout",
    )
    command.add_argument(
        "--output",
        type=common.path,
        required=True,
        metavar="FOLDER",
        help="where the result goes, a new folder or an empty one",
    )
    command.add_argument("--freeze-encoder", action="store_true", help="train the selector alone, from a cache")
    command.add_argument("--model", help="path or hub id of an encoder (default: all-MiniLM-L6-v2, bundled)")
    command.add_argument(
        "--dev",
        type=common.path,
        metavar="FILE",
        help="STS file (split, score, sentence1, sentence2): chooses the epoch",
    )
    command.add_argument("--dev-split", default="dev", help="its split (default: dev)")
    command.add_argument("--blocks", default=None, metavar="last:N", help="blocks to fuse (default: all)")
    command.add_argument("--bottleneck", type=positive, help="H (default: D / 12)")
    command.add_argument("--frequencies", type=positive, default=4, help="M (default: 4)")
    command.add_argument("--no-prior", action="store_true", help="without block prior: the paper's formula")
    command.add_argument("--no-norm", action="store_true", help="without batch norm in the gate")
    command.add_argument("--pooling", choices=POOLINGS, default="mean", help="default: mean")
    for name, kind, what in (
        ("--epochs", positive, "passes over the data"),
        ("--batch-size", positive, "examples a step, on each device"),
        ("--temperature", float, "of the contrastive loss"),
        ("--learning-rate", float, "of the encoder; with --freeze-encoder, of the selector"),
    ):
        key = name[2:].replace("-", "_")
        frozen_default, tuned = getattr(frozen.DEFAULT, key), getattr(recipe.DEFAULT, key)
        both = (
            f"{frozen_default:g}" if frozen_default == tuned else f"{tuned:g}; {frozen_default:g} with --freeze-encoder"
        )
        command.add_argument(name, type=kind, help=f"{what} (default: {both})")
    rate = recipe.DEFAULT.selector_learning_rate
    command.add_argument("--selector-learning-rate", type=float, help=f"default: {rate:g}")
    command.add_argument("--prior-learning-rate", type=float, help=f"default: {frozen.DEFAULT.prior_learning_rate:g}")
    command.add_argument("--accumulation", type=positive, help="batches that are one step (default: 1)")
    command.add_argument("--precision", choices=recipe.PRECISIONS, help="autocast (default: float32)")
    command.add_argument("--patience", type=positive, help="stop after so many epochs without a better --dev")
    command.add_argument(
        "--resume", action="store_const", const=True, help="go on from the last checkpoint in --output"
    )
    command.add_argument("--seed", type=common.seed, default=0, help="default: 0")
    command.add_argument("--max-length", type=positive, default=256, help="tokens at most (default: 256)")
    command.add_argument(
        "--cache",
        type=common.path,
        metavar="FOLDER",
        help="of f and p, with --freeze-encoder (default: ./s2sent_cache)",
    )
    common.add_device(command)


class _Task(NamedTuple):
    """The options that both ways of training share."""

    data: str
    dev: list[evaluation.Pair] | None
    output: Path
    model: str | None
    device: str | None
    max_length: int
    blocks: str | None
    pooling: str
    selector: Mapping[str, Any]  # arguments of S2SentSelector; "bottleneck" may be None
    recipe: Mapping[str, Any]  # the given fields of a Recipe

    def selector_arguments(self, size: int) -> dict[str, Any]:
        return {**self.selector, "bottleneck": self.selector["bottleneck"] or max(1, size // 12)}


def run(arguments: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    for name in _TUNED_ONLY if arguments.freeze_encoder else _FROZEN_ONLY:
        if name in given:
            word = "not with" if arguments.freeze_encoder else "only with"
            raise UserError(f"--{name.replace('_', '-')}: {word} --freeze-encoder")
    output = Path(arguments.output)
    common.check_writable(output)
    fields = frozen.Recipe._fields if arguments.freeze_encoder else recipe.Recipe._fields
    try:
        _check_empty(output, arguments.freeze_encoder, bool(arguments.resume))
        examples = read_examples(arguments.data)
        task = _Task(
            data=arguments.data,
            dev=None if arguments.dev is None else evaluation.read_sts(arguments.dev, arguments.dev_split),
            output=output,
            model=arguments.model,
            device=arguments.device,
            max_length=arguments.max_length,
            blocks=arguments.blocks,
            pooling=arguments.pooling,
            selector={
                "bottleneck": arguments.bottleneck,
                "frequencies": arguments.frequencies,
                "gate_norm": None if arguments.no_norm else "batch",
                "block_prior": not arguments.no_prior,
            },
            recipe={name: given[name] for name in fields if name in given},
        )
        if arguments.freeze_encoder:
            _train_frozen(task, examples, arguments.cache or "s2sent_cache")
        else:
            _fine_tune(task, examples, bool(arguments.resume))
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        place = error.filename or f"output folder {output}"
        raise UserError(f"{place}: {error.strerror or error}") from error
    if _is_first_process():
        print(f"wrote {output}")


def _is_first_process() -> bool:
    """Of the processes that torchrun started, the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def _check_empty(output: Path, freeze_encoder: bool, resume: bool) -> None:
    """Nothing in the output folder is overwritten: it may be the encoder."""
    found = list(output.iterdir()) if output.is_dir() else []
    if not found or resume:
        return
    advice = ""
    if not freeze_encoder:
        from ..tools import training

        if found == [output / training.CHECKPOINTS] and training.last_checkpoint(found[0]) is None:
            return  # left by a run that was interrupted before its first checkpoint
        advice = "; --resume goes on from a checkpoint in it"
    raise UserError(f"output folder {output}: it is not empty{advice}")


def _fine_tune(task: _Task, examples: Examples, resume: bool) -> None:
    from ..sentence_transformers import S2SentPooling, SentenceTransformer
    from ..tools import training

    device = common.device_of(task.device)
    transformer = common.load_transformer(task.model, task.max_length)
    settings = recipe.DEFAULT._replace(**task.recipe)
    torch.manual_seed(settings.seed)
    pooling = S2SentPooling.behind(
        transformer,
        task.blocks,
        pooling=task.pooling,
        **task.selector_arguments(transformer.get_embedding_dimension()),
    )
    model = SentenceTransformer(modules=[transformer, pooling], device=str(device))
    pairs = None
    if task.dev is not None:
        pairs = (
            [pair.sentence1 for pair in task.dev],
            [pair.sentence2 for pair in task.dev],
            [pair.score for pair in task.dev],
        )
    score = training.fine_tune(model, examples, task.output, settings, dev=pairs, resume=resume)
    if score is not None and _is_first_process():
        print(f"dev {score:.2f}, the best epoch's")


def _train_frozen(task: _Task, examples: Examples, folder: str) -> None:
    if not examples.supervised:
        raise UserError(f"{task.data}: --freeze-encoder needs pairs: without dropout a sentence is its own copy")
    common.check_writable(Path(folder))
    device = common.device_of(task.device)
    encoder, tokenizer, name = common.load_model(task.model, device)
    blocks = families.indices(task.blocks, len(families.find_blocks(encoder)))
    size = encoder.config.hidden_size
    settings = frozen.DEFAULT._replace(**task.recipe)
    torch.manual_seed(settings.seed)
    selector = S2SentSelector(size, len(blocks), **task.selector_arguments(size)).to(device)
    history = frozen.fit(
        encoder,
        tokenizer,
        selector,
        examples.rows,
        folder=folder,
        dev=None if task.dev is None else [(pair.sentence1, pair.sentence2, pair.score) for pair in task.dev],
        recipe=settings,
        settings=cache.DEFAULT._replace(
            blocks=blocks,
            pooling=task.pooling,
            max_length=task.max_length,
            token_frequencies=frozen.token_frequencies(selector),
        ),
        progress=True,
    )
    for epoch, loss in enumerate(history.losses, 1):
        score = f", dev {history.scores[epoch]:.2f}" if history.scores else ""
        print(f"epoch {epoch}: loss {loss:.4f}{score}{', kept' if epoch == history.kept else ''}")
    about = {
        "encoder": name,
        "blocks": list(blocks),
        "pooling": task.pooling,
        "max_length": task.max_length,
        "recipe": settings._asdict(),
        "triplets": len(examples.rows),
        "epoch": history.kept,
    }
    selector.save_pretrained(task.output, about=about)

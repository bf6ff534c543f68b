"""Train a selector on triplets or pairs of sentences, contrastively; without --freeze-encoder the encoder too, and then on plain
sentences if need be. The folder that is written is what `s2sent evaluate` takes: as --selector with a frozen encoder, else as
--model.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from .. import cache, evaluation, families, frozen, pretrained
from ..examples import Examples, read_examples
from ..formula.call import POOLINGS
from ..selector import S2SentSelector
from . import common
from .common import UserError, positive

SETTINGS = cache.DEFAULT
_FROZEN_ONLY = ("cache",)
_TUNED_ONLY = ("selector_learning_rate", "accumulation", "precision", "patience", "resume")
_PRECISIONS = ("float32", "bfloat16", "float16")


def add(commands: Any) -> None:
    about = "train a selector, with its encoder or behind a frozen one"
    command = commands.add_parser("train", help=about, description=__doc__)
    command.add_argument(
        "--data", type=common.path, required=True, metavar="FILE",
        help="columns anchor, positive and, optionally, negative or negative_1, negative_2, ... as .tsv, .csv, .jsonl or "
        ".parquet; or sentences, one a line, as .txt: each its own positive under dropout",
    )  # fmt: skip
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
        frozen_default, tuned = getattr(frozen.DEFAULT, key), _TUNED[key]
        both = (
            f"{frozen_default:g}" if frozen_default == tuned else f"{tuned:g}; {frozen_default:g} with --freeze-encoder"
        )
        command.add_argument(name, type=kind, help=f"{what} (default: {both})")
    command.add_argument("--selector-learning-rate", type=float, help=f"default: {_TUNED['selector_learning_rate']:g}")
    command.add_argument("--prior-learning-rate", type=float, help=f"default: {frozen.DEFAULT.prior_learning_rate:g}")
    command.add_argument("--accumulation", type=positive, help="batches that are one step (default: 1)")
    command.add_argument("--precision", choices=_PRECISIONS, help="autocast (default: float32)")
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
    command.add_argument("--device", help="a torch device (default: cuda where there is one, else cpu)")
    command.set_defaults(run=run)


# As training.Recipe's, which cannot be imported without its extra; a test holds them together.
_TUNED: dict[str, Any] = {
    "epochs": 3, "batch_size": 64, "temperature": 0.05, "learning_rate": 3e-5, "selector_learning_rate": 1e-3,
}  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    others = _TUNED_ONLY if arguments.freeze_encoder else _FROZEN_ONLY
    for name in others:
        if getattr(arguments, name) is not None:
            word = "not with" if arguments.freeze_encoder else "only with"
            raise UserError(f"--{name.replace('_', '-')}: {word} --freeze-encoder")
    common.check_writable(Path(arguments.output))
    try:
        _check_empty(arguments)
        examples = read_examples(arguments.data)
        dev = None if arguments.dev is None else evaluation.read_sts(arguments.dev, arguments.dev_split)
        (_train_frozen if arguments.freeze_encoder else _fine_tune)(arguments, examples, dev)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        place = error.filename or f"output folder {arguments.output}"
        raise UserError(f"{place}: {error.strerror or error}") from error
    if _is_first_process():
        print(f"wrote {arguments.output}")


def _is_first_process() -> bool:
    """Of those that torchrun started: the one that wrote, and that speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def _check_empty(arguments: argparse.Namespace) -> None:
    """What stands in the output folder is not written over: it may be the encoder."""
    output = Path(arguments.output)
    found = list(output.iterdir()) if output.is_dir() else []
    if not found or arguments.resume:
        return
    advice = ""
    if not arguments.freeze_encoder:
        from .. import training

        if found == [output / training.CHECKPOINTS] and training.last_checkpoint(found[0]) is None:
            return  # of a run that was interrupted before its first
        advice = "; --resume goes on from a checkpoint in it"
    raise UserError(f"output folder {output}: it is not empty{advice}")


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _selector_arguments(arguments: argparse.Namespace, size: int) -> dict[str, Any]:
    return {
        "bottleneck": arguments.bottleneck or max(1, size // 12), "frequencies": arguments.frequencies,
        "gate_norm": None if arguments.no_norm else "batch", "block_prior": not arguments.no_prior,
    }  # fmt: skip


def _fine_tune(arguments: argparse.Namespace, examples: Examples, dev: list[evaluation.Pair] | None) -> None:
    from .. import training  # first, since it names the extra
    from ..sentence_transformers import S2SentPooling, SentenceTransformer

    output = Path(arguments.output)
    device = common.device_of(arguments.device)
    transformer = common.load_transformer(arguments.model, arguments.max_length)
    torch.manual_seed(arguments.seed)
    pooling = S2SentPooling.behind(
        transformer, arguments.blocks, pooling=arguments.pooling,
        **_selector_arguments(arguments, transformer.get_embedding_dimension()),
    )  # fmt: skip
    model = SentenceTransformer(modules=[transformer, pooling], device=str(device))
    recipe = training.Recipe(
        seed=arguments.seed,
        **_given(
            arguments, "epochs", "batch_size", "temperature", "learning_rate", "selector_learning_rate",
            "prior_learning_rate", "accumulation", "precision", "patience",
        ),
    )  # fmt: skip
    pairs = None
    if dev is not None:
        pairs = ([pair.sentence1 for pair in dev], [pair.sentence2 for pair in dev], [pair.score for pair in dev])
    score = training.fine_tune(model, examples, output, recipe, dev=pairs, resume=bool(arguments.resume))
    if score is not None and _is_first_process():
        print(f"dev {score:.2f}, the best epoch's")


def _train_frozen(arguments: argparse.Namespace, examples: Examples, dev: list[evaluation.Pair] | None) -> None:
    if not examples.supervised:
        raise UserError(f"{arguments.data}: --freeze-encoder needs pairs: without dropout a sentence is its own copy")
    folder = arguments.cache or "s2sent_cache"
    common.check_writable(Path(folder))
    device = common.device_of(arguments.device)
    encoder, tokenizer, name = common.load_model(arguments.model, device)
    blocks = families.indices(arguments.blocks, len(families.find_blocks(encoder)))
    size = encoder.config.hidden_size
    torch.manual_seed(arguments.seed)
    selector = S2SentSelector(size, len(blocks), **_selector_arguments(arguments, size)).to(device)
    recipe = frozen.DEFAULT._replace(
        seed=arguments.seed,
        **_given(arguments, "epochs", "batch_size", "temperature", "learning_rate", "prior_learning_rate"),
    )
    settings = SETTINGS._replace(
        blocks=blocks, pooling=arguments.pooling, max_length=arguments.max_length,
        token_frequencies=frozen.token_frequencies(selector),
    )  # fmt: skip
    history = frozen.fit(
        encoder, tokenizer, selector, examples.rows, folder=folder, recipe=recipe, settings=settings, progress=True,
        dev=None if dev is None else [(pair.sentence1, pair.sentence2, pair.score) for pair in dev],
    )  # fmt: skip
    for epoch, loss in enumerate(history.losses, 1):
        score = f", dev {history.scores[epoch]:.2f}" if history.scores else ""
        print(f"epoch {epoch}: loss {loss:.4f}{score}{', kept' if epoch == history.kept else ''}")
    about = {
        "encoder": name, "blocks": list(blocks), "pooling": arguments.pooling, "max_length": arguments.max_length,
        "recipe": recipe._asdict(), "triplets": len(examples.rows), "epoch": history.kept,
    }  # fmt: skip
    pretrained.save(selector, arguments.output, about)

"""Train a selector on triplets or pairs of sentences. With --freeze-encoder the encoder runs once over the texts, into a cache,
and the selector is trained from it in seconds; the folder that is written is what `s2sent evaluate --selector` takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from .. import cache, evaluation, families, frozen, pretrained
from ..selector import S2SentSelector
from ..tables import read_table
from ..tokens import POOLINGS
from . import common
from .common import UserError, positive

RECIPE, SETTINGS = frozen.DEFAULT, cache.DEFAULT


def add(commands: Any) -> None:
    about = "train a selector, contrastively"
    command = commands.add_parser("train", help=about, description=__doc__)
    command.add_argument(
        "--data", required=True, metavar="FILE", help="TSV with columns anchor, positive and, optionally, negative"
    )
    command.add_argument("--output", required=True, metavar="FOLDER", help="where the selector goes")
    command.add_argument("--freeze-encoder", action="store_true", help="train the selector alone, from a cache")
    command.add_argument("--model", help="path or hub id of an encoder (default: all-MiniLM-L6-v2, bundled)")
    command.add_argument(
        "--dev", metavar="FILE", help="STS file (split, score, sentence1, sentence2): chooses the epoch"
    )
    command.add_argument("--dev-split", default="dev", help="its split (default: dev)")
    command.add_argument("--blocks", default=None, metavar="last:N", help="blocks to fuse (default: all)")
    command.add_argument("--bottleneck", type=positive, help="H (default: D / 12)")
    command.add_argument("--frequencies", type=positive, default=4, help="M (default: 4)")
    command.add_argument("--no-prior", action="store_true", help="without block prior: the paper's formula")
    command.add_argument("--no-norm", action="store_true", help="without batch norm in the gate")
    command.add_argument("--pooling", choices=POOLINGS, default="mean", help="default: mean")
    command.add_argument("--epochs", type=positive, default=RECIPE.epochs, help=f"default: {RECIPE.epochs}")
    command.add_argument("--batch-size", type=positive, default=RECIPE.batch_size, help=f"default: {RECIPE.batch_size}")
    command.add_argument(
        "--temperature", type=float, default=RECIPE.temperature, help=f"default: {RECIPE.temperature:g}"
    )
    command.add_argument(
        "--learning-rate", type=float, default=RECIPE.learning_rate, help=f"default: {RECIPE.learning_rate:g}"
    )
    command.add_argument(
        "--prior-learning-rate", type=float, default=RECIPE.prior_learning_rate,
        help=f"default: {RECIPE.prior_learning_rate:g}",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=0, help="default: 0")
    command.add_argument("--max-length", type=positive, default=256, help="tokens at most (default: 256)")
    command.add_argument(
        "--cache", metavar="FOLDER", default="s2sent_cache", help="of f and p (default: ./s2sent_cache)"
    )
    command.add_argument("--device", help="a torch device (default: cuda where there is one, else cpu)")
    command.set_defaults(run=run)


def read_triplets(path: str | Path) -> list[tuple[str, str, str | None]]:
    """(anchor, positive, negative or None) of a TSV file; an empty negative is none.

    Raises:
        ValueError: as ``read_table``; an anchor or a positive is empty.
    """
    found = []
    for line, row in read_table(path, ("anchor", "positive")):
        if not row["anchor"].strip() or not row["positive"].strip():
            raise ValueError(f"{path}: line {line}: expected an anchor and a positive, got an empty field")
        found.append((row["anchor"], row["positive"], row.get("negative") or None))
    return found


def run(arguments: argparse.Namespace) -> None:
    if not arguments.freeze_encoder:
        raise UserError("--freeze-encoder: expected it, since training the encoder too is not there yet")
    frozen_run(arguments)


def frozen_run(arguments: argparse.Namespace) -> None:
    common.check_writable(Path(arguments.output))
    common.check_writable(Path(arguments.cache))
    try:
        triplets = read_triplets(arguments.data)
        dev = None if arguments.dev is None else evaluation.read_sts(arguments.dev, arguments.dev_split)
    except ValueError as error:
        raise UserError(str(error)) from error
    device = common.device_of(arguments.device)
    encoder, tokenizer, name = common.load_model(arguments.model, device)
    try:
        blocks = families.indices(arguments.blocks, len(families.find_blocks(encoder)))
        size = encoder.config.hidden_size
        torch.manual_seed(arguments.seed)
        selector = S2SentSelector(
            size, len(blocks), arguments.bottleneck or max(1, size // 12), arguments.frequencies,
            gate_norm=None if arguments.no_norm else "batch", block_prior=not arguments.no_prior,
        ).to(device)  # fmt: skip
        recipe = frozen.Recipe(
            epochs=arguments.epochs, batch_size=arguments.batch_size, temperature=arguments.temperature,
            learning_rate=arguments.learning_rate, prior_learning_rate=arguments.prior_learning_rate,
            seed=arguments.seed,
        )  # fmt: skip
        settings = SETTINGS._replace(
            blocks=blocks, pooling=arguments.pooling, max_length=arguments.max_length,
            token_frequencies=frozen.token_frequencies(selector),
        )  # fmt: skip
        history = frozen.fit(
            encoder, tokenizer, selector, triplets, folder=arguments.cache, recipe=recipe, settings=settings, progress=True,
            dev=None if dev is None else [(pair.sentence1, pair.sentence2, pair.score) for pair in dev],
        )  # fmt: skip
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    for epoch, loss in enumerate(history.losses, 1):
        score = f", dev {history.scores[epoch]:.2f}" if history.scores else ""
        print(f"epoch {epoch}: loss {loss:.4f}{score}{', kept' if epoch == history.kept else ''}")
    about = {
        "encoder": name, "blocks": list(blocks), "pooling": arguments.pooling, "max_length": arguments.max_length,
        "recipe": recipe._asdict(), "triplets": len(triplets), "epoch": history.kept,
    }  # fmt: skip
    try:
        pretrained.save(selector, arguments.output, about)
    except OSError as error:
        raise UserError(f"output folder {arguments.output}: {error.strerror}") from error
    print(f"wrote {arguments.output}")

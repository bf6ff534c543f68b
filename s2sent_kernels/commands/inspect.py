"""Look at what a selector selects: which blocks and features the gates of each text take, how gates differ between texts, the DCT
bases, and the energy of f in each component. Numbers on the terminal, pictures in a folder."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import export, functional, pictures, pretrained
from ..capture import BlockCapture
from ..formula import dct
from ..selector import S2SentSelector
from . import common
from .common import BUNDLED, UserError

MOST = 16  # heat maps that fit a picture
EXAMPLES = (
    "The ferry does not sail when the wind comes from the north.",
    "No ship leaves the harbour in this weather.",
    "A loaf stays fresh for longer in a linen bag than in the fridge.",
)


def add(commands: Any) -> None:
    about = "look at a selector's gates, the DCT bases and the energy of f"
    command = commands.add_parser("inspect", help=about, description=__doc__)
    command.add_argument("--text", nargs="+", action="extend", metavar="TEXT", help="texts (default: three examples)")
    command.add_argument(
        "--model",
        help="path or hub id of an encoder, or folder of encoder and selector (default: all-MiniLM-L6-v2, bundled)",
    )
    command.add_argument("--selector", help="folder or shipped name (default: the shipped one of the default model)")
    command.add_argument("--show", action="store_true", help="also open the pictures")
    command.add_argument("--device", help="a torch device (default: cuda where there is one, else cpu)")
    command.add_argument(
        "--output-dir", type=common.path, default="inspection", help="where the pictures go (default: ./inspection)"
    )
    command.set_defaults(run=run)


def energies(squeezed: Tensor, frequencies: int) -> Tensor:
    """[B, M]: the mean square of f [B, D] over each component's part of the features."""
    return squeezed.detach().double().unflatten(1, (frequencies, -1)).square().mean(dim=2)


def run(arguments: argparse.Namespace) -> None:
    directory = Path(arguments.output_dir)
    common.check_writable(directory)
    common.require("matplotlib.figure", "matplotlib")
    texts: Sequence[str] = arguments.text or EXAMPLES
    if any(not text.strip() for text in texts):
        raise UserError("--text: expected texts, got an empty one")
    if len(texts) > MOST:
        raise UserError(f"--text: expected at most {MOST} texts, got {len(texts)}")
    device = common.device_of(arguments.device)
    try:
        capture, selector, tokenizer, names = _load(arguments.model, arguments.selector, device)
        (batch,) = common.batches(capture.encoder, tokenizer, texts, device)
        with capture, torch.no_grad():
            hidden_states, mask = capture.collect(**batch), batch["attention_mask"]
            blocks = capture.blocks
            squeezed, _ = functional.squeeze(
                hidden_states, mask, frequencies=selector.frequencies, profile=selector.profile
            )
            gates = selector.gates(hidden_states, mask)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error

    print(f"{names}: blocks {', '.join(map(str, blocks))}, {selector.frequencies} components")
    print("\nMean gate of each block, and the share of features where the block's gate is the largest, in %")
    largest = gates.argmax(dim=1)
    shares = torch.stack([(largest == n).double().mean(dim=1) for n in range(selector.num_blocks)], dim=1)
    print("  " + "".join(f"{f'block {block}':>16}" for block in blocks))
    for row, share, text in zip(gates.mean(dim=2).tolist(), shares.tolist(), texts, strict=True):
        print(
            "  " + "".join(f"{mean:>9.3f} {100 * part:>5.1f}%" for mean, part in zip(row, share, strict=True)),
            f" {text}",
        )
    print("\nDifference between texts' gates: mean absolute, in % of the mean gate")
    difference = 100 * (gates[:, None] - gates[None]).abs().mean(dim=(2, 3)) / gates.mean()
    for row in difference.tolist():
        print("  " + "".join(f"{value:>8.2f}" for value in row))
    energy = energies(squeezed, selector.frequencies)
    pairs = _pairs(selector)
    print("\nEnergy of f, mean square in each component (x along blocks, y along tokens)")
    print("  " + "".join(f"{f'({x}, {y})':>10}" for x, y in pairs))
    for row in energy.tolist():
        print("  " + "".join(f"{value:>10.3g}" for value in row))

    tokens = max(1, int(mask.sum(dim=1).median()))
    shorts = [text if len(text) <= 48 else text[:47] + "…" for text in texts]
    content = {
        "gates.png": pictures.gates_picture(gates, blocks),
        "gates_by_text.png": pictures.gates_by_text_picture(gates, shorts, blocks),
        "energy.png": pictures.energy_picture(energy, pairs, shorts),
    }
    if selector.profile == "paper":
        bases = pictures.bases_picture(selector.num_blocks, selector.frequencies, tokens, blocks)
        content["dct_bases.png"] = bases
    common.write_files(directory, content)
    if arguments.show:
        _show([directory / file for file in content])


def _load(model: str | None, name: str | None, device: torch.device) -> tuple[BlockCapture, S2SentSelector, Any, str]:
    """The blocks that the selector takes, the selector, the tokenizer and what to call them."""
    whole = None if model is None else common.load_pipeline(model)
    if whole is not None:
        if name is not None:
            raise UserError(f"--selector: expected none beside --model {model}, which has its own")
        sentences = whole[0].to(device)
        pipeline = export.as_pipeline(sentences if len(sentences) > 1 else sentences[0].auto_model)
        return pipeline.capture, pipeline.selector, sentences.tokenizer, f"model     {model}"
    if name is None and model is not None:
        raise UserError("--selector: expected a folder or a shipped name beside --model, got none")
    name = name or BUNDLED
    selector = S2SentSelector.from_pretrained(name).to(device)
    encoder, tokenizer, found = common.load_model(model, device)
    capture = BlockCapture(encoder, pretrained.blocks_of(pretrained.read_config(pretrained.find(name)), encoder))
    return capture, selector, tokenizer, f"encoder   {found}; selector {name}"


def _pairs(selector: S2SentSelector) -> Sequence[tuple[int, int]]:
    return dct.frequency_pairs(selector.num_blocks, selector.frequencies, selector.profile)


def _show(paths: Sequence[Path]) -> None:
    """In one window; says so where there is no display."""
    import matplotlib
    import matplotlib.pyplot as plt

    if matplotlib.get_backend().lower() == "agg":
        raise UserError(f"--show: there is no display to show pictures on; they stand in {paths[0].parent}")
    columns = math.ceil(math.sqrt(len(paths)))
    _, grid = plt.subplots(-(-len(paths) // columns), columns, squeeze=False)
    for axes, path in zip(grid.flat, paths, strict=False):
        axes.imshow(plt.imread(path))
    for axes in grid.flat:
        axes.set_axis_off()
    plt.show()

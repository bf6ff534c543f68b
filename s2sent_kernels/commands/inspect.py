"""Look at what a selector selects: which blocks and features the gates of each text take, how gates differ between texts, the DCT
bases, and the energy of f in each component. Numbers on the terminal, pictures in a folder."""

from __future__ import annotations

import argparse
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import export, functional, waiting
from ..files import require
from ..formula import dct
from ..selector import S2SentSelector
from ..tools import columns, pictures
from ..tools.labelled import TEXT, read_texts
from . import common
from .common import UserError

MOST = 16  # heat maps that fit into a picture
FILES = ("gates.png", "gates_by_text.png", "energy.png", "dct_bases.png")
EXAMPLES = (
    "The ferry does not sail when the wind comes from the north.",
    "No ship leaves the harbour in this weather.",
    "A loaf stays fresh for longer in a linen bag than in the fridge.",
)


def add(commands: Any) -> None:
    about = "look at a selector's gates, the DCT bases and the energy of f"
    command = commands.add_parser("inspect", help=about, description=__doc__)
    model = command.add_argument_group("model")
    run = command.add_argument_group("run")
    texts = command.add_argument_group("texts")
    texts.add_argument("--text", nargs="+", action="extend", metavar="TEXT", help="texts (default: three examples)")
    texts.add_argument(
        "--file", type=common.path, help=f"of texts, {MOST} at most, as `s2sent predict` reads them (default: none)"
    )
    texts.add_argument("--columns", metavar="text=COLUMN", help="of --file (default: text)")
    common.add_format(texts)
    model.add_argument(
        "--model",
        help="path, hub id or shipped name of an encoder, or folder of encoder and selector (default: all-MiniLM-L6-v2, bundled)",
    )
    model.add_argument("--selector", help="folder or shipped name (default: that of the model's shipped name)")
    run.add_argument("--show", action="store_true", help="also open the pictures")
    common.add_device(run)
    run.add_argument(
        "--output-dir", type=common.path, default="inspection", help="where the pictures go (default: ./inspection)"
    )
    common.add_force(run)


def energies(squeezed: Tensor, frequencies: int) -> Tensor:
    """[B, M]: the mean square of f [B, D] over the features of each component."""
    return squeezed.detach().double().unflatten(1, (frequencies, -1)).square().mean(dim=2)


class _Seen(NamedTuple):
    """What a selector computed from the texts."""

    selector: S2SentSelector
    blocks: Sequence[int]  # their numbers in the encoder
    gates: Tensor  # [B, N, D]
    energy: Tensor  # [B, M]
    tokens: int  # the median number of real tokens


def run(arguments: argparse.Namespace) -> None:
    directory = Path(arguments.output_dir)
    common.check_writable(directory)
    require("matplotlib.figure", "matplotlib", "demo")
    texts = _texts(arguments)
    if any(not text.strip() for text in texts):
        raise UserError("--text: expected texts, got an empty one")
    if len(texts) > MOST:
        what = "--text" if arguments.file is None else arguments.file
        raise UserError(f"{what}: expected at most {MOST} texts, got {len(texts)}")
    device = common.device_of(arguments.device)
    common.check_new((directory / name for name in FILES), arguments.force)
    source = common.resolve(arguments.model, arguments.selector)
    try:
        pipeline, tokenizer, names, limit = _load(source, device)
        (batch,) = common.batches(pipeline.encoder, tokenizer, texts, limit)
        seen = _look(pipeline, batch)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    if arguments.text is None and arguments.file is None:
        waiting.say(f"no --text and no --file: {len(EXAMPLES)} example sentences are looked at")
    print(f"{names}: blocks {', '.join(map(str, seen.blocks))}, {seen.selector.frequencies} components")
    _print(seen, texts)
    content = _draw(seen, texts, " ".join(names.split()))
    common.write_files(directory, content)
    if arguments.show:
        _show([directory / file for file in content])


def _texts(arguments: argparse.Namespace) -> Sequence[str]:
    if arguments.file is None:
        common.check_format(arguments.format, [])
        if arguments.columns is not None:
            raise UserError(
                f"--columns: expected --file, whose columns it names, got {arguments.columns!r} without one"
            )
        return arguments.text or EXAMPLES
    if arguments.text is not None:
        raise UserError("--file and --text: expected one of them, got both")
    common.check_format(arguments.format, [arguments.file])
    try:
        named = {} if arguments.columns is None else columns.parse(arguments.columns, TEXT)
        found = read_texts(arguments.file, columns.Columns(named, format=arguments.format, judged=False), pairs=False)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    if not isinstance(found[0], str):
        raise UserError(
            f"{arguments.file}: expected texts, one a row, got the columns of pairs, sentence1 and sentence2"
        )
    return [text for text in found if isinstance(text, str)]


def _load(source: common.Source, device: torch.device) -> tuple[export.Pipeline, Any, str, int | None]:
    """The pipeline, its tokenizer, both names for the terminal, and the tokens at which the folders cut a text."""
    if source.model is not None and source.whole:
        sentences = common.load_whole(source.model)[0].to(device)
        pipeline = export.as_pipeline(sentences if len(sentences) > 1 else sentences[0].auto_model)
        return pipeline, sentences.tokenizer, f"model     {source.model}", sentences.max_seq_length
    assert source.selector is not None  # resolve required one
    trained = common.read_selector(source.selector)
    encoder, tokenizer, name = common.load_model(source.model, device)
    names = f"encoder   {name}; selector {source.selector}"
    return common.fuse(encoder, trained).to(device), tokenizer, names, common.max_length(source.model, trained)


def _look(pipeline: export.Pipeline, batch: dict[str, Tensor]) -> _Seen:
    selector = pipeline.selector
    with pipeline.capture as capture, torch.no_grad():
        hidden_states, mask = capture.collect(**batch), batch["attention_mask"]
        squeezed, _ = functional.squeeze(
            hidden_states, mask, frequencies=selector.frequencies, profile=selector.profile
        )
        gates = selector.gates(hidden_states, mask)
        tokens = max(1, int(mask.sum(dim=1).median()))
        return _Seen(selector, capture.blocks, gates, energies(squeezed, selector.frequencies), tokens)


def _print(seen: _Seen, texts: Sequence[str]) -> None:
    """Three tables, with a row for each text."""
    gates, blocks, labels = seen.gates, seen.blocks, _labels(texts)
    start = " " * _width(labels[0])
    print("\nMean gate of each block, and the share of features where the block's gate is the largest, in %")
    largest = gates.argmax(dim=1)
    shares = torch.stack([(largest == n).double().mean(dim=1) for n in range(len(blocks))], dim=1)
    print(start + "".join(f"{f'block {block}':>16}" for block in blocks))
    for row, share, label in zip(gates.mean(dim=2).tolist(), shares.tolist(), labels, strict=True):
        print(label + "".join(f"{mean:>9.3f} {100 * most:>5.1f}%" for mean, most in zip(row, share, strict=True)))
    if len(texts) > 1:
        print("\nDifference between texts' gates: mean absolute, in % of the mean gate")
        difference = 100 * (gates[:, None] - gates[None]).abs().mean(dim=(2, 3)) / gates.mean()
        print(start + "".join(f"{number:>8}" for number in range(1, len(texts) + 1)))
        for row, label in zip(difference.tolist(), labels, strict=True):
            print(label + "".join(f"{value:>8.2f}" for value in row))
    print("\nEnergy of f, mean square in each component (x along blocks, y along tokens)")
    print(start + "".join(f"{f'({x}, {y})':>10}" for x, y in _pairs(seen.selector)))
    for row, label in zip(seen.energy.tolist(), labels, strict=True):
        print(label + "".join(f"{value:>10.3g}" for value in row))


def _labels(texts: Sequence[str]) -> list[str]:
    """A number and the text's beginning, all of one width on a terminal."""
    found = [f"{number:>3}  {_short(' '.join(text.split()), 40)}" for number, text in enumerate(texts, 1)]
    width = max(map(_width, found))
    return [label + " " * (width - _width(label)) for label in found]


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _width(text: str) -> int:
    """Columns on a terminal: Chinese, Japanese and Korean characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(one) else 1 + (unicodedata.east_asian_width(one) in ("W", "F")) for one in text
    )


def _draw(seen: _Seen, texts: Sequence[str], title: str) -> dict[str, bytes]:
    """PNGs by file name."""
    selector, blocks = seen.selector, seen.blocks
    shorts = [_short(text, 48) for text in texts]
    with common.warnings_in_lines():
        content = {
            "gates.png": pictures.gates_picture(seen.gates, blocks, title),
            "gates_by_text.png": pictures.gates_by_text_picture(seen.gates, shorts, blocks, title),
            "energy.png": pictures.energy_picture(seen.energy, _pairs(selector), shorts, title),
        }
        if selector.profile == "paper":
            bases = pictures.bases_picture(selector.num_blocks, selector.frequencies, seen.tokens, blocks, title)
            content["dct_bases.png"] = bases
    return content


def _pairs(selector: S2SentSelector) -> Sequence[tuple[int, int]]:
    return dct.frequency_pairs(selector.num_blocks, selector.frequencies, selector.profile)


def _show(paths: Sequence[Path]) -> None:
    """Open the pictures in one window.

    Raises:
        UserError: there is no display.
    """
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

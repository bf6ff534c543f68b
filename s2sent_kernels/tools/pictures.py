"""Pictures of a selector, its gates, DCT bases and energies, and of scores. Needs the extra demo (matplotlib)."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..files import require
from ..formula import dct
from . import fonts

MOST_CURVES = 8  # of which a picture has a legend


def _figure(width: float, height: float, extra: str = "demo") -> Any:
    """An empty figure that needs no display: no pyplot, no global state. ``extra``: of the command that draws it."""
    figure = require("matplotlib.figure", "matplotlib", extra).Figure
    return figure(figsize=(width, height), layout="constrained")


def _titled(figure: Any, *lines: str) -> None:
    """A title over the whole figure, in lines that fit; empty ones are left out. Names may be paths, and have no formulas."""
    if any(lines):
        figure.suptitle(_wrapped(figure, *lines), fontsize=11, parse_math=False)


def _wrapped(figure: Any, *lines: str) -> str:
    return "\n".join(textwrap.fill(line, int(9 * figure.get_figwidth())) for line in lines if line)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    texts = [text for legend in legends if legend for text in (legend.get_title(), *legend.get_texts())]
    for text in (*texts, *(axes.title for axes in figure.axes)):
        text.set_parse_math(False)  # a dollar sign in a user's text is no formula; numbers at an axis may be
    fonts.complete(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", r"Glyph \d+ .*missing"
        )  # a warning per character and text: all were said in one
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def gates_picture(gates: Tensor, blocks: Sequence[int] | None = None, title: str = "") -> bytes:
    """A PNG of the gates, blocks upwards and features to the right.

    Above: the mean over sentences. Below: the departure of each feature from its block's average, which in the upper picture is
    hidden by the differences between blocks.

    Args:
        gates: g [B, N, D], as ``S2SentSelector.gates`` returns it, or their mean [N, D].
        blocks: the N blocks' numbers in the encoder, for the axis; 0 to N - 1 by default.
        title: over all, as the model's name.

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: ``gates`` has another number of dimensions.
    """
    if gates.dim() not in (2, 3):
        raise ValueError(f"gates: expected [B, N, D] or [N, D], got shape {list(gates.shape)}")
    mean = gates.detach().double().cpu()
    what = "Gates"
    if mean.dim() == 3:
        what = f"Gates, mean over {len(mean)} sentences" if len(mean) > 1 else "Gates of one sentence"
        mean = mean.mean(dim=0)
    departure = 100 * (mean / mean.mean(dim=1, keepdim=True) - 1)
    limit = max(departure.abs().max().item(), 1e-3)
    names = [str(block) for block in (range(len(mean)) if blocks is None else blocks)]

    figure = _figure(9, 2.4 + 0.44 * len(mean))
    above, below = figure.subplots(2, 1, sharex=True)
    image = above.imshow(mean.numpy(), aspect="auto", origin="lower", cmap="viridis", vmin=0, interpolation="nearest")
    figure.colorbar(image, ax=above, label="gate")
    above.set_title(what)
    image = below.imshow(
        departure.numpy(),
        aspect="auto",
        origin="lower",
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
    )
    figure.colorbar(image, ax=below, label="departure in %")
    below.set_title("Departure of each feature from its block's average")
    below.set_xlabel("feature")
    for axes in (above, below):
        axes.set_ylabel("block")
        axes.set_yticks(range(len(names)), names)
    _titled(figure, title)
    return _png(figure)


def bases_picture(
    num_blocks: int, frequencies: int, num_tokens: int, blocks: Sequence[int] | None = None, title: str = ""
) -> bytes:
    """A PNG of the DCT components of profile "paper": the plane alpha_m x beta_m of each, over blocks and tokens.

    Args:
        num_blocks: N.
        frequencies: M.
        num_tokens: the sentence's number of real tokens.
        blocks: the N blocks' numbers in the encoder, for the axis; 0 to N - 1 by default.
        title: over all, as the model's name.

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: N blocks have no M components.
    """
    pairs = dct.frequency_pairs(num_blocks, frequencies)
    alpha = dct.block_basis(num_blocks, frequencies)  # [M, N]
    rank, length = torch.arange(num_tokens), torch.full((num_tokens,), num_tokens)
    beta = dct.token_basis(rank, length, num_blocks, frequencies).T  # [M, L]
    planes = alpha[:, :, None] * beta[:, None, :]  # [M, N, L]
    limit = planes.abs().max().item()
    names = [str(block) for block in (range(num_blocks) if blocks is None else blocks)]

    columns = min(frequencies, 4)
    rows = -(-frequencies // columns)
    figure = _figure(1.4 + 2.3 * columns, 1.1 + rows * (0.7 + 0.22 * min(num_blocks, 12)))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= frequencies:
            axes.set_axis_off()
            continue
        image = axes.imshow(
            planes[place].numpy(),
            aspect="auto",
            origin="lower",
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            interpolation="nearest",
        )
        axes.set_title("(x, y) = ({}, {})".format(*pairs[place]), fontsize=10)
        axes.set_yticks(range(num_blocks), names)
        if place % columns == 0:
            axes.set_ylabel("block")
        if place + columns >= frequencies:
            axes.set_xlabel("token")
            axes.tick_params(labelbottom=True)
    figure.colorbar(image, ax=grid, label="weight")
    what = f"DCT over {num_blocks} blocks and {num_tokens} tokens: x half waves along blocks, y along tokens"
    _titled(figure, title, what)
    return _png(figure)


def gates_by_text_picture(
    gates: Tensor, texts: Sequence[str], blocks: Sequence[int] | None = None, title: str = ""
) -> bytes:
    """A PNG with a heat map per text, blocks by features: the departure of its gates from the mean over the texts. Of one text,
    which has no departure, the gates themselves.

    Args:
        gates: g [B, N, D].
        texts: B titles.
        blocks: the N blocks' numbers in the encoder, for the axis; 0 to N - 1 by default.
        title: over all, as the model's name.

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: ``gates`` is not [B, N, D] with B = the number of texts.
    """
    if gates.dim() != 3 or len(gates) != len(texts):
        raise ValueError(f"gates: expected [B, N, D] with B = {len(texts)} texts, got shape {list(gates.shape)}")
    values = gates.detach().double().cpu()
    if len(texts) == 1:
        maps, label = values, "gate"
        scale: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": values.max().item()}
    else:
        maps, label = 100 * (values / values.mean(dim=0, keepdim=True) - 1), "departure from the mean over texts, in %"
        limit = max(maps.abs().max().item(), 1e-3)
        scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    names = [str(block) for block in (range(values.shape[1]) if blocks is None else blocks)]
    figure = _figure(9, 1.3 + (0.5 + 0.2 * len(names)) * len(texts))
    grid = figure.subplots(len(texts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, text, one in zip(grid, texts, maps, strict=True):
        image = axes.imshow(one.numpy(), aspect="auto", origin="lower", interpolation="nearest", **scale)
        axes.set_title(text, fontsize=9)
        axes.set_ylabel("block")
        axes.set_yticks(range(len(names)), names, fontsize=7)
    grid[-1].set_xlabel("feature")
    bar = figure.colorbar(image, ax=list(grid))
    bar.set_label(textwrap.fill(label, max(14, int(8 * figure.get_figheight()))))
    _titled(figure, title)
    return _png(figure)


COLOURS = 10  # that can be told apart


def energy_picture(energy: Tensor, pairs: Sequence[tuple[int, int]], texts: Sequence[str], title: str = "") -> bytes:
    """A PNG of the energy of f in each DCT component (x, y), from 0 on: bars, in a colour for each text; for more than COLOURS
    texts a heat map with a row for each.

    Args:
        energy: [B, M].
        title: over all, as the model's name.

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: the shape is another.
    """
    if energy.shape != (len(texts), len(pairs)):
        raise ValueError(f"energy: expected [B, M] = {[len(texts), len(pairs)]}, got shape {list(energy.shape)}")
    rows = energy.tolist()
    if len(texts) > COLOURS:  # room for the texts on the left
        figure = _figure(5.5 + 0.65 * len(pairs), 1.8 + 0.26 * len(texts))
        axes = figure.subplots()
        _heat_map(figure, axes, rows)
        axes.set_yticks(range(len(texts)), texts, fontsize=8, parse_math=False)
        _titled(figure, title)
    else:
        figure = _figure(max(6, 2 + 0.9 * len(pairs)), 4 + 0.15 * len(texts))  # room for all labels and the legend
        axes = figure.subplots()
        width = 0.8 / len(texts)
        for place, (text, row) in enumerate(zip(texts, rows, strict=True)):
            at = [m + (place - (len(texts) - 1) / 2) * width for m in range(len(pairs))]
            bars = axes.bar(at, row, width, label=text)
            axes.bar_label(bars, [f"{value:#.2g}" for value in row], fontsize=6, rotation=90, padding=2)
        axes.margins(y=0.18)  # for what is written over the bars
        axes.set_ylim(bottom=0)
        axes.set_ylabel("energy: mean square of f")
        # The title is the legend's: matplotlib would draw the one over the other.
        figure.legend(fontsize=7, loc="outside upper center", title=_wrapped(figure, title), title_fontsize=10)
    axes.set_xticks(range(len(pairs)), [f"({x}, {y})" for x, y in pairs])
    axes.set_xlabel("component (x, y)\nx half waves along blocks, y along tokens")
    return _png(figure)


def _heat_map(figure: Any, axes: Any, rows: Sequence[Sequence[float]]) -> None:
    """Energies by colour, and written into their cells."""
    most = max(max(row) for row in rows)
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=most, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="energy: mean square of f")
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            colour = "black" if value > 0.6 * most else "white"
            axes.text(x, y, f"{value:#.2g}", color=colour, fontsize=7, ha="center", va="center")


def scores_picture(
    scores: Mapping[str, Mapping[str, float]], title: str, about: Mapping[str, str] | None = None
) -> bytes:
    """A PNG of bars from 0 on, with their values: a group per task, in it a bar per pooling.

    Args:
        scores: by task, then by pooling.
        about: lines under a task's name, as its measure and its number of examples.

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: ``scores`` is empty.
    """
    if not scores:
        raise ValueError("scores: expected at least one task, got none")
    poolings = list(dict.fromkeys(pooling for found in scores.values() for pooling in found))
    width = 0.8 / len(poolings)
    inches = max(6.0, 2.5 + 1.6 * len(scores))
    figure = _figure(inches, 4.8)
    axes = figure.subplots()
    for place, pooling in enumerate(poolings):
        at = [task + (place - (len(poolings) - 1) / 2) * width for task in range(len(scores))]
        heights = [found.get(pooling, float("nan")) for found in scores.values()]
        bars = axes.bar(at, heights, width, label=pooling)
        written = ["" if math.isnan(height) else f"{height:.2f}" for height in heights]
        axes.bar_label(bars, written, fontsize=7, rotation=90, padding=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.18)  # for the values
    if all(value >= 0 or math.isnan(value) for found in scores.values() for value in found.values()):
        axes.set_ylim(bottom=0)
    said = {name: [name, *(about or {}).get(name, "").splitlines()] for name in scores}
    names = ["\n".join(textwrap.fill(line, 18) for line in lines) for lines in said.values()]  # names may be paths
    axes.set_xticks(range(len(scores)), names, fontsize=9, parse_math=False)
    axes.set_ylabel("score, times 100")
    _titled(figure, title)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)


def curves_picture(
    trials: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], what: str | None, title: str = ""
) -> bytes:
    """A PNG of a training: its loss over epochs and, beside it, its score on the dev part, a curve for each trial.

    Args:
        trials: by name, the points (epoch, value) of "loss" and of "dev".
        what: the score, in words; None without one.
        title: over all, as the model's name.

    Raises:
        MissingPackage: matplotlib is missing; names the extra.
    """
    panels = [("loss", "training loss")] + ([] if what is None else [("dev", f"{what}, on dev")])
    figure = _figure(1 + 4.5 * len(panels), 4.2, "train")
    for place, (field, label) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        for name, curves in trials.items():
            if curves[field]:
                axes.plot(*zip(*curves[field], strict=True), marker="o", markersize=3, label=name)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if place == 1 and 1 < len(trials) <= MOST_CURVES:
            axes.legend(fontsize=7)
    measure = "loss" if what is None else f"loss, and {what} on dev"
    _titled(figure, title, measure)
    return _png(figure)

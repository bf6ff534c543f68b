"""Pictures of a selector, its gates, DCT bases and energies, and of scores. Needs the extra demo (matplotlib)."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..files import require
from ..formula import dct
from . import fonts


def _figure(width: float, height: float) -> Any:
    """An empty figure that needs no display: no pyplot, no global state."""
    figure = require("matplotlib.figure", "matplotlib", "demo").Figure
    return figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    texts = [text for legend in legends if legend for text in legend.get_texts()]
    for text in (*texts, *(axes.title for axes in figure.axes)):
        text.set_parse_math(False)  # a dollar sign in a user's text is no formula; numbers at an axis may be
    fonts.complete(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", r"Glyph \d+ .*missing"
        )  # a warning per character and text: all were said in one
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def gates_picture(gates: Tensor, blocks: Sequence[int] | None = None) -> bytes:
    """A PNG of the gates, blocks upwards and features to the right.

    Above: the mean over sentences. Below: the departure of each feature from its block's average, which in the upper picture is
    hidden by the differences between blocks.

    Args:
        gates: g [B, N, D], as ``S2SentSelector.gates`` returns it, or their mean [N, D].
        blocks: the N blocks' numbers in the encoder, for the axis; 0 to N - 1 by default.

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: ``gates`` has another number of dimensions.
    """
    if gates.dim() not in (2, 3):
        raise ValueError(f"gates: expected [B, N, D] or [N, D], got shape {list(gates.shape)}")
    mean = gates.detach().double().cpu()
    title = "Gates"
    if mean.dim() == 3:
        title = f"Gates, mean over {len(mean)} sentences"
        mean = mean.mean(dim=0)
    departure = 100 * (mean / mean.mean(dim=1, keepdim=True) - 1)
    limit = max(departure.abs().max().item(), 1e-3)
    names = [str(block) for block in (range(len(mean)) if blocks is None else blocks)]

    figure = _figure(9, 2.4 + 0.44 * len(mean))
    above, below = figure.subplots(2, 1, sharex=True)
    image = above.imshow(mean.numpy(), aspect="auto", origin="lower", cmap="viridis", vmin=0, interpolation="nearest")
    figure.colorbar(image, ax=above, label="gate")
    above.set_title(title)
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
    return _png(figure)


def bases_picture(num_blocks: int, frequencies: int, num_tokens: int, blocks: Sequence[int] | None = None) -> bytes:
    """A PNG of the DCT components of profile "paper": the plane alpha_m x beta_m of each, over blocks and tokens.

    Args:
        num_blocks: N.
        frequencies: M.
        num_tokens: the sentence's number of real tokens.
        blocks: the N blocks' numbers in the encoder, for the axis; 0 to N - 1 by default.

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
    figure.suptitle(f"DCT over {num_blocks} blocks and {num_tokens} tokens: x half waves along blocks, y along tokens")
    return _png(figure)


def gates_by_text_picture(gates: Tensor, texts: Sequence[str], blocks: Sequence[int] | None = None) -> bytes:
    """A PNG with a heat map per text: the departure of its gates from the mean over the texts, blocks by features.

    Args:
        gates: g [B, N, D].
        texts: B titles.
        blocks: the N blocks' numbers in the encoder, for the axis; 0 to N - 1 by default.

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: ``gates`` is not [B, N, D] with B = the number of texts.
    """
    if gates.dim() != 3 or len(gates) != len(texts):
        raise ValueError(f"gates: expected [B, N, D] with B = {len(texts)} texts, got shape {list(gates.shape)}")
    values = gates.detach().double().cpu()
    departure = 100 * (values / values.mean(dim=0, keepdim=True) - 1)
    limit = max(departure.abs().max().item(), 1e-3)
    names = [str(block) for block in (range(values.shape[1]) if blocks is None else blocks)]
    figure = _figure(9, 0.8 + (0.5 + 0.2 * len(names)) * len(texts))
    grid = figure.subplots(len(texts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, text, one in zip(grid, texts, departure, strict=True):
        image = axes.imshow(
            one.numpy(), aspect="auto", origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
        )
        axes.set_title(text, fontsize=9)
        axes.set_ylabel("block")
        axes.set_yticks(range(len(names)), names, fontsize=7)
    grid[-1].set_xlabel("feature")
    figure.colorbar(image, ax=list(grid), label="departure from the mean over texts, in %")
    return _png(figure)


def energy_picture(energy: Tensor, pairs: Sequence[tuple[int, int]], texts: Sequence[str]) -> bytes:
    """A PNG of bars: the energy of f in each DCT component (x, y), a bar per text, on a logarithmic axis.

    Args:
        energy: [B, M].

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: the shape is another.
    """
    if energy.shape != (len(texts), len(pairs)):
        raise ValueError(f"energy: expected [B, M] = {[len(texts), len(pairs)]}, got shape {list(energy.shape)}")
    figure = _figure(max(6, 2 + 0.9 * len(pairs)), 3.5 + 0.15 * len(texts))  # room for all labels and the legend
    axes = figure.subplots()
    width = 0.8 / len(texts)
    for place, (text, row) in enumerate(zip(texts, energy.tolist(), strict=True)):
        at = [m + (place - (len(texts) - 1) / 2) * width for m in range(len(pairs))]
        axes.bar(at, row, width, label=text)
    axes.set_yscale("log")
    axes.set_xticks(range(len(pairs)), [f"({x}, {y})" for x, y in pairs])
    axes.set_xlabel("component (x, y)\nx half waves along blocks, y along tokens")
    axes.set_ylabel("mean square of f")
    figure.legend(fontsize=7, loc="outside upper center")
    return _png(figure)


def scores_picture(scores: Mapping[str, Mapping[str, float]], title: str) -> bytes:
    """A PNG of bars: a group per task, in it a bar per pooling. The axis starts below the lowest score, as its label says.

    Args:
        scores: by task, then by pooling.

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: ``scores`` is empty.
    """
    if not scores:
        raise ValueError("scores: expected at least one task, got none")
    poolings = list(dict.fromkeys(pooling for found in scores.values() for pooling in found))
    values = [value for found in scores.values() for value in found.values()]
    low = max(0.0, min(values) - 0.25 * (max(values) - min(values)) - 2)
    width = 0.8 / len(poolings)
    inches = max(6.0, 2.5 + 1.6 * len(scores))
    figure = _figure(inches, 4.5)
    axes = figure.subplots()
    for place, pooling in enumerate(poolings):
        at = [task + (place - (len(poolings) - 1) / 2) * width for task in range(len(scores))]
        heights = [found.get(pooling, float("nan")) for found in scores.values()]
        axes.bar(at, [height - low for height in heights], width, bottom=low, label=pooling)
    names = [textwrap.fill(name, 18) for name in scores]  # names may be paths
    axes.set_xticks(range(len(scores)), names, parse_math=False)
    axes.set_ylabel(f"score (the axis starts at {low:.0f})" if low else "score")
    figure.suptitle(textwrap.fill(title, int(9 * inches)), parse_math=False)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)

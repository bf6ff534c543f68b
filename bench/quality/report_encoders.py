"""The sections of bench/QUALITY.md on encoders that are trained too, only pre-trained, or cut short."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import record
from pages import table

from quality import distil, guide, train_selector
from quality.data import spread
from quality.encoders import BUNDLED, MPNET
from s2sent_kernels.tools import evaluation

Row = dict[str, Any]
COLUMNS, TITLES = train_selector.COLUMNS, train_selector.TITLES
BLOCKS = {6: BUNDLED, 12: MPNET}  # of the encoders that are cut short


def matching(rows: Iterable[Row], wanted: Row) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def cells(rows: Sequence[Row]) -> list[str]:
    return [spread([row["scores"][column] for row in rows]) if rows else "–" for column in COLUMNS]


def read(path: Path) -> Row:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise record.UserError(f"{path}: cannot be read: {error}") from error


def finetune(rows: Sequence[Row]) -> str:
    parts = ["## Fine-tuning, encoder and fusion together", budget(rows[0], "triplets", 2e-5)]
    return "\n\n".join([*parts, tuned(rows)])


def budget(row: Row, what: str, rate: float) -> str:
    epochs = "an epoch" if row["epochs"] == 1 else f"{row['epochs']} epochs"
    return (
        f"The same budget for all: {epochs} of {row['triplets']:,} {what} in batches of {row['batch']}, AdamW, "
        f"learning rate {row.get('rate', rate):g}\n(selector 1e-3, prior, mix and gate scale 1e-2), linear warm-up and decay, "
        "float32 with TF32 products. Nothing is\nselected: the last epoch is reported."
    )


def tuned(rows: Sequence[Row]) -> str:
    """Scores at the end, and the mean of the four on the way; the best first."""
    parts, first = [], rows[0]
    names = list(dict.fromkeys(map(guide.fusion_name, rows)))
    order = sorted(
        names, key=lambda name: -statistics.median(r["scores"]["mean"] for r in rows if guide.fusion_name(r) == name)
    )
    lines = []
    for name in order:
        mine = [row for row in rows if guide.fusion_name(row) == name]
        lines.append([name, str(len(mine)), *cells(mine)])
    parts.append(table(("<fusion", "seeds", *TITLES), lines))
    parts.append("The mean of the four sets on the way:")
    steps = ["before", *(f"epoch {epoch}" for epoch in range(1, first["epochs"] + 1))]
    lines = []
    for name in order:
        mine = [row for row in rows if guide.fusion_name(row) == name]
        lines.append([name, *(spread([row["by_epoch"][step]["mean"] for row in mine]) for step in range(len(steps)))])
    parts.append(table(("<fusion", *steps), lines))
    return "\n\n".join(parts)


def stand_in(frozen: Sequence[Row], tuned_rows: Sequence[Row], simcse: Sequence[Row], made: Sequence[Row]) -> str:
    """``made``: what pretrain.py wrote of the encoder, if that is there."""
    content = guide.apart(frozen)
    parts = ["## Behind an encoder that was only pre-trained"]
    parts.append(
        "A stand-in for BERT, as in the paper: the bundled encoder after masked language modelling on Wikipedia sentences, by\n"
        "`bench/quality/pretrain.py`. Its first token still knows of the similarity that it was trained for: see cls before\n"
        "fine-tuning."
    )
    parts += [f"{row['steps']:,} steps, to a loss of {row['losses'][-1]['loss']:.2f}." for row in made]
    parts += [
        "### Frozen",
        "The shipped selectors' search.",
        train_selector.table(content),
        train_selector.verdict(content),
    ]
    parts += ["### Fine-tuned on triplets", budget(tuned_rows[0], "triplets", 5e-5), tuned(tuned_rows)]
    parts += ["### SimCSE without supervision", budget(simcse[0], "sentences", 3e-5), tuned(simcse)]
    return "\n\n".join(parts)


def truncated(rows: Sequence[Row], speed: Sequence[Row]) -> str:
    """Encoders cut after their first K blocks: blocks x quality x speed."""
    parts = ["## Fewer blocks"]
    parts.append(
        "The encoder's first K blocks alone, frozen, and fusions of all of them by the shipped selectors' search; the mean of\n"
        "the four. Speed: texts a second of the encoder with a selector, tokenization included."
    )
    names = (evaluation.MEAN_OF_LAST, evaluation.SCALAR_MIX, train_selector.LINEAR, evaluation.S2SENT)
    devices, lines = list(dict.fromkeys(row["device"] for row in speed)), []
    for of, blocks in sorted({(row["of"], row["blocks"]) for row in rows}):
        encoder = BLOCKS[of]
        mine = [row for row in matching(rows, {"of": of, "blocks": blocks}) if row["chosen"]]
        values = [spread([row["scores"]["mean"] for row in matching(mine, {"pooling": name})]) for name in names]
        rates = {row["device"]: row["texts_per_second"] for row in matching(speed, {"of": of, "blocks": blocks})}
        fast = [f"{rates[device]:,.0f}" if device in rates else "–" for device in devices]
        lines.append([encoder, f"{blocks} of {of}", *values, *fast])
    head = ("<encoder", "blocks", *names, *(f"texts/s, {device}" for device in devices))
    return "\n\n".join([*parts, table(head, lines)])


def distilled(rows: Sequence[Row]) -> str:
    """The larger model's similarities as an objective, and embeddings trained to be cut."""
    parts = ["## Learning from the larger model"]
    (teacher, *_) = matching(rows, {"form": "teacher"})
    parts.append(
        f"The similarities of {MPNET} with a selector (mean of the four {teacher['scores']['mean']:.2f}) as an objective\n"
        "of the bundled encoder's selector: so much of the loss is the divergence of the student's distribution over a\n"
        "batch's texts from the teacher's, and the rest InfoNCE. The divergence on held-out triplets selects epoch, learning\n"
        "rate and start of the gate scale. Sentences are of Wikipedia, without labels."
    )
    lines = []
    for form, weight, temperature in dict.fromkeys(
        (row["form"], row["weight"], row["temperature"]) for row in rows if "weight" in row
    ):
        mine = matching(rows, {"form": form, "weight": weight, "temperature": temperature})
        groups = [
            matching(mine, {"rate": r, "start": s}) for r, s in dict.fromkeys((m["rate"], m["start"]) for m in mine)
        ]
        best = max(groups, key=lambda group: statistics.median(row["scores"][distil.DIVERGENCE] for row in group))
        told = f"{best[0]['rate']:g}, scale from {best[0]['start']:g}"
        left = f"{-statistics.median(row['scores'][distil.DIVERGENCE] for row in best):.3f}"
        lines.append([f"{form}, {weight:.0%}", f"{temperature:g}", told, left, *cells(best)])
    head = ("<trained on, divergence's share", "temperature", "learning rate", "held-out divergence", *TITLES)
    parts += [table(head, lines), "### Embeddings that are cut"]
    parts.append(
        "The mean of the four by the first features alone. Several widths: the loss is the mean over these, one: over the\n"
        "last. Learning rate and start of the gate scale are the same for both."
    )
    widths = [row for row in rows if "widths" in row]
    names, lines = list(widths[0]["widths"]), []
    for form in dict.fromkeys(row["form"] for row in widths):
        mine = matching(widths, {"form": form})
        lines.append([form, *(spread([row["widths"][name] for row in mine]) for name in names)])
    return "\n\n".join([*parts, table(("<trained for", *names), lines)])


def speeds(results: Path) -> list[Row]:
    """The rows of "speed", each with its device."""
    contents = [read(path) for path in sorted(results.glob("speed*.json"))]
    return [row | {"device": content["environment"]["device"]} for content in contents for row in content["rows"]]


def uncut(selectors: Sequence[Row]) -> list[Row]:
    """What was measured for the shipped selector of the encoder with most blocks, as rows of "truncated"."""
    count = max(BLOCKS)
    rows = []
    for content in selectors:
        if content["name"] == BLOCKS[count]:
            rows += [{"pooling": name, "scores": found, "chosen": True} for name, found in content["baselines"].items()]
            rows += content["runs"]
    return [row | {"of": count, "blocks": count} for row in rows]

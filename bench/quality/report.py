"""bench/results/quality/*.json to bench/QUALITY.md, and to the README's paragraph of scores. No number is typed by hand.

python bench/quality/report.py [--results bench/results/quality] [--output bench/QUALITY.md] [--readme README.md]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, also where this file is run by its path

import record
from pages import insert, table

from quality import train_selector
from quality.data import MODEL_NAME, TESTS, TRANSFER, spread
from quality.quality import BASE as CLAIMS_BASE
from quality.quality import RECIPE as claims_recipe
from s2sent_kernels.checkpoints import pretrained
from s2sent_kernels.files import write_atomically
from s2sent_kernels.tools import evaluation

Row = dict[str, Any]
COLUMNS = ("dev", *TESTS, "mean")
TITLES = ("STS-B dev", "STS12", "STS14", "STS16", "STS-B test", "mean of the four")
START, END = "<!-- quality: written by bench/quality/report.py -->", "<!-- quality: end -->"
BASE = {name: value for name, value in CLAIMS_BASE.items() if name != "prior"}

INTRO = """\
# Quality

Written by `bench/quality/report.py` from [results/quality](results/quality), which `bench/quality/train_selector.py` and
`bench/quality/quality.py` measured; no number is typed by hand. Encoder: all-MiniLM-L6-v2, 6 blocks of 384 features. Figures are
Spearman × 100 of cosine similarities, each STS set as one; where there are seeds, the median and in parentheses the lowest and
highest, of three where no other number is given.

Epochs (of 6), and for the shipped selector the learning rate and the seed, are selected on STS-B dev. It shares pairs with STS12,
STS14 and STS16 ({shared}; of {dev:,}): the shipped selector's section shows what other rules give.
Training: {triplets:,} NLI triplets without the sentences of the STS sets, InfoNCE with hard negatives, temperature 0.05."""


def load(folder: Path, section: str) -> tuple[list[Row], list[Row]]:
    """Rows and environments of a section's file, or of its parts."""
    rows, environments = [], []
    for path in sorted(folder.glob(f"{section}*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        rows += content["rows"]
        environments.append(content["environment"])
    return rows, environments


def matching(rows: Iterable[Row], wanted: Row) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def cells(rows: Sequence[Row]) -> list[str]:
    return [spread([row["scores"][column] for row in rows]) if rows else "–" for column in COLUMNS]


def baseline_rows(rows: Sequence[Row], *names: str) -> list[list[str]]:
    return [[name, *cells(matching(rows, {"gates": name}))] for name in names if matching(rows, {"gates": name})]


def varied(rows: Sequence[Row], name: str, values: Sequence[Any], title: str, said: Callable[[Any], str]) -> str:
    """One table: the base with each value of ``name``, with and without the prior."""
    lines = []
    for value in values:
        for prior in (True, False):
            found = matching(rows, {**BASE, name: value, "prior": prior})
            if found:
                lines.append([said(value), "on" if prior else "off", *cells(found)])
    return table((f"<{title}", "<prior", *TITLES), lines)


def claims(rows: Sequence[Row]) -> str:
    parts = ["## What each part is worth, encoder frozen"]
    parts.append(
        "Variations of one base: N = 6 blocks, M = 4 components, H = 32, batch norm, gates of the input. Prior off is the\n"
        f"paper's formula. Learning rate {claims_recipe.learning_rate:g}."
    )
    parts += ["### For comparison"]
    lines = baseline_rows(rows, evaluation.MEAN_OF_LAST, evaluation.FIRST_LAST, evaluation.AVERAGE)
    lines += [
        [f"scalar mix of the last {n}", *cells(matching(rows, {"gates": "scalar mix", "N": n}))]
        for n in range(1, 7)
        if matching(rows, {"gates": "scalar mix", "N": n})
    ]
    parts.append(table(("<pooling", *TITLES), lines))
    parts += ["### DCT components", "M = 1 is global average pooling.", varied(rows, "M", (1, 2, 4, 8, 16), "M", str)]
    parts += [
        "### Blocks",
        "N = 1 has one gate, which is 1: the mean of the last block.",
        varied(rows, "N", range(1, 7), "N", str),
    ]
    parts += ["### Norm and gates", "Constant gates: f = 0 for every sentence, so that they cannot depend on it."]
    lines = []
    for norm in (True, False):
        for gates in ("input", "constant"):
            for prior in (True, False):
                found = matching(rows, {**BASE, "norm": norm, "gates": gates, "prior": prior})
                if found:
                    lines.append(["batch" if norm else "none", gates, "on" if prior else "off", *cells(found)])
    parts.append(table(("<norm", "<gates", "<prior", *TITLES), lines))
    parts.append(readings(rows))
    return "\n\n".join(parts)


def _median(rows: Sequence[Row], **wanted: Any) -> float | None:
    found = matching(rows, {**BASE, "prior": True, **wanted})
    return statistics.median(row["scores"]["mean"] for row in found) if found else None


def readings(rows: Sequence[Row]) -> str:
    """The tables' differences: medians of the mean of the four sets, against the base or a baseline."""
    base, paper = _median(rows), _median(rows, prior=False)
    if base is None or paper is None:
        return ""
    lines = ["Differences of medians, mean of the four sets:", ""]

    def say(text: str, value: float | None, against: float) -> None:
        if value is not None:
            lines.append(f"* {text}: {value - against:+.2f}")

    mean_of_last = matching(rows, {"gates": evaluation.MEAN_OF_LAST})
    if mean_of_last:
        last = mean_of_last[0]["scores"]["mean"]
        say("selector with prior, over the mean of the last block", base, last)
        say("selector without prior (the paper's formula), over the mean of the last block", paper, last)
    mix = matching(rows, {"gates": "scalar mix", "N": 6})
    if mix:
        say("selector with prior, over the scalar mix", base, statistics.median(row["scores"]["mean"] for row in mix))
    say("constant gates, over gates of the input, with prior", _median(rows, gates="constant"), base)
    say("constant gates, over gates of the input, without prior", _median(rows, gates="constant", prior=False), paper)
    say("no norm, over batch norm, with prior", _median(rows, norm=False), base)
    say("no norm, over batch norm, without prior", _median(rows, norm=False, prior=False), paper)
    for m in (1, 2, 8, 16):
        say(f"M = {m} over M = 4, with prior", _median(rows, M=m), base)
    for n in (2, 3, 4, 5):
        say(f"N = {n} over N = 6, with prior", _median(rows, N=n), base)
    return "\n".join(lines)


def transfer(rows: Sequence[Row]) -> str:
    parts = ["## Transfer of the shipped selector"]
    parts.append(
        "Logistic regression on frozen embeddings, as in SentEval: accuracy × 100, for MRPC also F1. C is selected on dev or on\n"
        "a tenth of the training part; MR is cross-validated in ten folds. None of these sets selected the shipped selector."
    )
    lines = []
    for pooling in dict.fromkeys(row["pooling"] for row in rows):
        of = {row["task"]: row for row in matching(rows, {"pooling": pooling})}
        line = [pooling]
        for task in TRANSFER:
            row = of.get(task)
            pair = f" / {row['f1']:.2f}" if row and task == "MRPC" else ""
            line.append(f"{row['accuracy']:.2f}{pair}" if row else "–")
        if set(TRANSFER) <= set(of):
            line.append(f"{statistics.mean(of[task]['accuracy'] for task in TRANSFER):.2f}")
        lines.append(line)
    parts.append(table(("<pooling", *TRANSFER, "mean accuracy"), lines))
    return "\n\n".join(parts)


def subsets(rows: Sequence[Row]) -> str:
    """Parts downwards, poolings to the right."""
    poolings = list(dict.fromkeys(row["pooling"] for row in rows))
    lines, over = [], []
    for name, part in dict.fromkeys((row["set"], row["subset"]) for row in rows):
        of = {row["pooling"]: row for row in matching(rows, {"set": name, "subset": part})}
        over.append(of[evaluation.S2SENT]["spearman"] - of[evaluation.MEAN_OF_LAST]["spearman"])
        pairs = f"{of[evaluation.S2SENT]['pairs']:,}"
        lines.append([name, part, pairs, *(f"{of[pooling]['spearman']:.2f}" for pooling in poolings)])
    said = (
        f"The selector is above the mean of the last block on {sum(value > 0 for value in over)} of {len(over)} parts."
    )
    head = ("<set", "<part", "pairs", *poolings)
    return "\n\n".join(["## The shipped selector on every part of the STS sets", said, table(head, lines)])


def fusion_name(row: Row) -> str:
    return row["fusion"] + (f", N = {row['N']}" if "N" in row else "")


def finetune(rows: Sequence[Row]) -> str:
    parts = ["## Fine-tuning, encoder and fusion together"]
    first = rows[0]
    parts.append(
        f"The same budget for all: {first['epochs']} epochs of {first['triplets']:,} triplets in batches of {first['batch']}, "
        "AdamW, learning rate 2e-5\n(selector 1e-3, prior and mix 1e-2), linear warm-up and decay, float32 with TF32 products. "
        "Nothing is selected:\nthe last epoch is reported."
    )
    names = list(dict.fromkeys(map(fusion_name, rows)))
    order = sorted(
        names, key=lambda name: -statistics.median(r["scores"]["mean"] for r in rows if fusion_name(r) == name)
    )
    lines = []
    for name in order:
        mine = [row for row in rows if fusion_name(row) == name]
        lines.append([name, str(len(mine)), *cells(mine)])
    parts.append(table(("<fusion", "seeds", *TITLES), lines))
    parts.append("The mean of the four sets on the way:")
    steps = ["before", *(f"epoch {epoch}" for epoch in range(1, first["epochs"] + 1))]
    lines = []
    for name in order:
        mine = [row for row in rows if fusion_name(row) == name]
        lines.append([name, *(spread([row["by_epoch"][step]["mean"] for row in mine]) for step in range(len(steps)))])
    parts.append(table(("<fusion", *steps), lines))
    return "\n\n".join(parts)


def parameters(claim_rows: Sequence[Row], encoder: int) -> str:
    lines = []
    for n in range(1, 7):
        for prior in (True, False):
            found = matching(claim_rows, {**BASE, "N": n, "prior": prior})
            if found:
                count = found[0]["parameters"]
                lines.append([str(n), "on" if prior else "off", f"{count:,}", f"{100 * count / encoder:.2f} %"])
    head = ("<N", "<prior", "parameters", f"of the encoder's {encoder:,}")
    return "\n\n".join(["## Parameters added", "H = 32, batch norm; M adds none.", table(head, lines)])


def shipped(content: Row) -> str:
    parts = ["## The shipped selector", train_selector.table(content)]
    parts += ["The rule that selected the epoch, and what other rules give:", train_selector.rules(content)]
    return "\n\n".join(parts)


def when(content: Row, claim_rows: Sequence[Row], transfer_rows: Sequence[Row], tuned: Sequence[Row]) -> str:
    """The README's paragraph on when to use what. Its words hold for whatever figures the results have."""
    of = {
        kind: statistics.median(r["scores"]["mean"] for r in content["runs"] if r["pooling"] == kind and r["chosen"])
        for kind in (evaluation.SCALAR_MIX, evaluation.S2SENT)
    }
    last = content["baselines"][evaluation.MEAN_OF_LAST]["mean"]
    paper = _median(claim_rows, prior=False)
    words = (
        "For similarity behind a frozen, contrastively trained encoder, use the selector with its block prior: on "
        f"all-MiniLM-L6-v2 its mean Spearman × 100 of four STS sets is {of[evaluation.S2SENT]:.2f}, against {last:.2f} for the "
        f"mean of the last block and {of[evaluation.SCALAR_MIX]:.2f} for a learned scalar mix"
    )
    words += f". The paper's formula, without a prior, gives {paper:.2f}." if paper is not None else "."
    accuracy = {
        pooling: statistics.mean(row["accuracy"] for row in matching(transfer_rows, {"pooling": pooling}))
        for pooling in dict.fromkeys(row["pooling"] for row in transfer_rows)
    }
    if accuracy:
        best = max(accuracy, key=lambda pooling: accuracy[pooling])
        words += (
            f" For classifiers on frozen embeddings the {best} is best, with mean accuracy {accuracy[best]:.2f} "
            f"(selector {accuracy[evaluation.S2SENT]:.2f}, mean of the last block {accuracy[evaluation.MEAN_OF_LAST]:.2f})."
        )
    names = list(dict.fromkeys(map(fusion_name, tuned)))
    if names:
        scores = {n: [r["scores"]["mean"] for r in tuned if fusion_name(r) == n] for n in names}
        order = sorted(names, key=lambda name: -statistics.median(scores[name]))
        told = ", ".join(f"{name} {spread(scores[name])}" for name in order)
        seeds = sorted({len(values) for values in scores.values()})
        words += (
            f" Where the encoder is fine-tuned too, the order at the same budget is, from the best "
            f"({' or '.join(map(str, seeds))} seeds each): {told}."
        )
    return textwrap.fill(words, 128, break_on_hyphens=False)


def build(results: Path, output: Path, readme: Path | None, card: bool = True) -> None:
    path = results / "selector.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise record.UserError(f"{path}: cannot be read: {error}") from error
    shared = ", ".join(f"{name} {count}" for name, count in content["dev_shared"].items())
    sections = {"subsets": subsets, "transfer": transfer, "claims": claims, "finetune": finetune}
    found = {name: load(results, name) for name in sections}
    rows = {name: rows for name, (rows, _) in found.items()}
    claim_rows = rows["claims"]
    parts = [INTRO.format(shared=shared, dev=content["dev"], triplets=content["triplets"]), shipped(content)]
    parts += [section(rows[name]) for name, section in sections.items() if rows[name]]
    if claim_rows:
        parts.append(parameters(claim_rows, content["parameters"]["encoder"]))
    lines = []
    runs = {"selector": [content["environment"]]} | {name: environments for name, (_, environments) in found.items()}
    for name, environments in runs.items():
        if environments:
            one = environments[0]
            lines.append([name, one["device"], one["date"], one["commit"], f"torch {one['versions']['torch']}"])
    parts += ["## Runs", table(("<results", "<device", "<date", "<commit", "<versions"), lines)]
    write_atomically(output, ("\n\n".join(parts) + "\n").encode())
    if card:
        folder = pretrained.find(MODEL_NAME)
        write_atomically(folder / "README.md", train_selector.card(content, folder).encode())
    if readme is not None:
        insert(readme, START, END, when(content, claim_rows, rows["transfer"], rows["finetune"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=record.RESULTS / "quality")
    parser.add_argument("--output", type=Path, default=record.BENCH / "QUALITY.md")
    parser.add_argument("--readme", type=Path, help="also write the figures between this file's markers")
    options = parser.parse_args()
    try:
        build(options.results, options.output, options.readme)
    except record.UserError as error:
        print(f"quality/report: error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

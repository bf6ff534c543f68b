"""bench/results/quality/*.json to bench/QUALITY.md, docs/quality.md and the README's paragraph of scores: no number by hand.

python bench/quality/report.py --readme README.md --guide docs/quality.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, also where this file is run by its path

import record
from pages import insert, table

from quality import guide, train_selector
from quality import tasks as quality_tasks
from quality.data import TRANSFER, load, spread
from quality.quality import BASE, BOTTLENECK, BOTTLENECKS, PAPER, PRIOR, SCALED, SCALED_ALONE, configuration_of
from quality.quality import RECIPE as claims_recipe
from quality.report_encoders import cells, distilled, finetune, matching, read, speeds, stand_in, truncated, uncut
from s2sent_kernels.checkpoints import pretrained
from s2sent_kernels.files import write_atomically
from s2sent_kernels.tools import evaluation

Row = dict[str, Any]
COLUMNS, TITLES = train_selector.COLUMNS, train_selector.TITLES
# Sections with pages of their own, some of several files.
APART = ("pretrain", "stand-in-frozen", "stand-in-finetune", "stand-in-simcse", "truncated", "speed", "distil")
START, END = "<!-- quality: written by bench/quality/report.py -->", "<!-- quality: end -->"
FORMS = {"paper's formula": PAPER, "+ prior": PRIOR, "+ prior, gate scale": SCALED, "+ gate scale": SCALED_ALONE}

INTRO = """\
# Quality

Written by `bench/quality/report.py` from [results/quality](results/quality), which `bench/quality/train_selector.py` and
`bench/quality/quality.py` measured; no number is typed by hand. Encoder: all-MiniLM-L6-v2, 6 blocks of 384 features. Figures are
Spearman × 100 of cosine similarities, each STS set as one; where there are seeds, the median and in parentheses the lowest and
highest, of three where no other number is given.

Epochs (of {epochs}), and for a shipped selector the learning rate, the bottleneck, the start of the gate scale and the seed,
are selected by the loss of {held_out:,} held-out triplets. That loss compares trainings of one fusion; between fusions it has
another order than the scores. What STS-B dev selects stands beside it, in the shipped selector's section: with the pairs that it
shares with the test sets ({shared}), and without
({dev_apart:,} of {dev:,}). Training: {triplets:,} NLI triplets without the sentences of the STS sets, InfoNCE with hard
negatives, temperature 0.05."""


def baseline_rows(rows: Sequence[Row], *names: str) -> list[list[str]]:
    return [[name, *cells(matching(rows, {"gates": name}))] for name in names if matching(rows, {"gates": name})]


def claimed(rows: Iterable[Row], **settings: Any) -> list[Row]:
    """The rows of exactly these settings, on the base."""
    wanted = BASE | settings
    return [row for row in rows if configuration_of(row) | {"seed": None} == wanted | {"seed": None}]


def by_form(rows: Sequence[Row], title: str, changes: dict[str, Row]) -> str:
    """One table: the base with each change, by each form of the gates."""
    lines = []
    for said, change in changes.items():
        for form, settings in FORMS.items():
            found = claimed(rows, **change, **settings)
            if found:
                lines.append([said, form, *cells(found)])
    return table((f"<{title}", "<gates", *TITLES), lines)


def claims(rows: Sequence[Row]) -> str:
    parts = ["## What each part is worth, encoder frozen"]
    parts.append(
        f"Variations of one base: N = 6 blocks, M = 4 components, H = {BOTTLENECK}, batch norm, gates of the input; by the\n"
        f"paper's formula, with the block prior, and with prior and gate scale. Learning rate {claims_recipe.learning_rate:g}."
    )
    parts += ["### For comparison"]
    lines = baseline_rows(rows, evaluation.MEAN_OF_LAST, evaluation.FIRST_LAST, evaluation.AVERAGE)
    lines += [
        [f"scalar mix of the last {n}", *cells(matching(rows, {"gates": "scalar mix", "N": n}))]
        for n in range(1, 7)
        if matching(rows, {"gates": "scalar mix", "N": n})
    ]
    parts.append(table(("<pooling", *TITLES), lines))
    parts += ["### DCT components", "M = 1 is global average pooling."]
    parts.append(by_form(rows, "M", {str(m): {"M": m} for m in (1, 2, 4, 8, 16)}))
    parts += ["### Blocks", "N = 1 has one gate, which is 1: the mean of the last block."]
    parts.append(by_form(rows, "N", {str(n): {"N": n} for n in range(1, 7)}))
    parts += ["### Bottleneck"]
    parts.append(
        by_form(rows, "H", {str(h): {} if h == BOTTLENECK else {"H": h} for h in sorted((BOTTLENECK, *BOTTLENECKS))})
    )
    parts += ["### Norm and gates", "Constant: f = 0 for every sentence, so that the gates cannot depend on it."]
    changes = {
        f"{'batch' if norm else 'none'}, {gates}": {"norm": norm, "gates": gates}
        for norm in (True, False)
        for gates in ("input", "constant")
    }
    parts.append(by_form(rows, "norm, input", changes))
    parts.append(readings(rows))
    return "\n\n".join(parts)


def _median(rows: Sequence[Row], form: Row, **change: Any) -> float | None:
    found = claimed(rows, **change, **form)
    return statistics.median(row["scores"]["mean"] for row in found) if found else None


def readings(rows: Sequence[Row]) -> str:
    """The tables' differences: medians of the mean of the four sets, against the base or a baseline."""
    mean_of_last = matching(rows, {"gates": evaluation.MEAN_OF_LAST})
    mix = matching(rows, {"gates": "scalar mix", "N": 6})
    against = {}
    if mean_of_last:
        against["the mean of the last block"] = mean_of_last[0]["scores"]["mean"]
    if mix:
        against["the scalar mix"] = statistics.median(row["scores"]["mean"] for row in mix)
    changes: dict[str, Row] = {f"M = {m} over M = 4": {"M": m} for m in (1, 2, 8, 16)}
    changes |= {f"N = {n} over N = 6": {"N": n} for n in (2, 3, 4, 5)}
    changes |= {f"H = {h} over H = {BOTTLENECK}": {"H": h} for h in BOTTLENECKS}
    changes |= {
        "no norm over batch norm": {"norm": False},
        "constant gates over gates of the input": {"gates": "constant"},
    }
    forms = [form for form in FORMS if _median(rows, FORMS[form]) is not None]
    lines = []
    for name, value in against.items():
        lines.append([f"base over {name}", *(_difference(_median(rows, FORMS[form]), value) for form in forms)])
    for name, change in changes.items():
        of = [_difference(_median(rows, FORMS[form], **change), _median(rows, FORMS[form])) for form in forms]
        lines.append([name, *of])
    return "Differences of medians, mean of the four sets:\n\n" + table(("<difference", *forms), lines)


def _difference(value: float | None, against: float | None) -> str:
    return "–" if value is None or against is None else f"{value - against:+.2f}"


def transfer(rows: Sequence[Row]) -> str:
    parts = ["## Transfer of the selector to logistic regression"]
    parts.append(
        "Logistic regression on frozen embeddings, as in SentEval: accuracy × 100, for MRPC also F1. C is selected on dev or on\n"
        "a tenth of the training part; MR is cross-validated in ten folds. None of these sets selected the selector,\n"
        "which is the one shipped at the commit that the last table names."
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


def tasks(rows: Sequence[Row]) -> str:
    """Fusions downwards, tasks to the right: the median accuracy over the seeds; last the mean over the tasks of each seed."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    sizes = "; ".join(
        f"{name} {row['train']:,} / {row['dev']:,} / {row['test']:,}"
        for name in names
        for row in matching(rows, {"task": name})[:1]
    )
    parts = ["## Trained on a task, encoder frozen"]
    parts.append(
        "Fusion and linear head trained together from the cache, accuracy × 100 on the test part. Every fusion had the same\n"
        "search: learning rate 0.001, 0.003 or 0.01 and dropout 0 or 0.2 with the first seed, then the recipe that is best on\n"
        f"dev with three seeds; dev selects the epoch, of 8, too. Texts of train / dev / test: {sizes}."
    )
    lines = []
    for pooling in dict.fromkeys(row["pooling"] for row in rows):
        mine = matching(rows, {"pooling": pooling})
        line = [pooling, f"{mine[0]['features']:,}", f"{mine[0]['parameters']:,}"]
        line += [spread([row["accuracy"] for row in matching(mine, {"task": name})]) for name in names]
        lines.append([*line, spread(_task_means(mine))])
    parts.append(table(("<fusion", "features", "parameters", *names, "mean"), lines))
    return "\n\n".join([*parts, tasks_won(rows)])


def _task_means(rows: Sequence[Row]) -> list[float]:
    """Of one fusion: for each seed the mean over the tasks."""
    return [
        statistics.mean(row["accuracy"] for row in matching(rows, {"seed": seed}))
        for seed in dict.fromkeys(row["seed"] for row in rows)
    ]


def tasks_won(rows: Sequence[Row]) -> str:
    """Which fusion is best on each task and on their mean, and what the DCT components beyond the first add."""
    lines = []
    for task in (*dict.fromkeys(row["task"] for row in rows), None):
        of = guide.on_task(rows, task)
        line = f"* {task or 'mean of the tasks'}: best {guide.best(of)}, {max(of.values()):.2f}"
        if {quality_tasks.ONE_COMPONENT, evaluation.S2SENT} <= set(of):
            line += f"; M = 4 over M = 1: {of[evaluation.S2SENT] - of[quality_tasks.ONE_COMPONENT]:+.2f}"
        if quality_tasks.CONCATENATION in of:
            line += f"; s2sent over concatenation: {of[evaluation.S2SENT] - of[quality_tasks.CONCATENATION]:+.2f}"
        lines.append(line)
    return "\n".join(lines)


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


def parameters(claim_rows: Sequence[Row], encoder: int) -> str:
    lines = []
    for n in range(1, 7):
        for form, settings in FORMS.items():
            found = claimed(claim_rows, N=n, **settings)
            if found:
                count = found[0]["parameters"]
                lines.append([str(n), form, f"{count:,}", f"{100 * count / encoder:.2f} %"])
    head = ("<N", "<gates", "parameters", f"of the encoder's {encoder:,}")
    return "\n\n".join(["## Parameters added", f"H = {BOTTLENECK}, batch norm; M adds none.", table(head, lines)])


def shipped(content: Row) -> str:
    name = content["name"]
    parts = [f"## The selector for {name}"]
    parts += ["Every fusion had the same search over learning rates and epochs.", train_selector.table(content)]
    parts += [
        train_selector.verdict(content),
        *filter(None, [train_selector.widths(content)]),
        "The rule that selected the epoch, and what other rules give:",
    ]
    return "\n\n".join([*parts, train_selector.rules(content)])


def build(results: Path, output: Path, readme: Path | None, guidance: Path | None, card: bool = True) -> None:
    content = read(results / "selector.json")
    selectors = [content, *(read(path) for path in sorted(results.glob("selector-*.json")))]
    shared = ", ".join(f"{name} {count}" for name, count in content["dev_shared"].items())
    sections = {"subsets": subsets, "transfer": transfer, "claims": claims, "tasks": tasks, "finetune": finetune}
    found = {name: load(results, name) for name in (*sections, *APART)}
    rows = {name: rows for name, (rows, _) in found.items()}
    claim_rows = rows["claims"]
    numbers = {name: content[name] for name in ("dev", "dev_apart", "triplets", "held_out")}
    numbers |= {"epochs": train_selector.EPOCHS, "shared": shared}
    parts = [INTRO.format(**numbers), *(shipped(one) for one in selectors)]
    parts += [section(rows[name]) for name, section in sections.items() if rows[name]]
    if all(rows[name] for name in ("stand-in-frozen", "stand-in-finetune", "stand-in-simcse")):
        parts.append(
            stand_in(rows["stand-in-frozen"], rows["stand-in-finetune"], rows["stand-in-simcse"], rows["pretrain"])
        )
    if rows["truncated"]:
        parts.append(truncated([*rows["truncated"], *uncut(selectors)], speeds(results)))
    if rows["distil"]:
        parts.append(distilled(rows["distil"]))
    if claim_rows:
        parts.append(parameters(claim_rows, content["parameters"]["encoder"]))
    lines = []
    runs = {f"selector, {one['name']}": [*one.get("earlier", []), one["environment"]] for one in selectors}
    runs |= {name: environments for name, (_, environments) in found.items()}
    for name, environments in runs.items():
        for one in {(each["device"], each["commit"]): each for each in environments}.values():
            lines.append([name, one["device"], one["date"], one["commit"], f"torch {one['versions']['torch']}"])
    parts += ["## Runs", table(("<results", "<device", "<date", "<commit", "<versions"), lines)]
    write_atomically(output, ("\n\n".join(parts) + "\n").encode())
    if card:
        for one in selectors:
            if one["name"] in pretrained.shipped():
                folder = pretrained.find(one["name"])
                write_atomically(folder / "README.md", train_selector.card(one, folder).encode())
    measured = guide.Results(selectors, *(rows[name.replace("_", "-")] for name in guide.Results._fields[1:]))
    if guidance is not None:
        write_atomically(guidance, guide.page(measured).encode())
    if readme is not None:
        insert(readme, START, END, guide.paragraph(measured))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=record.RESULTS / "quality")
    parser.add_argument("--output", type=Path, default=record.BENCH / "QUALITY.md")
    parser.add_argument("--readme", type=Path, help="also write the figures between this file's markers")
    parser.add_argument("--guide", type=Path, help="also write the page on when to use what")
    options = parser.parse_args()
    try:
        build(options.results, options.output, options.readme, options.guide)
    except record.UserError as error:
        print(f"quality/report: error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

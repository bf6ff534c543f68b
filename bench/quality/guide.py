"""When to use what: docs/quality.md and the README's paragraph. Winners and numbers are read off the results of the experiments;
only the questions are written here."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pages import table

from quality import tasks as on_tasks
from quality import train_selector as shipped
from quality.data import TRANSFER
from s2sent_kernels.tools import evaluation

Row = dict[str, Any]


class Results(NamedTuple):
    selectors: Sequence[Row]  # selector*.json, the bundled encoder's first
    tasks: Sequence[Row]
    transfer: Sequence[Row]
    finetune: Sequence[Row]
    stand_in_frozen: Sequence[Row] = ()
    stand_in_finetune: Sequence[Row] = ()
    stand_in_simcse: Sequence[Row] = ()


Scores = dict[str, float]  # of each fusion, higher is better


def apart(rows: Sequence[Row]) -> Row:
    """What train_selector's tables read, of rows that quality.py wrote one by one."""
    return {
        "published": {},
        "baselines": {row["pooling"]: row["scores"] for row in rows if "seed" not in row},
        "runs": [row for row in rows if "seed" in row],
    }


def frozen(content: Row) -> Scores:
    """Mean of the four STS sets, medians over the seeds."""
    found = {name: values["mean"] for name, values in content["baselines"].items()}
    for pooling in (*shipped.OTHERS, *shipped.SELECTORS):
        if runs := shipped.chosen_runs(content, pooling):
            found[pooling] = shipped.median(runs, "mean")
    return found


def on_task(rows: Sequence[Row], task: str | None = None) -> Scores:
    """Accuracy on a task, or the mean over all of them for each seed; medians over the seeds."""
    of: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if task in (None, row["task"]):
            of.setdefault(row["pooling"], {}).setdefault(row["seed"], []).append(row["accuracy"])
    return {name: statistics.median(map(statistics.mean, seeds.values())) for name, seeds in of.items()}


def transferred(rows: Sequence[Row]) -> Scores:
    of: dict[str, list[float]] = {}
    for row in rows:
        of.setdefault(row["pooling"], []).append(row["accuracy"])
    return {name: statistics.mean(values) for name, values in of.items() if len(values) == len(TRANSFER)}


def fusion_name(row: Row) -> str:
    return row["fusion"] + (f", N = {row['N']}" if "N" in row else "")


def tuned(rows: Sequence[Row]) -> Scores:
    of: dict[str, list[float]] = {}
    for row in rows:
        of.setdefault(fusion_name(row), []).append(row["scores"]["mean"])
    return {name: statistics.median(values) for name, values in of.items()}


def ranked(scores: Mapping[str, float], names: Sequence[str] | None = None) -> str:
    """The best first: "a 2.00; b 1.00"."""
    wanted = [name for name in scores if names is None or name in names]
    return "; ".join(f"{name} {scores[name]:.2f}" for name in sorted(wanted, key=lambda name: -scores[name]))


def best(scores: Mapping[str, float]) -> str:
    """The first, or those that are equal to two digits."""
    return " and ".join(name for name in scores if scores[name] > max(scores.values()) - 0.005)


def cases(results: Results) -> list[tuple[str, str, str]]:
    """What you have, what is best there, and the figures. A case that was not measured is left out."""
    found = []
    for content in results.selectors:
        of = frozen(content)
        case = f"similarity, the encoder frozen: {content['name']}, Spearman × 100, mean of four STS sets"
        found.append((case, best(of), ranked(of)))
    if results.tasks:
        names = _tasks(results.tasks)
        of = on_task(results.tasks)
        found.append(
            (f"a classifier trained on your task, the encoder frozen: mean accuracy of {names}", best(of), ranked(of))
        )
        found.append(components(results.tasks))
    if results.transfer:
        of = transferred(results.transfer)
        found.append(
            ("logistic regression on embeddings made for similarity: mean accuracy of four tasks", best(of), ranked(of))
        )
    if results.finetune:
        of = tuned(results.finetune)
        found.append(
            ("encoder and fusion trained together for similarity: mean of four STS sets", best(of), ranked(of))
        )
    if results.stand_in_frozen:
        of = frozen(apart(results.stand_in_frozen))
        found.append(
            ("similarity, an encoder that was only pre-trained, frozen: mean of four STS sets", best(of), ranked(of))
        )
    for rows, how in (
        (results.stand_in_finetune, "on triplets"),
        (results.stand_in_simcse, "by SimCSE without supervision"),
    ):
        if rows:
            of = tuned(rows)
            found.append((f"the same encoder trained too, {how}: mean of four STS sets", best(of), ranked(of)))
    return found


def _tasks(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(row["task"] for row in rows))


def components(rows: Sequence[Row]) -> tuple[str, str, str]:
    """What the DCT adds to the average over the tokens, task by task."""
    gains = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        of = on_task(rows, task)
        gains[task] = (of[evaluation.S2SENT], of[on_tasks.ONE_COMPONENT])
    told = ", ".join(f"{task} {four:.2f} against {one:.2f}" for task, (four, one) in gains.items())
    most = max(gains, key=lambda task: gains[task][0] - gains[task][1])
    use = "M = 4" if statistics.mean(four - one for four, one in gains.values()) > 0 else "M = 1"
    return f"the same classifiers, four DCT components against one (most on {most})", use, told


def page(results: Results) -> str:
    parts = [
        "# When to use what",
        "Written by `bench/quality/report.py`: winners and numbers are read off its results.\n"
        "[bench/QUALITY.md](../bench/QUALITY.md) has every table, with seeds, ranges and parameters. Where there are seeds, a\n"
        "figure is the median of three. The selector of the logistic regression is the one shipped at the commit that the last\n"
        "table there names.",
        table(("<your case", "<best", "<figures, best first"), cases(results)),
    ]
    return "\n\n".join(parts) + "\n"


def paragraph(results: Results) -> str:
    """The README's, in six lines."""
    of = frozen(results.selectors[0])
    some = (shipped.WIDE, evaluation.S2SENT, evaluation.SCALAR_MIX, evaluation.MEAN_OF_LAST, shipped.PAPER)
    words = f"Best for similarity behind a frozen encoder: {best(of)} ({results.selectors[0]['name']}, mean of four STS sets: "
    words += f"{ranked(of, some)})."
    if results.tasks:
        of = on_task(results.tasks)
        some = (*shipped.SELECTORS, on_tasks.CONCATENATION, evaluation.SCALAR_MIX, evaluation.MEAN_OF_LAST)
        words += f" For a classifier trained behind it: {best(of)} (accuracy on {_tasks(results.tasks)}: {ranked(of, some)})."
    if results.finetune:
        of = tuned(results.finetune)
        over = max(of.values()) - of[evaluation.MEAN_OF_LAST]
        words += f" With the encoder trained too: {best(of)}, by {over:.2f} over mean of last."
    words += " [docs/quality.md](docs/quality.md) has each case."
    # In prose the method has its name; "s2sent" at the start of a line would be the command.
    return textwrap.fill(words.replace("s2sent", "S2Sent"), 128, break_on_hyphens=False)

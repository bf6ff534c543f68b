"""The README's table of what the selector costs and gives, from the results of one H200 and of the quality experiments."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import report_encode
from caller import COMPILED as REFERENCE_COMPILED
from caller import on_backend
from caller_encoder import captured
from contestants import COMPILERS, MEAN_OF_LAST, ONE_PASS, OURS, PROFILES
from encode import PACKED, PADDED
from end_to_end import BASE
from pages import table
from record import Results, Row, UserError
from training_step import WHAT as STEP

from s2sent_kernels.tools import evaluation

START, END = "<!-- costs: written by bench/report.py -->", "<!-- costs: end -->"
CASE = "A"
COMPILED = tuple(f"{PROFILES['paper']}, {compiler}" for compiler in COMPILERS)
NONE = "–"


def costs(results: Results, quality: Path) -> str:
    """A caption and the table: eager calls first, then device time. A row that was not measured is left out. ``quality`` is the
    folder of the quality results."""
    lines = [
        _called(results, "eager, host: embedding of one sentence of 32 tokens", "C", "forward"),
        _called(results, "eager, host: 64 of them, 3 blocks, forward + backward, training", "B", "training"),
        _beside(results, "eager: BERT-base and embeddings, 64 × 32 tokens", "64x32", "BERT-base", "forward"),
        _texts(results, "30,000 Wikipedia sentences to embeddings, MiniLM, tokenization included"),
        _beside(results, "eager: training step of BERT-base, 64 × 32 tokens", "64x32", f"{STEP} BERT-base", "training"),
        _path(results, "sentence embedding, forward", "pooled", "forward"),
        _path(results, "sentence embedding, forward + backward", "pooled", "both"),
        _path(results, "fused tokens, forward", "token", "forward"),
        _path(results, "fused tokens, forward + backward", "token", "both"),
        _memory(results),
        _quality(quality),
    ]
    head = ("<", "this package", "the formula, compiled", "mean of the last block", "floor")
    return "\n\n".join((_caption(results), table(head, [line for line in lines if line[1] != NONE])))


def _caption(results: Results) -> str:
    rows = results.of("paths", case=CASE, contestant=OURS)
    if not rows:
        raise UserError(f"results of {results.device}: expected rows of case {CASE}")
    batch, tokens, blocks, size = rows[0]["shape"]
    device = results.runs[rows[0]["run"]]["device"]
    return (
        f"Time on one {device} in {rows[0]['dtype']}. Eager calls as a program makes them (host: without waiting for the GPU); "
        "the others\nare device time as a CUDA graph, "
        f"{batch} sentences of {tokens} tokens, {blocks} blocks of {size} features. The floor is the memory traffic\nof the path "
        "(tokens: in two passes) at the bandwidth measured in the same run."
    )


def _called(results: Results, text: str, case: str, mode: str) -> tuple[str, ...]:
    """Host time of an eager call of what "auto" takes."""
    mean = "forward" if mode == "forward" else "both"
    rows = (
        results.find("caller", case, "pooled", mode, on_backend("auto")),
        results.find("caller", case, "pooled", mode, REFERENCE_COMPILED),
        results.find("caller", case, "pooled", mean, MEAN_OF_LAST),
    )
    return (text, *(f"{row['host_us']['median']:.0f} µs" if row else NONE for row in rows), NONE)


def _beside(results: Results, text: str, case: str, what: str, mode: str) -> tuple[str, ...]:
    """Wall time of an eager call of what "auto" takes, with what it adds to the baseline."""
    mine, theirs = (results.find("caller", case, what, mode, name) for name in (captured("auto"), BASE))
    added = f" ({100 * mine['overhead']:+.1f} %)" if mine and "overhead" in mine else ""
    times = [f"{row['wall_us']['median'] / 1e3:.2f} ms" if row else NONE for row in (mine, theirs)]
    return (text, times[0] + added, NONE, times[1], NONE)


def _fastest(results: Results, what: str, mode: str, names: Iterable[str]) -> Row | None:
    found = [row for name in names if (row := results.find("paths", CASE, what, mode, name))]
    return min(found, key=lambda row: row["device_us"]["median"], default=None)


def _texts(results: Results, text: str) -> tuple[str, ...]:
    """Texts a second of an Embedder, and of SentenceTransformer.encode at its best batch size."""
    rows = report_encode.of(results, "MiniLM", "corpus")
    mine = max((row["texts_per_s"] for row in rows if row["contestant"] in (PACKED, PADDED)), default=None)
    best = report_encode.best_of_library(rows)
    if mine is None or best is None:
        return (text, NONE, NONE, NONE, NONE)
    return (text, f"{mine:,.0f}/s ({mine / best['texts_per_s']:.1f} ×)", NONE, f"{best['texts_per_s']:,.0f}/s", NONE)


def _path(results: Results, text: str, what: str, mode: str) -> tuple[str, ...]:
    """Of this package what "auto" selects: for tokens without gradients on this GPU that is native's single pass."""
    mine = results.find("paths", CASE, what, mode, OURS)
    selected = _fastest(results, what, mode, (OURS, ONE_PASS)) if mode == "forward" else mine
    others = [_fastest(results, what, mode, names) for names in (COMPILED, (MEAN_OF_LAST,))]
    return (text, *map(_time, (selected, *others)), f"{mine['floor_us']:.0f} µs" if mine else NONE)


def _time(row: Row | None) -> str:
    return f"{row['device_us']['median']:.0f} µs" if row else NONE


def _memory(results: Results) -> tuple[str, ...]:
    peaks = []
    for names in ((OURS,), COMPILED, (MEAN_OF_LAST,)):
        found = [row["peak_mib"] for name in names if (row := results.find("memory", CASE, "pooled", "forward", name))]
        peaks.append(f"{min(found):.0f} MiB" if found else NONE)
    return ("sentence embedding, forward: peak memory beside the hidden states", *peaks, NONE)


def _quality(folder: Path) -> tuple[str, ...]:
    path = folder / "selector.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    chosen = [run for run in content["runs"] if run["pooling"] == evaluation.S2SENT and run["chosen"]]
    mine = statistics.median(run["scores"]["mean"] for run in chosen)
    last = content["baselines"][evaluation.MEAN_OF_LAST]["mean"]
    text = "Spearman × 100, mean of four STS sets, all-MiniLM-L6-v2 frozen"
    return (text, f"{mine:.2f}", NONE, f"{last:.2f}", NONE)

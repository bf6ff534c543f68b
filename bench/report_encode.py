"""The report's section about texts to embeddings, from the rows of encode.py."""

from __future__ import annotations

from collections.abc import Iterator

from encode import BUDGETS, LIBRARY, MODELS, ONE_BY_ONE, PACKED, PADDED, SECTION
from pages import table
from record import Results, Row

MANY = 10**9  # texts, for which the scaling table gives the hours


def of(results: Results, what: str, mode: str) -> list[Row]:
    return [row for row in results.of(SECTION, what=what, mode=mode) if row["status"] == "ok"]


def best_of_library(rows: list[Row]) -> Row | None:
    """SentenceTransformer at its best batch size."""
    names = {name for names in LIBRARY.values() for name in names}
    theirs = [row for row in rows if row["contestant"] in names]
    return max(theirs, key=lambda row: row["texts_per_s"], default=None)


def speed_table(results: Results) -> str:
    lines = []
    for what in MODELS:
        for mode in ("corpus", "one"):
            rows = of(results, what, mode)
            best = best_of_library(rows)
            for row in rows:
                ratio = f"{row['texts_per_s'] / best['texts_per_s']:.2f}" if best else "–"
                peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else "–"
                each = row["cpu_us"]["median"] / int(row["case"].split()[0])
                case = row["case"] if mode == "corpus" else f"{ONE_BY_ONE} texts, one a call"
                lines.append(
                    (
                        what,
                        case,
                        row["contestant"],
                        row["dtype"],
                        f"{row['texts_per_s']:,.0f}",
                        ratio,
                        f"{each:,.0f}",
                        peak,
                    )
                )
    head = ("<model", "<texts", "<contestant", "<dtype", "texts/s", "× library's best", "CPU µs a text", "peak MiB")
    return table(head, lines)


def encoder_table(results: Results) -> str:
    """Texts a second of the encoder and the selector alone."""
    lines = []
    for what in MODELS:
        rows = {row["contestant"]: row["texts_per_s"] for row in of(results, what, "tokens")}
        for budget in sorted({budget for budgets in BUDGETS.values() for budget in budgets}):
            found = [rows.get(f"{name}, {budget} tokens") for name in (PACKED, PADDED)]
            if any(found):
                lines.append((what, f"{budget:,}", *(f"{value:,.0f}" if value else "–" for value in found)))
    return table(("<model", "tokens a batch", "packed, texts/s", "padded, texts/s"), lines)


def dtype_table(results: Results) -> str:
    lines = []
    for what in MODELS:
        for row in of(results, what, "bfloat16"):
            lines.append((what, row["case"], f"{row['cosine']['mean']:.6f}", f"{row['cosine']['least']:.6f}"))
    return table(("<model", "<texts", "cosine to float32, mean", "least"), lines)


def sts_table(results: Results) -> str:
    lines = []
    for row in of(results, "MiniLM", "sts"):
        single, half = row["spearman"]["float32"], row["spearman"]["bfloat16"]
        lines.append((row["case"], f"{single:.3f}", f"{half:.3f}", f"{half - single:+.3f}"))
    return table(("<test split", "float32", "bfloat16", "difference"), lines)


def scaling_table(results: Results) -> str:
    lines = []
    for what in MODELS:
        for row in of(results, what, "command"):
            rate = row["texts_per_s"]
            cores = row["cpu_us"]["median"] / row["wall_us"]["median"] / row["gpus"]
            hours = MANY / rate * row["gpus"] / 3600
            size = f"{row['bytes_a_text'] * MANY / 1e12:.2f}"
            lines.append(
                (what, row["contestant"], f"{rate:,.0f}", f"{cores:.1f}", f"{hours:.1f}", size, f"{row['start_s']:.0f}")
            )
    head = (
        "<model", "<command", "texts/s", "CPU cores a GPU", "GPU hours for 10⁹ texts", "TB for 10⁹ texts", "start, s",
    )  # fmt: skip
    return table(head, lines)


def tables(results: Results) -> Iterator[tuple[str, str]]:
    """Titles and tables, without those that have no rows."""
    for title, text in (
        ("Texts to embeddings", speed_table(results)),
        ("Texts to embeddings: the encoder alone, tokenized beforehand", encoder_table(results)),
        ("Texts to embeddings: bfloat16", dtype_table(results)),
        ("Texts to embeddings: Spearman × 100 of the shipped selector", sts_table(results)),
        ("Texts to embeddings: `s2sent encode`, what each text adds", scaling_table(results)),
    ):
        if text.count("\n") > 1:
            yield title, text

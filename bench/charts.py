"""The report's pictures: each a PNG of one device's results, or None without rows to draw."""

from __future__ import annotations

import io
from typing import Any

from contestants import MEAN_OF_LAST, OURS
from end_to_end import BASE, FED, KEPT, PUBLISHED
from matplotlib.figure import Figure
from record import Results

INK, FAINT, GRID = "#22303c", "#7b8794", "#e3e8ed"
POOLED, TOKEN, OTHER, LOST, LAST = "#0b7a75", "#3d5a98", "#b8c1cb", "#c8553d", "#d98e04"
STYLE = {PUBLISHED: LOST, KEPT: POOLED, FED: "#6dbfb0"}


def _figure(width: float, height: float) -> Figure:
    """Needs no display: no pyplot, no global state."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _plain(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, color=INK, fontsize=12.5, fontweight="bold", x=0.01, ha="left")


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def scaling(results: Results) -> bytes | None:
    """Forward time against tokens and against blocks, with each path's floor."""
    axes_of = {axis: [row for row in results.of("sweep") if row["axis"] == axis] for axis in ("tokens", "blocks")}
    if not any(axes_of.values()):
        return None
    figure = _figure(11, 4.6)
    places = figure.subplots(1, 2)
    for axes, (axis, rows) in zip(places, axes_of.items(), strict=True):
        index = 1 if axis == "tokens" else 2
        lines = (("pooled", OURS, POOLED, "o", "pooled path"), ("token", OURS, TOKEN, "s", "token path"),
                 ("pooled", MEAN_OF_LAST, LAST, "^", "mean of last block"))  # fmt: skip
        for what, name, color, marker, label in lines:
            done = [r for r in rows if (r["what"], r["contestant"], r["status"]) == (what, name, "ok")]
            done.sort(key=lambda row: row["shape"][index])
            at = [row["shape"][index] for row in done]
            if not done:
                continue
            times = [row["device_us"]["median"] for row in done]
            axes.plot(at, times, color=color, marker=marker, markersize=6, linewidth=2, label=label)
            if name == OURS:
                floors = [row["floor_us"] for row in done]
                axes.plot(
                    at,
                    floors,
                    color=color,
                    linestyle=(0, (4, 2)),
                    linewidth=1.4,
                    alpha=0.75,
                    label=f"floor of {what} path",
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({row["shape"][index] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        axes.set_xlabel("tokens L" if axis == "tokens" else "blocks N", color=INK)
        axes.set_ylabel("µs, forward", color=INK)
        if rows:
            batch, tokens, blocks, size = rows[0]["shape"]
            fixed = f"N = {blocks}" if axis == "tokens" else f"L = {tokens}"
            axes.set_title(
                f"B = {batch}, {fixed}, D = {size}, {rows[0]['dtype']}", fontsize=10, color=FAINT, loc="left"
            )
        _plain(axes, "both")
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9.5)
    _title(figure, "Time against tokens and against blocks")
    return _png(figure)


def bandwidth(results: Results) -> bytes | None:
    """Bytes over time of every case's forward, with the ceiling for the same mix of reads and writes."""
    rows = [row for row in results.of("paths", contestant=OURS, mode="forward") if row["status"] == "ok"]
    if not rows:
        return None
    figure = _figure(10, 1.5 + 0.36 * len(rows))
    axes = figure.subplots()
    slow = all((row["read_bytes"] + row["write_bytes"]) / row["floor_us"] < 1e5 for row in rows)
    scale, unit = (1e3, "GB/s") if slow else (1e6, "TB/s")
    for place, row in enumerate(reversed(rows)):
        moved = (row["read_bytes"] + row["write_bytes"]) / scale
        reached, ceiling = moved / row["device_us"]["median"], moved / row["floor_us"]
        color = POOLED if row["what"] == "pooled" else TOKEN
        axes.barh(place, ceiling, height=0.72, color=GRID)
        axes.barh(place, reached, height=0.72, color=color)
        axes.plot([ceiling, ceiling], [place - 0.36, place + 0.36], color=INK, linewidth=1.6)
        share = f"{number(reached)} {unit}, {100 * reached / ceiling:.0f} %"
        inside = reached > 0.45 * ceiling
        axes.text(
            reached - 0.01 * ceiling if inside else reached + 0.01 * ceiling, place, share, va="center",
            ha="right" if inside else "left", color="white" if inside else INK, fontsize=9,
        )  # fmt: skip
    names = [f"{row['case']}  {row['what']}" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), names)
    axes.set_xlabel(
        f"{unit} of the bytes that the path has to move; the line is the ceiling of the same run", color=INK
    )
    axes.margins(y=0.01)
    _plain(axes, "x")
    _title(figure, "Achieved bandwidth against the ceiling, forward")
    return _png(figure)


def beside(results: Results) -> bytes | None:
    """The pooled forward of all contestants, one panel a case, with the floor."""
    rows = [row for row in results.of("paths", what="pooled", mode="forward") if row["status"] == "ok"]
    groups = {case: [row for row in rows if row["case"] == case] for case in dict.fromkeys(row["case"] for row in rows)}
    groups = {case: group for case, group in groups.items() if len(group) > 2}
    if not groups:
        return None
    columns = 2 if len(groups) > 1 else 1
    lines = -(-len(groups) // columns)
    deepest = max(len(group) for group in groups.values())
    figure = _figure(6.2 * columns, 0.7 + lines * (0.85 + 0.29 * deepest))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(groups) :]:
        axes.set_axis_off()
    for axes, (case, group) in zip(grid.flat, groups.items(), strict=False):
        group.sort(key=lambda row: -row["device_us"]["median"])
        times = [row["device_us"]["median"] for row in group]
        colors = [
            POOLED if row["contestant"] == OURS else LAST if row["contestant"] == MEAN_OF_LAST else OTHER
            for row in group
        ]
        axes.barh(range(len(group)), times, color=colors, height=0.72)
        for place, time in enumerate(times):
            axes.annotate(
                number(time), (time, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5
            )
        mine = [row for row in group if row["contestant"] == OURS]
        if mine:
            axes.axvline(mine[0]["floor_us"], color=INK, linestyle=(0, (4, 2)), linewidth=1.3)
        axes.set_yticks(range(len(group)), [row["contestant"] for row in group])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        lowest = min([*times, *(row["floor_us"] for row in mine)])
        axes.set_xlim(lowest / 1.6, max(times) * 2.2)
        axes.minorticks_off()
        shape = "{}, {}, {}, {}".format(*group[0]["shape"])
        axes.set_title(f"{case}: B, L, N, D = {shape}", fontsize=10, color=FAINT, loc="left")
        axes.set_xlabel("µs (log), dashed: floor", color=INK, fontsize=9)
        _plain(axes, "x")
    _title(figure, "Pooled path, forward, beside others")
    return _png(figure)


def overhead(results: Results) -> bytes | None:
    """End to end: percent of time and of peak memory over the encoder with the mean of its last block."""
    rows = [row for row in results.of("end to end") if row["status"] == "ok" and row["contestant"] != BASE]
    rows = [row for row in rows if "overhead" in row]
    if not rows:
        return None
    groups = list(dict.fromkeys((row["what"], row["case"]) for row in rows))
    figure = _figure(12, 1.7 + 0.62 * len(groups))
    places = figure.subplots(1, 2, sharey=True)
    for axes, (name, label) in zip(
        places, (("overhead", "more time, %"), ("peak_overhead", "more peak memory, %")), strict=True
    ):
        values = {(row["what"], row["case"], row["contestant"]): 100 * row[name] for row in rows}
        reach = max(max(values.values()), 1.0)
        for index, (contestant, color) in enumerate(STYLE.items()):
            for place, group in enumerate(reversed(groups)):
                value = values.get((*group, contestant))
                if value is None:
                    continue
                y = place + 0.27 * (1 - index)
                axes.barh(y, value, height=0.25, color=color, label=contestant[2:] if place == 0 else None)
                axes.annotate(
                    f"{value:+.1f}", (max(value, 0), y), xytext=(4, 0), textcoords="offset points", va="center",
                    fontsize=8.5, color=INK,
                )  # fmt: skip
        axes.set_xlim(min(0.0, min(values.values()) * 1.1), reach * 1.14)
        axes.set_xlabel(label, color=INK)
        _plain(axes, "x")
    places[0].set_yticks(range(len(groups)), [f"{what}  {case.replace('x', ' × ')}" for what, case in reversed(groups)])
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9.5)
    _title(figure, "Over an encoder with the mean of its last block")
    return _png(figure)


def memory(results: Results) -> bytes | None:
    """Peak extra memory of all contestants on the largest case (A if measured), forward and forward + backward."""
    rows = [row for row in results.of("memory") if row["status"] == "ok" and row["layout"] == "full"]
    if not rows:
        return None
    case = max(rows, key=lambda row: row["states_mib"])["case"]
    if any(row["case"] == "A" for row in rows):
        case = "A"
    rows = [row for row in rows if row["case"] == case]
    panels = [(what, mode) for what in ("pooled", "token") for mode in ("forward", "both")]
    names = {
        what: list(dict.fromkeys(r["contestant"] for r in rows if r["what"] == what)) for what in ("pooled", "token")
    }
    figure = _figure(13, 2.2 + 0.28 * sum(len(each) for each in names.values()))
    grid = figure.subplots(
        2, 2, squeeze=False, sharey="row", height_ratios=[max(1, len(names["pooled"])), max(1, len(names["token"]))]
    )
    for axes, (what, mode) in zip(grid.flat, panels, strict=True):
        values = {row["contestant"]: row["peak_mib"] for row in rows if (row["what"], row["mode"]) == (what, mode)}
        shown = list(reversed(names[what]))
        for place, name in enumerate(shown):
            if name in values:
                color = (
                    (POOLED if what == "pooled" else TOKEN)
                    if name.startswith(OURS)
                    else LAST
                    if name == MEAN_OF_LAST
                    else OTHER
                )
                axes.barh(place, values[name], color=color, height=0.72)
                axes.annotate(
                    number(values[name]), (values[name], place), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=8.5,
                )  # fmt: skip
        axes.set_yticks(range(len(shown)), shown)
        axes.set_xlim(0, 1.14 * max([*values.values(), 1e-9]))
        axes.set_title(
            f"{what} path, {'forward' if mode == 'forward' else 'forward + backward'}",
            fontsize=10,
            color=FAINT,
            loc="left",
        )
        axes.set_xlabel("MiB", color=INK, fontsize=9)
        _plain(axes, "x")
    _title(figure, f"Peak extra memory, case {case} (its hidden states: {rows[0]['states_mib']:.0f} MiB)")
    return _png(figure)


def encoding(results: Results) -> bytes | None:
    """Texts a second of whole calls, one panel a model."""
    rows = [row for row in results.of("encode", mode="corpus") if row["status"] == "ok"]
    groups = {what: [row for row in rows if row["what"] == what] for what in dict.fromkeys(row["what"] for row in rows)}
    if not groups:
        return None
    figure = _figure(10, 1.2 + 0.4 * max(map(len, groups.values())))
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (what, group) in zip(panels, groups.items(), strict=True):
        for place, row in enumerate(reversed(group)):
            mine = row["contestant"].startswith("Embedder")
            axes.barh(place, row["texts_per_s"], height=0.72, color=POOLED if mine else GRID)
            axes.text(0, place, f"  {row['texts_per_s']:,.0f}", va="center", color="white" if mine else INK, fontsize=9)
        axes.set_yticks(range(len(group)), [row["contestant"] for row in reversed(group)])
        axes.set_xlabel(f"{what}, texts a second", color=INK)
        _plain(axes, "x")
    _title(figure, "From texts to embeddings, tokenization included")
    return _png(figure)

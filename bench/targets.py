"""The targets on one H200 in bfloat16 and on two CPU cores in float32, and how far the results are from them.

A target is a limit on a quantity, which ``value`` finds in the results. First what a caller waits for, in eager calls, then
device time. Ratios to the floor use the ceilings of the same run.
"""

from __future__ import annotations

from dataclasses import dataclass

from caller import EAGER
from caller_encoder import captured, pooled_by
from cases import CALLER
from contestants import ONE_PASS, REFERENCE, SUM
from encode import BUDGETS, LIBRARY, MODELS, PACKED, PADDED
from end_to_end import FED, KEPT
from first_call import CACHED
from first_call import NATIVE as FIRST_NATIVE
from first_call import WHAT as FIRST_CALL
from quantities import (
    Find,
    Value,
    beside,
    called_memory,
    called_over,
    called_overhead,
    first_call,
    host_over_mean,
    host_overhead,
    one_pass_over_floor,
    over,
    over_writer,
    overhead,
    ratio,
    scaled_over_plain,
    slower,
    stage_time,
    texts_a_second,
    texts_over_library,
    time,
    training_over_eval,
)
from training_step import WHAT as STEP

GPU, CPU = "nvidia-h200", "cpu"  # the names of the result files


@dataclass(frozen=True)
class Target:
    text: str
    limit: float
    unit: str  # "x floor", "x", "us", "ms", "%"; or of AT_LEAST
    value: Value
    gap: str = ""  # why the limit is missed, where known from NOTES.md


AUTO = captured("auto")
SEVERAL = tuple(name for name in CALLER if name != "C")  # batch statistics need two sentences
_H200_CALLER = (
    *(
        Target(
            f"{call}, host time over the mean's, {backend}",
            limit,
            "x",
            host_over_mean(CALLER, what, "forward", backend),
        )
        for what, call in (("pooled", "pool"), ("token", "tokens"))
        for backend, limit in (("native", 1.25), ("auto", 1.25), ("triton", 2.0))
    ),
    *(
        Target(
            f"pool, forward + backward, {text}, host time over the mean's, {backend}",
            3.0,
            "x",
            host_over_mean(cases, "pooled", mode, backend),
            "five to nine launches, each through a launcher of Triton in Python" if backend == "triton" else "",
        )
        for mode, text, cases in (("both", "eval mode", CALLER), ("training", "training mode", SEVERAL))
        for backend in ("native", "auto", "triton")
    ),
    *(
        Target(
            f"BERT-base {case.replace('x', ' x ')}, capture.pool over encoder + mean, eager",
            limit,
            "x",
            called_overhead(case, "BERT-base", "forward", AUTO),
            "large states go block by block, three launches a block" if limit < 1.05 else "",
        )
        for case, limit in (("1x32", 1.05), ("8x64", 1.05), ("64x32", 1.05), ("256x128", 1.01))
    ),
    Target(
        "BERT-base 256 x 128, capture.pool, peak memory over encoder + mean",
        3,
        "%",
        called_memory("256x128", "BERT-base", "forward", AUTO),
    ),
    *(
        Target(
            f"SentenceTransformer.encode, {text}, S2SentPooling over Pooling",
            1.05,
            "x",
            called_overhead(case, "encode", "forward", pooled_by("auto")),
        )
        for case, text in (("1", "one sentence"), ("128", "batches of 32"))
    ),
    Target(
        "training step of BERT-base, 64 x 32, over mean pooling",
        1.03,
        "x",
        called_overhead("64x32", f"{STEP} BERT-base", "training", AUTO),
    ),
    *(
        Target(f"first call of a process, {name}", 300, "ms", first_call("C", FIRST_CALL, name), gap)
        for name, gap in (
            (FIRST_NATIVE, ""),
            (CACHED, "Triton's own: 370 ms to hash its installation, 175 to import it"),
        )
    ),
)
EITHER = (KEPT, FED)
_H200_DEVICE = (
    *(
        Target(
            f"{case} pooled forward + backward, batch statistics over running ones",
            limit,
            "x",
            training_over_eval(case),
        )
        for case, limit in (("B", 1.25), ("E", 1.20), ("A", 1.08))
    ),
    *(
        Target(f"{case} {what} {text} with a gate scale over without", 1.01, "x", scaled_over_plain(case, what, mode))
        for case in ("A", "E")
        for what, mode, text in (
            ("pooled", "forward", "forward"),
            ("pooled", "both", "forward + backward"),
            ("token", "forward", "forward"),
        )
    ),
    Target(
        "A squeeze backward over the fastest writer", 1.08, "x", over_writer("A", "squeeze"), "the start of its CTAs"
    ),
    Target(
        "A gate backward",
        40,
        "us",
        stage_time("A", "gate", "backward"),
        "seven launches; float32 products without matrix units",
    ),
    Target(
        "A pooled forward",
        1.20,
        "x floor",
        ratio("A", "pooled"),
        "squeeze reads at 3.9 TB/s and runs before the gate, which adds 40 µs",
    ),
    Target(
        "A pooled forward + backward",
        1.50,
        "x floor",
        ratio("A", "pooled", "both"),
        "the gate's backward is seven launches and 150 µs",
    ),
    Target(
        "E pooled forward",
        1.40,
        "x floor",
        ratio("E", "pooled"),
        "either kernel of squeeze reads it at 3.1 TB/s; the gate adds 30 µs",
    ),
    Target(
        "B pooled forward as a graph",
        10,
        "us",
        time("B", "pooled"),
        "five launches; Triton has two, 12.3 µs here and 11.6 in C",
    ),
    Target("C pooled forward as a graph", 8, "us", time("C", "pooled"), "the same five launches"),
    Target("A token forward, two-pass floor", 1.25, "x floor", ratio("A", "token"), "squeeze, as above; the gate"),
    Target(
        "A token forward + backward, two-pass floor",
        1.40,
        "x floor",
        ratio("A", "token", "both"),
        "the gate's backward, as above",
    ),
    Target(
        "A token forward, one pass over the faster of two",
        1.0,
        "x",
        lambda find: slower(find, "A", "token", ONE_PASS),
        "as for its floor, below",
    ),
    Target(
        "A token forward, one pass over its floor",
        1.35,
        "x",
        one_pass_over_floor,
        "rows of 96 bytes come at 2.7 TB/s, which alone is 1.5 x the floor; squeeze and fuse issue instructions for most of it",
    ),
    Target(
        "A ragged pooled forward over full A",
        0.70,
        "x",
        over("A-ragged", "A", "pooled"),
        "the gate takes as long as for full sentences",
    ),
    Target("D pooled forward", 1.25, "x floor", ratio("D", "pooled"), "the gate's 17 µs; squeeze alone is at 1.17"),
    Target("B token forward as a graph", 12, "us", time("B", "token"), "six launches; Triton has three"),
    Target("A packed over padded, pooled forward", 1.03, "x", over("A-packed", "A-ragged", "pooled")),
    Target(
        "A packed over padded, token forward",
        1.03,
        "x",
        over("A-packed", "A-ragged", "token"),
        "fuse looks up the sentence of every tile of packed tokens",
    ),
    Target(
        "BERT-base 256 x 128, the faster of states kept and block by block",
        1.0,
        "%",
        overhead("256x128", EITHER),
        "the pooled selector alone, at its present speed, is more than this",
    ),
    Target("BERT-base 64 x 32, the faster of both", 2.5, "%", overhead("64x32", EITHER)),
    Target("BERT-base 1 x 32, the faster of both", 2.0, "%", overhead("1x32", EITHER)),
    Target("BERT-base 256 x 128, block by block", 1.5, "%", overhead("256x128", (FED,))),
    Target("BERT-base 256 x 128, peak memory block by block", 3, "%", overhead("256x128", (FED,), "peak_overhead")),
    Target("A pooled forward, float16 over bfloat16", 1.05, "x", over("A-float16", "A", "pooled")),
    Target(
        "A token forward, float16 over bfloat16",
        1.05,
        "x",
        over("A-float16", "A", "token"),
        "two runs: float16's on Triton",
    ),
    Target("A pooled forward, float32 over twice bfloat16", 1.15, "x", over("A-float32", "A", "pooled", 2)),
    Target("A token forward, float32 over twice bfloat16", 1.15, "x", over("A-float32", "A", "token", 2)),
)
_H200 = (*_H200_CALLER, *_H200_DEVICE)

_CPU = (
    Target("pool at 1 x 16 x 6 x 384, time beside the kernels' own", 60, "us", host_overhead("G")),
    *(
        Target(
            f"MiniLM-L6 {case.replace('x', ' x ')}, capture.pool over encoder + mean",
            1.05,
            "x",
            called_overhead(case, "MiniLM-L6", "forward", AUTO),
        )
        for case in ("1x32", "32x32")
    ),
    Target(
        "A-small pooled forward, torch.sum of the same states",
        1.5,
        "x",
        called_over("A-small", "pooled", "forward", SUM),
        "squeeze reads at half of torch.sum's rate, prefetched or not: not understood",
    ),
    Target(
        "A-small token forward, torch.sum of the same states",
        2.5,
        "x",
        called_over("A-small", "token", "forward", SUM),
        "squeeze, as above, and fuse",
    ),
    Target(
        "A-small pooled forward + backward, the reference, eager",
        4,
        "x faster",
        called_over("A-small", "pooled", "both", EAGER, faster=True),
    ),
    *(
        Target(
            f"A-small {what} {text}, the official reference compiled",
            least,
            "x faster",
            beside("A-small", what, mode, REFERENCE, faster=True),
            gap,
        )
        for what, mode, text, least, gap in (
            (
                "pooled",
                "forward",
                "forward",
                5,
                "compiled it takes 3.9 x torch.sum: a fifth of that is less than reading",
            ),
            ("token", "forward", "forward", 4, "two reads and a write of the states take more than a fourth of it"),
            (
                "pooled",
                "both",
                "forward + backward",
                3,
                "the floor, the states read and their gradients written once, is nearly a third of it",
            ),
            ("token", "both", "forward + backward", 3, "the floor is more than a third of it"),
        )
    ),
)
_EMBEDDERS = (PACKED, PADDED)
_H200_ENCODE = (
    *(
        Target(
            f"{text}, {what}, over SentenceTransformer.encode with mean pooling",
            least,
            "x faster",
            texts_over_library(
                case, what, mode, LIBRARY["cuda"] if mode == "corpus" else LIBRARY["cuda"][:1], _EMBEDDERS
            ),
        )
        for text, case, mode, limits in (
            ("Embedder.encode, 30,000 texts", "30000 texts", "corpus", (6, 3)),
            ("Embedder.encode, a text a call", "1 texts", "one", (3, 3)),
        )
        for what, least in zip(MODELS, limits, strict=True)
    ),
    *(
        Target(
            f"{what}, encoder alone, tokenized beforehand, thousand texts a second",
            0.9 * known,
            "k/s",
            texts_a_second("30000 texts", what, tuple(f"{PACKED}, {budget} tokens" for budget in BUDGETS["cuda"])),
        )
        for what, known in zip(MODELS, (105.5, 48.1), strict=True)  # what was known to be possible
    ),
)
_CPU_ENCODE = (
    Target(
        "Embedder.encode, 3,000 texts, MiniLM, over SentenceTransformer.encode with mean pooling",
        1.3,
        "x faster",
        texts_over_library("3000 texts", "MiniLM", "corpus", LIBRARY["cpu"], _EMBEDDERS),
    ),
    Target(
        "Embedder.encode, a text a call, MiniLM, over the same",
        1.0,
        "x faster",
        texts_over_library("1 texts", "MiniLM", "one", LIBRARY["cpu"][:1], _EMBEDDERS),
    ),
)
AT_LEAST = ("x faster", "k/s")  # units whose limit is a lower one
TARGETS = {GPU: (*_H200, *_H200_ENCODE), CPU: (*_CPU, *_CPU_ENCODE)}


def verdicts(find: Find, device: str = GPU) -> list[tuple[str, str, str, str, str]]:
    """For every target: text, limit, value, whether it is met or by how much it is missed, and why it is missed."""
    rows = []
    for target in TARGETS[device]:
        value = target.value(find)
        at_least = target.unit in AT_LEAST
        limit = f"{'≥' if at_least else '≤'} {_number(target.limit, target.unit)}"
        if value is None:
            rows.append((target.text, limit, "–", "not measured", ""))
            continue
        missed = target.limit - value if at_least else value - target.limit
        if missed <= 0:
            verdict = "met"
        elif target.unit == "%":
            verdict = f"missed by {missed:.2f} points"
        else:
            verdict = f"missed by {100 * missed / target.limit:.1f} %"
        rows.append((target.text, limit, _number(value, target.unit), verdict, target.gap if missed > 0 else ""))
    return rows


def _number(value: float, unit: str) -> str:
    if unit == "us":
        return f"{value:.1f} µs"
    if unit == "ms":
        return f"{value:.0f} ms"
    if unit == "k/s":
        return f"{value:.1f}"
    if unit == "%":
        return f"{value:+.2f} %"
    return f"{value:.2f} ×" + {"x floor": " floor", "x faster": " faster"}.get(unit, "")

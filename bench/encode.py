"""Texts to embeddings: Embedder against SentenceTransformer.encode with mean pooling, tokenization included.

    python bench/encode.py --texts FILE [--limit 3000] [--output FILE.json]     # merged into bench/results/<device>.json

The same texts (one a line), the same weights and the same dtype (bfloat16 on a GPU, float32 on a CPU). SentenceTransformer is
measured at several batch sizes, of which the best counts. All contestants of a mode take turns, round by round.

    corpus     all texts in one call
    one        one text a call
    tokens     all texts, tokenized beforehand, at several budgets of tokens: the encoder's share
    bfloat16   cosine of the embeddings to those in float32
    sts        Spearman correlations with both, on the test splits of --sts files; needs the extra evaluate
    command    `s2sent encode` from a text file into a folder of parts, on one GPU and on all: what each text adds, which leaves
               out how long a process takes to start. On GPUs alone

"MiniLM" has the bundled weights and the shipped selector. "BERT-base" is random, 12 blocks of 768, with a selector of all of them
and MiniLM's tokenizer: speed does not depend on weights. Peak memory is that of a call on all texts: on a GPU what PyTorch
allocates beyond the models, on a CPU the largest resident size of a process that loads and runs one contestant.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from end_to_end import ENCODERS
from memory import MIB
from timing import Times, on_gpu

from s2sent_kernels import Embedder, S2SentSelector, loading, quiet, sources
from s2sent_kernels.batch_runner import BatchRunner
from s2sent_kernels.batches import TextTokenizer, cut

SECTION = "encode"
MODELS = ("MiniLM", "BERT-base")
PACKED, PADDED, NO_GRAPH = "Embedder, packed", "Embedder, padded", "Embedder, packed, no graph"
BATCHES = {"cuda": (32, 256, 1024), "cpu": (16, 32, 64)}
BUDGETS = {"cuda": (8192, 32768, 131072), "cpu": (512, 1024, 4096)}
ONE_BY_ONE = 100  # texts of the mode "one"
LIMIT = 256  # tokens of a text
PAIR = ("sentence1", "sentence2")
COMMAND_TIMES = (4, 32)  # how often the texts are repeated in the two runs of the mode "command"
PART_ROWS = 32768  # of its parts, so that two GPUs get as many
SAME = {torch.float32: 1 - 1e-6, torch.bfloat16: 0.999}  # cosine of packed and padded embeddings


def sentence_transformer(batch: int) -> str:
    return f"SentenceTransformer, mean, batch {batch}"


LIBRARY = {device: tuple(map(sentence_transformer, batches)) for device, batches in BATCHES.items()}


# ---------------------------------------------------------------- contestants


class Folder:
    """An encoder with its tokenizer in a folder, and a selector."""

    def __init__(self, name: str, encoder: str | None, temporary: Path, sts: list[str]) -> None:
        self.name = name
        self.sts = sts if name == "MiniLM" else []  # random weights have no quality
        bundled, _ = sources.find_model(encoder)
        if name == "MiniLM":
            self.path, self.selector = bundled, sources.BUNDLED
            return
        self.path, self.selector = str(temporary / name), str(temporary / f"{name}-selector")
        if not Path(self.path).exists():
            shape = next(shape for shape in ENCODERS if shape.name == name)
            shape.build("cpu", torch.float32).save_pretrained(self.path)
            quiet.quiet_transformers().AutoTokenizer.from_pretrained(bundled).save_pretrained(self.path)
            torch.manual_seed(0)
            S2SentSelector(shape.size, shape.blocks, 32, 4).eval().save_pretrained(self.selector)

    def embedder(self, device: str, dtype: torch.dtype, **options: Any) -> Embedder:
        return Embedder.from_pretrained(self.path, self.selector, dtype, device, max_length=LIMIT, **options)

    def sentence_transformer(self, device: str, dtype: torch.dtype) -> Any:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling

        transformer = Transformer(self.path, model_kwargs={"dtype": dtype})
        transformer.max_seq_length = LIMIT
        pooling = Pooling(transformer.get_embedding_dimension(), "mean")
        return SentenceTransformer(modules=[transformer, pooling], device=device).eval()


class Contestants:
    """Functions of texts, by name; each gives an array in host memory."""

    def __init__(self, folder: Folder, device: str, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype

    def corpus(self, names: tuple[str, ...] | None = None) -> dict[str, Callable[[list[str]], Any]]:
        found: dict[str, Callable[[list[str]], Any]] = {}
        batches = {sentence_transformer(batch): batch for batch in BATCHES[self.device]}
        wanted = (*batches, PACKED, PADDED) if names is None else names
        if any(name in batches for name in wanted):
            model = self.folder.sentence_transformer(self.device, self.dtype)
        for name in wanted:
            if name in batches:
                found[name] = partial(model.encode, batch_size=batches[name], show_progress_bar=False)
            else:
                embedder = self.folder.embedder(self.device, self.dtype, packed=name == PACKED)
                found[name] = partial(embedder.encode, progress=False)
        return found

    def one(self) -> dict[str, Callable[[list[str]], Any]]:
        names = (sentence_transformer(BATCHES[self.device][0]), PACKED, PADDED)
        found = self.corpus(names)
        if self.device == "cuda":
            embedder = self.folder.embedder(self.device, self.dtype, cuda_graphs=False)
            found[NO_GRAPH] = partial(embedder.encode, progress=False)
        return found

    def tokens(self, texts: list[str]) -> dict[str, Callable[[], Any]]:
        pipeline = loading.load_parts(self.folder.path, self.folder.selector).pipeline
        pipeline.encoder.to(self.dtype)
        tokenizer = TextTokenizer(self.folder.embedder("cpu", torch.float32, packed=False).tokenizer, LIMIT)
        tokens = tokenizer(texts)
        found = {}
        for packed in (True, False):
            runner = BatchRunner(pipeline.to(self.device), tokenizer, packed, None)
            for budget in BUDGETS[self.device]:
                rows = cut(tokens.lengths, budget, padded=not packed)
                name = f"{PACKED if packed else PADDED}, {budget} tokens"
                found[name] = lambda runner=runner, rows=rows: [r.wait() for r in [runner(tokens, row) for row in rows]]
        return found


# ---------------------------------------------------------------- measuring


class Samples:
    """Wall time, and the CPU time of the whole process: on a busy machine the latter is steadier. Microseconds."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def time(self, call: Callable[[], Any]) -> None:
        begin, cpu = time.perf_counter(), time.process_time()
        call()  # its result is in host memory
        self.wall.append((time.perf_counter() - begin) * 1e6)
        self.cpu.append((time.process_time() - cpu) * 1e6)

    def mean_of_last(self, count: int) -> None:
        """Replace the last samples by their mean."""
        for each in (self.wall, self.cpu):
            each[-count:] = [sum(each[-count:]) / count]


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Samples]:
    """A sample of each call a round, after a round that does not count. The order is turned round by round."""
    found = {name: Samples() for name in calls}
    for call in calls.values():
        call()
    for repeat in range(repeats):
        for name in list(calls)[:: -1 if repeat % 2 else 1]:
            found[name].time(calls[name])
    return found


def rows_of(model: str, mode: str, texts: int, times: dict[str, Samples], dtype: torch.dtype) -> list[record.Row]:
    rows = []
    for name, samples in times.items():
        wall = Times.of(samples.wall)
        rows.append(
            {
                "section": SECTION,
                "case": f"{texts} texts",
                "what": model,
                "mode": mode,
                "contestant": name,
                "dtype": str(dtype).removeprefix("torch."),
                "status": "ok",
                "wall_us": wall.as_dict(),
                "cpu_us": Times.of(samples.cpu).as_dict(),
                "texts_per_s": texts / wall.median * 1e6,
            }
        )
    return rows


def cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return (found * wanted).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1))


def corpus(contestants: Contestants, texts: list[str], repeats: int) -> list[record.Row]:
    calls = contestants.corpus()
    cosine = float(cosines(calls[PACKED](texts), calls[PADDED](texts)).min())
    agreement = {"ok": cosine >= SAME[contestants.dtype], "cosine": cosine}
    model = contestants.folder.name
    times = in_turn({name: partial(call, texts) for name, call in calls.items()}, repeats)
    rows = rows_of(model, "corpus", len(texts), times, contestants.dtype)
    for row in rows:
        if row["contestant"] in (PACKED, PADDED):
            row["agreement"] = agreement
            if not agreement["ok"]:
                row["status"] = "parity failed"
        if on_gpu():
            row["peak_mib"] = _allocated(partial(calls[row["contestant"]], texts))
    return rows


def _allocated(call: Callable[[], Any]) -> float:
    """MiB of a GPU's memory that a call allocates at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def one(contestants: Contestants, texts: list[str], repeats: int) -> list[record.Row]:
    """Each text in a call of its own, contestants in turn at each; a sample is the mean over the texts."""
    calls = contestants.one()
    some = texts[:ONE_BY_ONE]
    for call in calls.values():
        for text in some:  # also every graph's capture
            call([text])
    found = {name: Samples() for name in calls}
    for _ in range(repeats):
        for text in some:
            for name, call in calls.items():
                found[name].time(partial(call, [text]))
        for samples in found.values():
            samples.mean_of_last(len(some))
    return rows_of(contestants.folder.name, "one", 1, found, contestants.dtype)


def tokens(contestants: Contestants, texts: list[str], repeats: int) -> list[record.Row]:
    times = in_turn(contestants.tokens(texts), repeats)
    return rows_of(contestants.folder.name, "tokens", len(texts), times, contestants.dtype)


def bfloat16(contestants: Contestants, texts: list[str], repeats: int) -> list[record.Row]:
    folder, device = contestants.folder, contestants.device
    each = [folder.embedder(device, kind).encode(texts, progress=False) for kind in (torch.bfloat16, torch.float32)]
    found = cosines(*each)
    row = {
        "section": SECTION,
        "case": f"{len(texts)} texts",
        "what": folder.name,
        "mode": "bfloat16",
        "contestant": PACKED,
        "status": "ok",
        "cosine": {"mean": float(found.mean()), "least": float(found.min())},
    }
    return [row]


def sts(contestants: Contestants, texts: list[str], repeats: int) -> list[record.Row]:
    from s2sent_kernels.tools import evaluation, scores

    folder, rows = contestants.folder, []
    embedders = {kind: folder.embedder(contestants.device, kind) for kind in (torch.float32, torch.bfloat16)}
    for path in folder.sts:
        pairs = evaluation.read_sts(path)
        found = {}
        for kind, embedder in embedders.items():
            both = (embedder.encode([getattr(pair, name) for pair in pairs], progress=False) for name in PAIR)
            similar = cosines(*both).tolist()
            name = str(kind).removeprefix("torch.")
            found[name] = scores.correlations(similar, [pair.score for pair in pairs]).spearman
        rows.append(
            {
                "section": SECTION,
                "case": Path(path).stem,
                "what": folder.name,
                "mode": "sts",
                "contestant": PACKED,
                "status": "ok",
                "spearman": found,
            }
        )
    return rows


def command(contestants: Contestants, texts: list[str], repeats: int) -> list[record.Row]:
    """Two runs on each number of GPUs, of which one has more texts: their difference is what those add."""
    if contestants.device == "cpu":
        return []
    rows = []
    for gpus in sorted({1, torch.cuda.device_count()}):
        some, more = (_command(contestants.folder, texts, times, gpus) for times in COMMAND_TIMES)
        count = len(texts) * (COMMAND_TIMES[1] - COMMAND_TIMES[0])
        wall, cpu, size = (last - first for first, last in zip(some, more, strict=True))
        rows.append(
            {
                "section": SECTION,
                "case": f"{count} texts",
                "what": contestants.folder.name,
                "mode": "command",
                "contestant": f"s2sent encode, {gpus} GPU{'s' * (gpus > 1)}",
                "status": "ok",
                "gpus": gpus,
                "wall_us": Times.of([wall * 1e6]).as_dict(),
                "cpu_us": Times.of([cpu * 1e6]).as_dict(),
                "texts_per_s": count / wall,
                "bytes_a_text": size / count,
                "start_s": some[0] - wall * COMMAND_TIMES[0] / (COMMAND_TIMES[1] - COMMAND_TIMES[0]),
            }
        )
    return rows


def _command(folder: Folder, texts: list[str], times: int, gpus: int) -> tuple[float, float, int]:
    """Seconds, seconds of CPU, and bytes written."""
    with tempfile.TemporaryDirectory() as made:
        source, target = Path(made, "texts.txt"), Path(made, "out")
        source.write_text("\n".join(texts * times) + "\n", encoding="utf-8")
        line = [sys.executable, "-m", "s2sent_kernels.cli", "encode", source, "--output", f"{target}/"]
        line += ["--model", folder.path, "--selector", folder.selector, "--max-length", LIMIT, "--part-rows", PART_ROWS]
        line += ["--device", *(f"cuda:{index}" for index in range(gpus))]
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(list(map(str, line)), check=True, capture_output=True)
        wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return wall, cpu, sum(path.stat().st_size for path in target.glob("part-*"))


MODES = {"corpus": corpus, "one": one, "tokens": tokens, "bfloat16": bfloat16, "sts": sts, "command": command}


# ---------------------------------------------------------------- memory of a process


def peak_of_process(arguments: argparse.Namespace, model: str, contestant: str, temporary: Path) -> float:
    """MiB that a process of its own has resident at its peak."""
    command = [sys.executable, __file__, "--texts", arguments.texts, "--limit", str(arguments.limit), "--models", model]
    command += ["--peak-of", contestant, "--temporary", str(temporary)]
    if arguments.encoder is not None:
        command += ["--encoder", arguments.encoder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_mib"]


def report_own_peak(contestants: Contestants, name: str, texts: list[str]) -> None:
    contestants.corpus((name,))[name](texts)
    # Not getrusage, whose peak includes that of the process before it ran this program. Linux counts in KiB.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    print(json.dumps({"peak_mib": int(peak) / 1024}))


# ---------------------------------------------------------------- command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", required=True, help="a text file, one text a line")
    parser.add_argument("--limit", type=int, default=3000, help="texts (default: 3000)")
    parser.add_argument("--output", help="merged with what is there (default: bench/results/<device>.json)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--encoder", help="folder of all-MiniLM-L6-v2 (default: the registry package's)")
    parser.add_argument("--sts", nargs="*", default=[], help="files for the mode sts, as `s2sent evaluate` takes them")
    parser.add_argument("--no-memory", action="store_true", help="without a process for each contestant's peak memory")
    parser.add_argument("--temporary", help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    device = "cuda" if on_gpu() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    texts = Path(arguments.texts).read_text(encoding="utf-8").splitlines()[: arguments.limit]
    with tempfile.TemporaryDirectory() as made:
        temporary = Path(arguments.temporary or made)
        if arguments.peak_of is not None:
            folder = Folder(arguments.models[0], arguments.encoder, temporary, [])
            report_own_peak(Contestants(folder, device, dtype), arguments.peak_of, texts)
            return 0
        output = Path(arguments.output or record.RESULTS / f"{record.slug()}.json")
        results = record.Record(output, record.environment(), record.slug())
        for model in arguments.models:
            contestants = Contestants(Folder(model, arguments.encoder, temporary, arguments.sts), device, dtype)
            for mode in arguments.modes:
                rows = MODES[mode](contestants, texts, arguments.repeats)
                if mode == "corpus" and device == "cpu" and not arguments.no_memory:
                    for row in rows:
                        row["peak_mib"] = peak_of_process(arguments, model, row["contestant"], temporary)
                results.add(rows)
                for row in rows:
                    print(line_of(row), flush=True)
    return 0


def line_of(row: record.Row) -> str:
    if row["mode"] == "sts":
        value = ", ".join(f"{name} {score:.3f}" for name, score in row["spearman"].items()) + f"  {row['case']}"
    elif row["mode"] == "bfloat16":
        value = f"cosine {row['cosine']['mean']:.6f}, at least {row['cosine']['least']:.6f}"
    else:
        value = f"{row['texts_per_s']:9.1f} texts/s, {row['cpu_us']['median'] / 1e6:8.3f} s of CPU"
    peak = f"  {row['peak_mib']:7.0f} MiB" if "peak_mib" in row else ""
    failed = "" if row["status"] == "ok" else f"  {row['status']}"
    return f"{row['what']:10} {row['mode']:8} {row['contestant']:40} {value}{peak}{failed}"


if __name__ == "__main__":
    sys.exit(main())

"""Measures the method's claims on all-MiniLM-L6-v2: what each part of the selector is worth, behind a frozen encoder and behind
one that is trained too, and how the shipped selector does beyond similarity.

    python bench/quality/quality.py claims   --data FOLDER     tables over M, N, prior, norm, gates of the input or constant
    python bench/quality/quality.py subsets  --data FOLDER     the shipped selector on every subset of the STS sets
    python bench/quality/quality.py transfer --data FOLDER     logistic regression on the shipped selector's embeddings
    python bench/quality/quality.py tasks    --data FOLDER     selectors and other fusions trained on classification
    python bench/quality/quality.py finetune --data FOLDER     encoder and fusion trained together, same budget for all
    python bench/quality/quality.py truncated --data FOLDER    fusions behind the first blocks of the encoder alone
    python bench/quality/quality.py distil   --data FOLDER --teacher FOLDER --texts FILE    from all-mpnet-base-v2's similarities
    python bench/quality/quality.py speed    --data FOLDER     texts a second of the first blocks; on an idle machine
    python bench/quality/report.py                             bench/results/quality/*.json to bench/QUALITY.md

Behind an encoder that was only pre-trained, which bench/quality/pretrain.py makes, with --encoder FOLDER:

    ... quality.py stand-in-frozen   --data FOLDER             as the shipped selector is trained, beside other fusions
    ... quality.py stand-in-finetune --data FOLDER             encoder and fusion trained together
    ... quality.py stand-in-simcse   --data FOLDER --texts FILE    the same without supervision, on sentences

bench/quality/data.py describes the folder. A GPU is used if there is one. Every configuration is trained from three seeds, and
nothing is selected on a reported set. --part I/K measures one of K parts, for several processes at once; --missing leaves out
the claims and the fine-tuned configurations that were measured before.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, also where this file is run by its path

import record
import torch

from quality import distil, finetune, tasks, train_selector
from quality.data import MAX_LENGTH, SEEDS, TRANSFER, Data, Frozen, arguments, averages, load, load_encoder, spearman
from quality.encoders import BUNDLED, STAND_IN, Encoder
from quality.train_selector import EPOCHS, GATE_SCALE
from s2sent_kernels import Embedder, S2SentSelector, cache, frozen
from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.checkpoints import pretrained
from s2sent_kernels.export import Pipeline
from s2sent_kernels.tools import evaluation

Row = dict[str, Any]

HIDDEN, BOTTLENECK = 384, 32
RECIPE = frozen.Recipe(epochs=EPOCHS)
BASE = {"N": 6, "M": 4, "norm": True, "gates": "input"}  # and H = 32
# "scale" is where the gate scale starts; a row without one, as a row without H, is of the time before it was varied.
PAPER: Row = {"prior": False}
PRIOR: Row = {"prior": True}
SCALED: Row = {"prior": True, "scale": GATE_SCALE}
SCALED_ALONE: Row = {"prior": False, "scale": GATE_SCALE}
TOKEN_FREQUENCIES = 6  # M = 16 on 6 blocks needs y up to 5
BOTTLENECKS = (8, 16, 64, 128)  # beside the base's
VARIED = ("N", "M", "H", "norm", "gates", "prior", "scale", "seed")


def claims_configurations() -> list[Row]:
    """Variations of one base, each by the paper's formula, with the prior, and with prior and gate scale; a configuration in
    several tables is trained once."""
    varied: list[Row] = [{"M": m} for m in (1, 2, 4, 8, 16)] + [{"N": n} for n in range(1, 7)]
    norms: list[Row] = [{"norm": norm, "gates": gates} for norm in (True, False) for gates in ("input", "constant")]
    wanted = [BASE | change | form for change in varied + norms for form in (PRIOR, PAPER)]
    wanted += [BASE | change | SCALED for change in [*varied, {"norm": False}]]
    wanted += [BASE | {"H": bottleneck} | form for bottleneck in BOTTLENECKS for form in (PRIOR, SCALED)]
    wanted += [BASE | SCALED_ALONE]
    found: list[Row] = []
    for row in wanted:
        if row not in found:
            found.append(row)
    return found + [{"N": n, "gates": "scalar mix"} for n in range(1, 7)]


def configuration_of(row: Row) -> Row:
    return {name: row[name] for name in VARIED if name in row}


def claims(options: Any) -> Iterator[Row]:
    data = Data.read(options.data)
    cached = Frozen(data, options.cache, options.model, options.device, TOKEN_FREQUENCIES)
    index, parts = options.part
    # Sorted by (N, M), so that the features of each are gathered once.
    configurations = sorted(claims_configurations(), key=lambda row: (row["N"], row.get("M", 4)))
    if options.missing:
        there = [configuration_of(row) for row in load(options.output, "claims")[0]]
        configurations = [
            row for row in configurations if any(row | {"seed": seed} not in there for seed in options.seeds)
        ]
    bounds = [len(configurations) * part // parts for part in (index, index + 1)]
    for configuration in configurations[slice(*bounds)]:
        num_blocks, frequencies = configuration["N"], configuration.get("M", 4)
        for seed in options.seeds:
            start = time.perf_counter()
            torch.manual_seed(seed)
            module: torch.nn.Module
            if configuration["gates"] == "scalar mix":
                module = frozen.ScalarMix(num_blocks)
            else:
                module = S2SentSelector(
                    HIDDEN, num_blocks, configuration.get("H", BOTTLENECK), frequencies,
                    block_prior=configuration["prior"], gate_scale=configuration.get("scale"),
                    gate_norm="batch" if configuration["norm"] else None, backend="reference",
                )  # fmt: skip
            run = cached.train(
                module, RECIPE._replace(seed=seed), num_blocks, frequencies, configuration["gates"] == "constant"
            )
            seconds = time.perf_counter() - start
            print(f"{configuration} seed {seed}: mean {run['scores']['mean']:.2f}, {seconds:.1f} s", flush=True)
            yield configuration | {"seed": seed} | run
    if index == 0 and not options.missing:
        for name, found in cached.averages(6, 4).items():
            yield {"gates": name, "scores": found, "parameters": 0}


def _shipped(options: Any) -> tuple[S2SentSelector, frozen.ScalarMix]:
    name = BUNDLED if options.selector is None else options.selector
    selector = S2SentSelector.from_pretrained(name, backend="reference").to(options.device)
    weights = pretrained.read_config(pretrained.find(name))["scalar_mix"]
    return selector, frozen.ScalarMix.of_weights(weights).to(options.device)


def _embed_shipped(options: Any) -> evaluation.Embed:
    """A function from texts to their embeddings by the shipped selector and by every other pooling."""
    encoder, tokenizer = load_encoder(options.model, options.device)
    selector, mix = _shipped(options)
    modules = {evaluation.S2SENT: selector, evaluation.SCALAR_MIX: mix}

    def embed(texts: Any) -> dict[str, torch.Tensor]:
        return evaluation.side_by_side(encoder, tokenizer, texts, modules, max_length=MAX_LENGTH, progress=True)

    return embed


def subsets(options: Any) -> Iterator[Row]:
    """Spearman on every subset of the test sets, pairs of one source, from the cache."""
    cached = Frozen(Data.read(options.data), options.cache, options.model, options.device, options.token_frequencies)
    selector, mix = _shipped(options)
    _, sts = cached.features(selector.num_blocks, selector.frequencies)
    embeddings = averages(sts.pooled)
    embeddings |= {
        evaluation.S2SENT: frozen.embed_all(selector, sts),
        evaluation.SCALAR_MIX: frozen.embed_all(mix, sts),
    }
    place = {text: row for row, text in enumerate(cached.sts_texts)}
    for name, pairs in cached.data.tests.items():
        parts: dict[str, list[evaluation.Pair]] = {}
        for pair in pairs:
            # STS-B gives genre/source/year; only genres have enough pairs.
            parts.setdefault(pair.subset.partition("/")[0], []).append(pair)
        for part, some in parts.items():
            for pooling, values in embeddings.items():
                found = spearman(values, place, some)
                yield {"set": name, "subset": part, "pairs": len(some), "pooling": pooling, "spearman": found}


def transfer(options: Any) -> Iterator[Row]:
    embed = _embed_shipped(options)
    index, parts = options.part
    for task, file in list(TRANSFER.items())[index::parts]:
        splits = evaluation.read_transfer(options.data / f"transfer/{file}.tsv")
        found = evaluation.transfer(embed, splits)
        for pooling, accuracy in found.items():
            row = {"task": task, "pooling": pooling, **accuracy._asdict()}
            print(row, flush=True)
            yield row


def _every_fusion(cached: Frozen, encoder: Encoder) -> Iterator[Row]:
    """The fusions that are not trained, and the runs of the shipped selector's search."""
    content, _ = train_selector.measure(cached, encoder, [])
    for name, found in content["baselines"].items():
        yield {"pooling": name, "scores": found, "parameters": 0, "chosen": True}
    yield from content["runs"]


def stand_in_frozen(options: Any) -> Iterator[Row]:
    cached = Frozen(Data.read(options.data), options.cache, options.model, options.device, options.token_frequencies)
    yield from _every_fusion(cached, STAND_IN)


def truncated(options: Any) -> Iterator[Row]:
    """Every fusion behind the first K blocks of the encoder; its other blocks are not computed."""
    data = Data.read(options.data)
    index, parts = options.part
    for blocks in options.blocks[index::parts]:
        cached = Frozen(data, options.cache, options.model, options.device, options.token_frequencies, blocks=blocks)
        for row in _every_fusion(cached, STAND_IN):
            yield row | {"blocks": blocks, "of": _all_blocks(options)}


def _all_blocks(options: Any) -> int:
    return load_encoder(options.model, "cpu")[0].config.num_hidden_layers


def speed(options: Any) -> Iterator[Row]:
    """Texts of the STS sets a second, by the first K blocks of the encoder with a selector of all of them."""
    texts = cache.unique(Data.read(options.data).sts_texts())[: options.limit]
    for blocks in options.blocks:
        rate = texts_per_second(texts, options.model, options.device, blocks)
        print(f"{blocks} blocks: {rate:.0f} texts/s", flush=True)
        yield {"blocks": blocks, "of": _all_blocks(options), "texts": len(texts), "texts_per_second": rate}


def texts_per_second(texts: Sequence[str], model: str | None, device: str, blocks: int) -> float:
    """Of the first blocks with a selector of all of them, tokenization included, in the device's own dtype: the median of
    three rounds."""
    encoder, tokenizer = load_encoder(model, device, blocks)
    if device.startswith("cuda"):
        encoder.to(torch.bfloat16)
    selector = S2SentSelector(encoder.config.hidden_size, blocks, BOTTLENECK, block_prior=True).to(device)
    embedder = Embedder(Pipeline(BlockCapture(encoder), selector.eval()).eval(), tokenizer, max_length=MAX_LENGTH)
    rates = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        embedder.encode(texts, progress=False)
        rates.append(len(texts) / (time.perf_counter() - start))
    return statistics.median(rates[1:])


SECTIONS = {
    "claims": claims,
    "subsets": subsets,
    "transfer": transfer,
    "tasks": tasks.measure,
    "finetune": finetune.measure,
    "truncated": truncated,
    "speed": speed,
    "distil": distil.measure,
    "stand-in-frozen": stand_in_frozen,
    "stand-in-finetune": finetune.stand_in,
    "stand-in-simcse": finetune.simcse,
}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--part", default="0/1", type=lambda text: tuple(int(part) for part in text.split("/")))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of claims and finetune (default: all)")
    parser.add_argument(
        "--missing", action="store_true", help="of claims and fine-tuning: only what no file of --output has"
    )
    parser.add_argument("--file", help="name of the results' file without its ending (default: the section's)")
    parser.add_argument("--selector", help="folder of a selector, for transfer (default: the shipped one)")
    parser.add_argument("--epochs", type=int, help="of fine-tuning (default: 3, of the stand-in 1)")
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=(2, 3, 4, 5, 6), help="of truncated, speed (default: 2 to 6)"
    )
    parser.add_argument("--texts", type=Path, help="of stand-in-simcse and distil: a file of sentences, one a line")
    parser.add_argument("--teacher", help="of distil: the folder of all-mpnet-base-v2")
    parser.add_argument("--limit", type=int, help="triplets or texts at most, to try the scripts")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "quality")
    options = parser.parse_args()
    # TF32: fine-tuning is bound by matrix products. Training from the cache has next to none.
    fine_tuned = options.section in ("finetune", "stand-in-finetune", "stand-in-simcse")
    torch.set_float32_matmul_precision("high" if fine_tuned else "highest")
    index, parts = options.part
    name = options.section if parts == 1 else f"{options.section}-{index}-of-{parts}"
    if tuple(options.seeds) != SEEDS:  # a file of their own
        name += "-seeds-" + "-".join(map(str, options.seeds))
    path = options.output / f"{options.file or name}.json"
    content: Row = {"section": options.section, "environment": record.environment(), "rows": []}
    for row in SECTIONS[options.section](options):
        content["rows"].append(row)
        record.write(path, content)  # after every row: what is measured is kept if the rest fails
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

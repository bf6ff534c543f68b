"""Trains the selector that the package ships for an encoder, measures it beside other fusions, and writes its model card.

    python bench/quality/train_selector.py --data FOLDER                                    # all-MiniLM-L6-v2, bundled
    python bench/quality/train_selector.py --data FOLDER --name all-mpnet-base-v2 --encoder FOLDER --results FILE --output FOLDER

bench/quality/data.py describes the folder of data. The encoder is frozen: one pass fills a cache, then every training needs
seconds. Every fusion has the same search: its learning rates, three seeds, the epoch. All of it is selected by the loss of
held-out triplets. The card shows beside it what STS-B dev selects, with and without the pairs that it shares with the test sets,
and the last epoch of the budget. The rule is not blind: STS-B dev selected first, and was given up after its test scores were
known.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, also where this file is run by its path

import record
import torch
from pages import table as markdown

from quality import fusions
from quality.card import CARD, command
from quality.data import CHOSEN_ON, SEEDS, TESTS, Data, Frozen, arguments, best_epoch, scores, spread
from quality.encoders import BUNDLED, ENCODERS, Encoder
from s2sent_kernels import S2SentSelector, frozen
from s2sent_kernels.checkpoints import pretrained
from s2sent_kernels.files import data_folder, write_atomically
from s2sent_kernels.tools import evaluation

FREQUENCIES = 4
GATE_SCALE = 4.0
STARTS = (2.0, GATE_SCALE)  # of the gate scale
LEARNING_RATES = (1e-3, 3e-3)
MAP_RATES = (1e-5, 1e-4)  # a map that starts as the identity is lost at the selector's
EPOCHS = 5
UNSCALED, PAPER, WIDE = "s2sent without gate scale", "s2sent, the paper's formula", "s2sent, several widths"
CONSTANT, LINEAR = "constant gates", "linear map of the last"
OTHERS = (evaluation.SCALAR_MIX, CONSTANT, LINEAR, PAPER)
SELECTORS = (
    UNSCALED,
    evaluation.S2SENT,
    WIDE,
)  # the last one is shipped, the held-out loss compares trainings of one form
WIDTHS = (64, 128, 256, 512)  # numbers of first features, beside all
RESULTS = record.RESULTS / "quality"
RESULT = RESULTS / "selector.json"
BEFORE = RESULTS / "before-gate-scale.json"  # what was shipped for the bundled encoder until then

Run = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    pooling: str
    learning_rate: float
    bottleneck: int | None = None  # of a selector
    start: float | None = None  # of a selector's gate scale

    def build(self, num_blocks: int, hidden_size: int) -> torch.nn.Module:
        if self.bottleneck is not None:
            return S2SentSelector(
                hidden_size,
                num_blocks,
                self.bottleneck,
                FREQUENCIES,
                block_prior=self.pooling in SELECTORS,
                gate_scale=self.start,
                backend="reference",
            )
        if self.pooling == CONSTANT:
            return fusions.ConstantGates(num_blocks, hidden_size)
        return fusions.LinearMap(hidden_size) if self.pooling == LINEAR else frozen.ScalarMix(num_blocks)

    def said(self) -> str:
        """What was selected, for a table."""
        told = f"{self.learning_rate:g}" + ("" if self.bottleneck is None else f", H = {self.bottleneck}")
        return told + ("" if self.start is None else f", scale from {self.start:g}")


def settings(encoder: Encoder) -> Iterator[Setting]:
    for bottleneck in encoder.bottlenecks:
        for form in (evaluation.S2SENT, WIDE)[: 2 if encoder.published else 1]:
            for start in STARTS:
                yield from (Setting(form, rate, bottleneck, start) for rate in LEARNING_RATES)
        yield from (Setting(UNSCALED, rate, bottleneck) for rate in LEARNING_RATES)
    yield from (Setting(PAPER, rate, encoder.bottlenecks[0]) for rate in LEARNING_RATES)
    # The scalar mix is a prior alone, and the prior's learning rate does not vary.
    yield Setting(evaluation.SCALAR_MIX, LEARNING_RATES[0])
    yield from (Setting(CONSTANT, rate) for rate in LEARNING_RATES)
    yield from (Setting(LINEAR, rate) for rate in MAP_RATES)


def widths_of(cached: Frozen) -> tuple[int, ...]:
    return tuple(width for width in WIDTHS if width < cached.hidden_size)


def trained(cached: Frozen, setting: Setting, seed: int) -> tuple[torch.nn.Module, Run]:
    start = time.perf_counter()
    torch.manual_seed(seed)
    module = setting.build(cached.num_blocks, cached.hidden_size)
    widths = widths_of(cached) if setting.pooling == WIDE else ()
    recipe = frozen.Recipe(epochs=EPOCHS, learning_rate=setting.learning_rate, seed=seed, widths=widths)
    run = cached.train(module, recipe, cached.num_blocks, FREQUENCIES)
    run |= asdict(setting) | {"seed": seed, "recipe": recipe._asdict()}
    scale = getattr(module, "gate_scale", None)
    run |= {"gate_scale": None if scale is None else scale.item(), "seconds": time.perf_counter() - start}
    line = ", ".join(f"{name} {value:.2f}" for name, value in run["scores"].items())
    print(f"{setting}, seed {seed}: {run['seconds']:.1f} s, epoch {run['epoch']}, {line}", flush=True)
    return module, run


def setting_of(run: Run) -> Setting:
    return Setting(*(run[name] for name in ("pooling", "learning_rate", "bottleneck", "start")))


def median(runs: list[Run], name: str) -> float:
    return statistics.median(run["scores"][name] for run in runs)


def select(runs: list[Run]) -> None:
    """Mark each fusion's best setting by its median over the seeds, and of the selector's the run that is shipped."""
    best: dict[str, list[Run]] = {}
    for pooling in dict.fromkeys(run["pooling"] for run in runs):
        groups: dict[Setting, list[Run]] = {}
        for run in runs:
            if run["pooling"] == pooling:
                groups.setdefault(setting_of(run), []).append(run)
        best[pooling] = max(groups.values(), key=lambda group: median(group, CHOSEN_ON))
    # The forms that differ in their loss alone are compared. The scalar mix's weights are in the selector's configuration.
    forms = [best[form] for form in (evaluation.S2SENT, WIDE) if form in best]
    shipped = [max(forms, key=lambda group: median(group, CHOSEN_ON)), best[evaluation.SCALAR_MIX]]
    ship = [max(group, key=lambda run: run["scores"][CHOSEN_ON]) for group in shipped]
    for run in runs:
        run["chosen"] = any(run is one for one in best[run["pooling"]])
        run["shipped"] = any(run is one for one in ship)


def shipped_run(content: Run) -> Run:
    return next(run for run in content["runs"] if run["shipped"] and run["pooling"] in SELECTORS)


def chosen_runs(content: Run, pooling: str) -> list[Run]:
    return [run for run in content["runs"] if run["pooling"] == pooling and run["chosen"]]


def cut(embeddings: torch.Tensor, cached: Frozen) -> dict[str, float]:
    """The mean of the four sets by the first features alone, for each of the widths and all."""
    return {
        str(width): scores(embeddings[:, :width], cached.sts_texts, cached.data)["mean"]
        for width in (*widths_of(cached), cached.hidden_size)
    }


# ---------------------------------------------------------------- pages

COLUMNS = ("dev apart", *TESTS, "mean")
TITLES = ("STS-B dev, unshared", "STS12", "STS14", "STS16", "STS-B test", "mean of the four")


def table(content: Run) -> str:
    """Every fusion on every set, at the setting that was selected for it; over seeds the median, the lowest and the highest."""
    rows = []
    if content["published"]:
        published = content["published"]
        mean = statistics.mean(published[name] for name in TESTS)
        rows.append(
            [
                "mean of last, published",
                "–",
                *(f"{published[name]:.2f}" for name in TESTS),
                f"{mean:.2f}",
                "–",
                "–",
                "–",
            ]
        )
    for name, values in content["baselines"].items():
        rows.append([name, *(f"{values[column]:.2f}" for column in COLUMNS), f"{-values[CHOSEN_ON]:.3f}", "–", "0"])
    for pooling in (*OTHERS, *SELECTORS):
        runs = chosen_runs(content, pooling)
        if runs:
            told = setting_of(runs[0]).said()
            values = [spread([run["scores"][column] for run in runs]) for column in COLUMNS]
            loss = f"{-median(runs, CHOSEN_ON):.3f}"
            rows.append([pooling, *values, loss, told, f"{runs[0]['parameters']:,}"])
    if "half" in content:  # of what is not shipped there is none
        one, half = shipped_run(content), content["half"]
        values = [f"{half[column]:.2f}" for column in COLUMNS]
        rows.append([f"**shipped**, seed {one['seed']}, half precision", *values, "–", "–", f"{one['parameters']:,}"])
    return markdown(("<pooling", *TITLES, "held-out loss", "learning rate", "parameters"), rows)


RULES: dict[str, Callable[[Run], int]] = {
    "held-out triplets": best_epoch,
    "STS-B dev without the shared pairs": lambda run: best_epoch(run, "dev apart"),
    "all of STS-B dev": lambda run: best_epoch(run, "dev"),
    f"nothing: the last of {EPOCHS} epochs": lambda run: EPOCHS,
}


def rules(content: Run) -> str:
    """What each way to select the epoch gives: the mean of the four, and its difference to the mean of the last block."""
    last = content["baselines"][evaluation.MEAN_OF_LAST]["mean"]
    rows = []
    for setting in dict.fromkeys(setting_of(run) for run in content["runs"] if run["pooling"] in SELECTORS):
        runs = [run for run in content["runs"] if setting_of(run) == setting]
        for name, rule in RULES.items():
            epochs = [rule(run) for run in runs]
            values = [run["by_epoch"][epoch]["mean"] for run, epoch in zip(runs, epochs, strict=True)]
            over = f"{statistics.median(values) - last:+.2f}"
            rows.append([setting.pooling, setting.said(), name, ", ".join(map(str, epochs)), spread(values), over])
    head = ["<pooling", "learning rate", "<epoch selected on", "epochs", "mean of the four", "over mean of last"]
    return markdown(head, rows)


def widths(content: Run) -> str:
    """The shipped selector's embeddings and the mean of the last block, cut to their first features; of a selector that was
    trained for that."""
    if not shipped_run(content)["recipe"].get("widths"):
        return ""
    names = list(content["cut"]["shipped"])
    rows = [[name, *(f"{values[width]:.2f}" for width in names)] for name, values in content["cut"].items()]
    table = markdown(("<mean of the four, first features", *names), rows)
    return f"Embeddings may be cut to their first features:\n\n{table}"


def verdict(content: Run) -> str:
    """By how much the selected selector's medians are above the other fusions', on each set."""
    pooling = shipped_run(content)["pooling"]
    mine = {name: median(chosen_runs(content, pooling), name) for name in (*TESTS, "mean")}
    against = {evaluation.MEAN_OF_LAST: content["baselines"][evaluation.MEAN_OF_LAST]}
    for other in (evaluation.SCALAR_MIX, CONSTANT, LINEAR, *SELECTORS):
        runs = chosen_runs(content, other)
        if runs and other != pooling:
            against[other] = {name: median(runs, name) for name in mine}
    if "before" in content:
        against["what was shipped before"] = content["before"]
    rows = [[name, *(f"{mine[key] - values[key]:+.2f}" for key in mine)] for name, values in against.items()]
    return markdown((f"<{pooling}, over", *TITLES[1:]), rows)


def card(content: Run, folder: Path) -> str:
    """The model card of the selector in ``folder``."""
    module, mix = S2SentSelector.from_pretrained(folder), pretrained.read_config(folder)["scalar_mix"]
    run, own = shipped_run(content), content["parameters"]
    scale = module.gate_scale
    assert module.block_prior is not None
    several = ", ".join(map(str, run["recipe"].get("widths", ())))
    return CARD.format(
        **{name: value for name, value in run["recipe"].items() if name != "widths"},
        over=f"the mean over the first {several} and all features,\n" if several else "",
        widths="\n\n".join(filter(None, [widths(content), ""])),
        name=content["name"],
        blocks=module.num_blocks,
        bottleneck=module.bottleneck,
        frequencies=module.frequencies,
        scale=f", gate scale from {run['start']:g}",
        parameters=own["selector"],
        encoder=own["encoder"],
        percent=100 * own["selector"] / own["encoder"],
        triplets=content["triplets"],
        held_out=content["held_out"],
        dev=content["dev"],
        apart=content["dev_apart"],
        shared=", ".join(f"{name} {count}" for name, count in content["dev_shared"].items()),
        command=command(content["name"]),
        seeds=", ".join(map(str, SEEDS)),
        table=table(content),
        verdict=verdict(content),
        rules=rules(content),
        mix=", ".join(f"{weight:.3f}" for weight in mix),
        prior=", ".join(f"{value:.2f}" for value in module.block_prior.tolist()),
        learned_scale="" if scale is None else f"; its gate scale: {scale.item():.2f}",
    )


# ---------------------------------------------------------------- the command


def measure(
    cached: Frozen, encoder: Encoder, known: Sequence[Run]
) -> tuple[Run, dict[tuple[Setting, int], torch.nn.Module]]:
    """Everything trained and scored but ``known`` runs, and the modules that are shipped."""
    data = cached.data
    content: Run = {
        "environment": record.environment(),
        "name": encoder.name,
        "published": encoder.published,
        "baselines": cached.averages(cached.num_blocks, FREQUENCIES),
        "triplets": len(cached.rows[0]),
        "held_out": len(cached.held) // 3,
        "dev": len(data.dev),
        "dev_apart": len(data.dev_apart),
        "dev_shared": data.dev_shared,
    }
    if encoder.name == BUNDLED and BEFORE.exists():
        before = [run for run in json.loads(BEFORE.read_text(encoding="utf-8"))["runs"] if run["chosen"]]
        runs = [run for run in before if run["pooling"] == evaluation.S2SENT]
        content["before"] = {name: median(runs, name) for name in (*TESTS, "mean")}
    print(content["baselines"], flush=True)
    modules = {}
    runs = []
    for setting in settings(encoder):
        for seed in SEEDS:
            there = [run for run in known if setting_of(run) == setting and run["seed"] == seed]
            if not there:
                modules[setting, seed], run = trained(cached, setting, seed)
            runs.append(there[0] if there else run)
    select(runs)
    for run in runs:
        if run["shipped"] and (setting_of(run), run["seed"]) not in modules:  # the same seed gives the same bits
            modules[setting_of(run), run["seed"]], _ = trained(cached, setting_of(run), run["seed"])
    return content | {"runs": runs}, modules


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--name", choices=ENCODERS, default=BUNDLED, help=f"which encoder (default: {BUNDLED})")
    parser.add_argument("--output", type=Path, help="the selector's folder (default: the package's)")
    parser.add_argument("--results", type=Path, help="the results' file (default: of bench/results/quality)")
    parser.add_argument("--resume", action="store_true", help="use the runs that are in --results")
    options = parser.parse_args()
    if options.name != BUNDLED and options.model is None:
        parser.error(f"--encoder: expected the folder of {options.name}, which is not bundled")
    encoder = ENCODERS[options.name]
    output = options.output or data_folder() / encoder.name
    result = options.results or (RESULT if encoder.name == BUNDLED else RESULTS / f"selector-{encoder.name}.json")
    cached = Frozen(
        Data.read(options.data),
        options.cache,
        options.model,
        options.device,
        options.token_frequencies,
        encoder.max_length,
    )
    before = json.loads(result.read_text(encoding="utf-8")) if options.resume else {"runs": []}
    content, modules = measure(cached, encoder, before["runs"])
    if options.resume:
        content["earlier"] = [*before.get("earlier", []), before["environment"]]
    final = shipped_run(content)
    mix_run = next(run for run in content["runs"] if run["shipped"] and run["pooling"] == evaluation.SCALAR_MIX)
    selector, mix = (modules[setting_of(run), run["seed"]] for run in (final, mix_run))
    assert isinstance(selector, S2SentSelector) and isinstance(mix, frozen.ScalarMix)
    half = copy.deepcopy(selector).half()
    _, sts = cached.features(cached.num_blocks, FREQUENCIES)
    embeddings = frozen.embed_all(half, sts)
    content |= {
        "half": scores(embeddings, cached.sts_texts, cached.data),
        "cut": {
            evaluation.MEAN_OF_LAST: cut(sts.pooled[:, -1], cached),
            "shipped": cut(embeddings, cached),
        },
        "parameters": {"selector": final["parameters"], "encoder": cached.encoder_parameters},
    }
    record.write(result, content)
    about = {
        "encoder": f"sentence-transformers/{encoder.name}",
        "blocks": list(range(cached.num_blocks)),
        "pooling": "mean",
        "max_length": encoder.max_length,
        "scalar_mix": mix.block_prior.softmax(dim=0).tolist(),
    }
    half.save_pretrained(output, about=about)
    write_atomically(output / "README.md", card(content, output).encode())
    print(f"{table(content)}\n\n{verdict(content)}\n\n{rules(content)}\n\n{output}, {result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

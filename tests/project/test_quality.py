"""The scripts behind bench/QUALITY.md, on small data made here: selection, training, the written pages."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("transformers")
sys.path.insert(0, str(next(f for f in Path(__file__).parents if (f / "bench/suite.py").is_file()) / "bench"))

import pages
import record
from quality import data, finetune, quality, report, train_selector
from quality import tasks as on_tasks
from quality.encoders import STAND_IN

from s2sent_kernels import S2SentSelector, frozen
from s2sent_kernels.tools import evaluation

ROOT, RESULTS = record.BENCH.parent, record.RESULTS / "quality"
ENVIRONMENT = {"device": "A CPU", "date": "2026-01-01", "commit": "abc", "versions": {"torch": "2"}}


def scores(value):
    return {
        "dev": value,
        "dev apart": 100 - value,
        "held out": -value,
        **dict.fromkeys(data.TESTS, value),
        "mean": value,
    }


@pytest.fixture
def data_folder(tmp_path):
    (tmp_path / "nli").mkdir()
    (tmp_path / "sts").mkdir()
    (tmp_path / "nli" / "nli_triplets.tsv").write_text(
        "anchor\tpositive\tnegative\tsource\na\tb\tc\tmade\nd\te\tf\tmade\n"
    )
    header = "split\tscore\tsentence1\tsentence2\tsubset\n"
    dev = "dev\t1\tA cat.\tA dog.\tx\ndev\t2\tOne.\tTwo.\tx\ndev\t3\tThree.\tFour.\tx\n"
    own = "test\t4\tFive.\tSix.\tx\ntest\t5\tSeven.\tEight.\tx\n"
    (tmp_path / "sts" / "stsb.tsv").write_text(header + dev + own)
    for name, shared in (("sts12", "a  DOG.\ta cat."), ("sts14", "One.\tOther."), ("sts16", "Four.\tThree.")):
        (tmp_path / "sts" / f"{name}.tsv").write_text(f"{header}test\t0\t{shared}\tx\n{own}")
    return tmp_path


def test_pairs_that_dev_shares_with_a_test_set_are_counted_and_set_apart(data_folder):
    read = data.Data.read(data_folder)
    assert read.triplets == [("a", "b", "c"), ("d", "e", "f")]
    assert read.dev_shared == {"STS12": 1, "STS14": 0, "STS16": 1, "STS-B": 0}
    assert len(read.dev) == 3
    assert [(pair.sentence1, pair.sentence2) for pair in read.dev_apart] == [("One.", "Two.")]


def test_every_claim_is_varied_with_and_without_prior_and_gate_scale_and_trained_once():
    found = quality.claims_configurations()
    assert all(found.count(row) == 1 for row in found)
    gated = [row for row in found if row["gates"] in ("input", "constant")]
    for form in (quality.PAPER, quality.PRIOR, quality.SCALED):
        mine = [row for row in gated if form.items() <= row.items() and ("scale" in form) == ("scale" in row)]
        assert {row["M"] for row in mine} == {1, 2, 4, 8, 16}
        assert {row["N"] for row in mine} == set(range(1, 7))
    for form in (quality.PRIOR, quality.SCALED):
        assert {row["H"] for row in gated if form.items() <= row.items() and "H" in row} == set(quality.BOTTLENECKS)
    assert [row["N"] for row in found if row["gates"] == "scalar mix"] == list(range(1, 7))
    for row in gated:
        S2SentSelector(quality.HIDDEN, row["N"], 2, row["M"])  # exists


@pytest.mark.parametrize("configuration", finetune.STAND_IN_CONFIGURATIONS, ids=str)
def test_every_fusion_gives_embeddings_and_gradients(configuration):
    fusion = finetune.build(configuration)
    states = [torch.randn(3, 5, 384, requires_grad=True) for _ in range(fusion.num_blocks)]
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] + [0] * 4])
    embeddings = fusion(states, mask)
    assert embeddings.shape == (3, 384)
    if configuration["fusion"] == evaluation.MEAN_OF_LAST:
        torch.testing.assert_close(embeddings[1], states[0][1, :3].mean(dim=0))
    embeddings.square().sum().backward()
    assert all(state.grad.abs().sum() > 0 for state in states)


def content():
    recipe = {
        "epochs": 2,
        "batch_size": 4,
        "temperature": 0.05,
        "learning_rate": 1e-3,
        "prior_learning_rate": 1e-2,
        "weight_decay": 0.0,
        "seed": 0,
    }
    runs = []
    for kind, base in ((evaluation.SCALAR_MIX, 60.0), (evaluation.S2SENT, 70.0)):
        for seed in (0, 1, 2):
            by_epoch = [scores(base), *(scores(base + seed + epoch) for epoch in range(1, train_selector.EPOCHS + 1))]
            runs.append(
                {
                    "pooling": kind,
                    "learning_rate": 1e-3,
                    "seed": seed,
                    "recipe": recipe,
                    "epoch": 2,
                    "by_epoch": by_epoch,
                    "scores": by_epoch[2],
                    "chosen": True,
                    "shipped": seed == 2,
                    "parameters": 10,
                    "bottleneck": 2 if kind == evaluation.S2SENT else None,
                    "start": 4.0 if kind == evaluation.S2SENT else None,
                }
            )
    runs += [run | {"learning_rate": 3e-3, "chosen": False, "shipped": False} for run in runs[3:]]
    return {
        "environment": ENVIRONMENT,
        "baselines": {evaluation.MEAN_OF_LAST: scores(50.0)},
        "runs": runs,
        "triplets": 2,
        "held_out": 1,
        "dev": 3,
        "dev_apart": 1,
        "dev_shared": {"STS12": 2},
        "parameters": {"selector": 10, "encoder": 1000},
        "name": "all-MiniLM-L6-v2",
        "published": dict.fromkeys(data.TESTS, 51.0),
        "half": scores(74.25),
    }


def test_the_tables_of_the_shipped_selector():
    table = train_selector.table(content())
    assert "| mean of last, published | – | 51.00 | 51.00 |" in table
    assert "| s2sent | 27.00 (26.00–28.00) | 73.00 (72.00–74.00) |" in table
    assert "| 73.000 | 0.001, H = 2, scale from 4 | 10 |" in table
    assert "| **shipped**, seed 2, half precision | 25.75 | 74.25 |" in table
    rules = train_selector.rules(content())
    assert (
        "| s2sent | 0.001, H = 2, scale from 4 | STS-B dev without the shared pairs | 1, 1, 1 | 72.00 (71.00–73.00) | +22.00 |"
        in rules
    )
    assert (
        "| s2sent | 0.003, H = 2, scale from 4 | all of STS-B dev | 5, 5, 5 | 76.00 (75.00–77.00) | +26.00 |" in rules
    )
    assert "| nothing: the last of 5 epochs | 5, 5, 5 | 76.00 (75.00–77.00) | +26.00 |" in rules
    assert "| mean of last | +23.00 | +23.00 | +23.00 | +23.00 | +23.00 |" in train_selector.verdict(content())


@pytest.mark.parametrize(
    ("wide", "best"), [(0.5, train_selector.WIDE), (2.0, evaluation.S2SENT)], ids=["several widths", "one"]
)
def test_settings_are_selected_by_the_loss_of_held_out_triplets(wide, best):
    runs = [run for run in content()["runs"] if run["pooling"] == evaluation.SCALAR_MIX]
    for pooling in train_selector.SELECTORS:
        for rate, value in ((1e-3, 20.0), (3e-3, 10.0)):
            for seed in (0, 1, 2):
                # The lower the better on held-out triplets. The forms of another formula are not compared.
                offset = {evaluation.S2SENT: 1.0, train_selector.WIDE: wide}.get(pooling, 0.0)
                found = scores(value + seed + offset)
                runs.append(runs[0] | {"pooling": pooling, "learning_rate": rate, "seed": seed, "scores": found})
    train_selector.select(runs)
    chosen = [run for run in runs if run["chosen"] and run["pooling"] in train_selector.SELECTORS]
    assert {run["learning_rate"] for run in chosen} == {3e-3} and len(chosen) == 9
    shipped = [(run["pooling"], run["seed"]) for run in runs if run["shipped"]]
    assert shipped == [(evaluation.SCALAR_MIX, 0), (best, 0)]


def test_every_fusion_starts_as_the_mean_of_the_last_block_or_near_it():
    pooled = torch.randn(5, 3, 8)
    features = frozen.Features(torch.randn(5, 8), pooled)
    torch.testing.assert_close(train_selector.Setting(train_selector.LINEAR, 1e-4).build(3, 8)(features), pooled[:, -1])
    gates = train_selector.Setting(train_selector.CONSTANT, 1e-3).build(3, 8)
    weights = torch.tensor([0.0, 0.0, 3.0]).softmax(dim=0)
    torch.testing.assert_close(gates(features), torch.einsum("n,bnd->bd", weights, pooled))
    for pooling in (train_selector.PAPER, *train_selector.SELECTORS):
        selector = train_selector.Setting(pooling, 1e-3, 2).build(3, 8)
        assert (selector.block_prior is not None) == (pooling in train_selector.SELECTORS)
        assert selector.gate_scale is None
    assert train_selector.Setting(evaluation.S2SENT, 1e-3, 2, 4.0).build(3, 8).gate_scale == 4.0


def test_the_report_is_made_of_the_results_and_fills_the_readme(tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    (results / "selector.json").write_text(json.dumps(content()))
    claims = []
    for place, row in enumerate(quality.claims_configurations()):
        claims += [row | {"seed": seed, "scores": scores(40.0 + place + seed), "parameters": 7} for seed in (0, 1, 2)]
    tuned = []
    for place, row in enumerate(finetune.CONFIGURATIONS):
        for seed in (0, 1, 2):
            after = scores(80.0 + place + seed / 10)
            tuned.append(
                row
                | {
                    "seed": seed,
                    "scores": after,
                    "by_epoch": [scores(1.0), after],
                    "epochs": 1,
                    "triplets": 2,
                    "batch": 4,
                }
            )
    transfer = [
        {"task": task, "pooling": pooling, "accuracy": 90.0 + place, "f1": 5.0}
        for task in data.TRANSFER
        for place, pooling in enumerate((evaluation.MEAN_OF_LAST, evaluation.S2SENT, evaluation.AVERAGE))
    ]
    tasks = [
        {
            "task": task,
            "pooling": pooling,
            "seed": seed,
            "accuracy": value + seed,
            "features": 8,
            "parameters": 1,
            "train": 5,
            "dev": 1,
            "test": 1,
        }
        for task, one in (("MR", 84.0), ("TREC", 82.0))
        for pooling, value in (
            (evaluation.MEAN_OF_LAST, 79.0),
            (on_tasks.ONE_COMPONENT, one),
            (evaluation.S2SENT, 84.0),
        )
        for seed in (0, 1, 2)
    ]
    subsets = [
        {"set": "STS12", "subset": "part", "pairs": 9, "pooling": pooling, "spearman": value, "pearson": 0.0}
        for pooling, value in ((evaluation.MEAN_OF_LAST, 10.0), (evaluation.S2SENT, 11.0))
    ]
    for name, rows in (
        ("claims-0-of-2", claims[:9]),
        ("claims-1-of-2", claims[9:]),
        ("transfer", transfer),
        ("finetune", tuned),
        ("subsets", subsets),
        ("tasks", tasks),
    ):
        (results / f"{name}.json").write_text(json.dumps({"environment": ENVIRONMENT, "rows": rows}))
    readme, output = tmp_path / "README.md", tmp_path / "QUALITY.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    card = tmp_path / "card"
    S2SentSelector(8, 2, 2, 2, block_prior=True).save_pretrained(card)
    about = json.loads((card / "config.json").read_text())
    (card / "config.json").write_text(json.dumps(about | {"scalar_mix": [0.5, 0.5]}))
    monkeypatch.setattr(report.pretrained, "find", lambda _: card)
    guide = tmp_path / "guide.md"
    report.build(results, output, readme, guide)

    text = output.read_text(encoding="utf-8")
    assert "| 1 | + prior | 59.00 (58.00–60.00) | 41.00 (40.00–42.00) |" in text  # M = 1, the first configuration
    assert "on 1 of 1 parts" in text
    assert "| average of blocks | 92.00 | 92.00 | 92.00 | 92.00 / 5.00 | 92.00 |" in text
    first, last = (
        f"| {name} | 3 | {100 - value:.2f}" for name, value in (("s2sent + prior, N = 6", 84.1), ("mean of last", 80.1))
    )
    assert text.index(first) < text.index(last)
    told = " ".join(readme.read_text(encoding="utf-8").split())
    assert told.startswith("before")
    assert told.endswith("after")
    assert "old" not in told
    assert (
        "behind a frozen encoder: S2Sent (all-MiniLM-L6-v2, mean of four STS sets: S2Sent 73.00; scalar mix 63.00;"
        in told
    )
    assert "For a classifier trained behind it: S2Sent (accuracy on MR, TREC: S2Sent 85.00; mean of last 80.00)" in told
    assert "With the encoder trained too: S2Sent + prior, gate scale, N = 6, by 5.00 over mean of last." in told
    cases = guide.read_text(encoding="utf-8")
    assert "all-MiniLM-L6-v2, Spearman × 100, mean of four STS sets | s2sent | s2sent 73.00; scalar mix 63.00;" in cases
    assert (
        "mean accuracy of four tasks | average of blocks | average of blocks 92.00; s2sent 91.00; mean of last 90.00 |"
        in cases
    )
    assert "(most on TREC) | M = 4 | MR 85.00 against 85.00, TREC 85.00 against 83.00 |" in cases
    assert "seeds 0, 1, 2" in (card / "README.md").read_text(encoding="utf-8")


def test_a_report_without_results_or_markers_says_so(tmp_path):
    with pytest.raises(record.UserError, match=r"selector\.json: cannot be read"):
        report.build(tmp_path, tmp_path / "QUALITY.md", None, None)
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(record.UserError, match="expected the markers"):
        pages.insert(readme, report.START, report.END, "text")
    assert readme.read_text() == "no markers"


def test_the_committed_report_is_what_the_committed_results_give(tmp_path):
    committed = {
        name: (ROOT / name).read_text(encoding="utf-8") for name in ("bench/QUALITY.md", "README.md", "docs/quality.md")
    }
    readme = tmp_path / "README.md"
    readme.write_text(committed["README.md"])
    report.build(RESULTS, tmp_path / "QUALITY.md", readme, tmp_path / "quality.md", card=False)
    assert (tmp_path / "quality.md").read_text(encoding="utf-8") == committed["docs/quality.md"]
    assert (tmp_path / "QUALITY.md").read_text(encoding="utf-8") == committed["bench/QUALITY.md"]
    assert readme.read_text(encoding="utf-8") == committed["README.md"]


# ---------------------------------------------------------------- what was measured


@pytest.mark.parametrize(
    "file, published",
    [
        ("selector.json", [72.37, 75.60, 78.99, 82.03]),
        ("selector-all-mpnet-base-v2.json", [72.63, 78.01, 80.02, 83.42]),
    ],
)
def test_the_shipped_selector_is_above_what_it_is_measured_by(file, published):
    measured = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    last = measured["baselines"][evaluation.MEAN_OF_LAST]
    assert [round(last[name], 2) for name in data.TESTS] == published
    assert [measured["published"][name] for name in data.TESTS] == pytest.approx(published, abs=0.011)
    chosen = {
        kind: [run for run in measured["runs"] if run["pooling"] == kind and run["chosen"]]
        for kind in (evaluation.S2SENT, evaluation.SCALAR_MIX)
    }
    for runs in chosen.values():
        assert sorted(run["seed"] for run in runs) == [0, 1, 2]
        for run in runs:
            assert run["scores"]["mean"] == pytest.approx(sum(run["scores"][name] for name in data.TESTS) / 4)
    median, mix = (train_selector.median(chosen[kind], "mean") for kind in (evaluation.S2SENT, evaluation.SCALAR_MIX))
    assert median - last["mean"] >= 1.0 and median > mix
    for name in data.TESTS:
        mine, mixed = (train_selector.median(chosen[kind], name) for kind in (evaluation.S2SENT, evaluation.SCALAR_MIX))
        assert mine > max(last[name], mixed, measured.get("before", last)[name])
        assert abs(measured["half"][name] - train_selector.shipped_run(measured)["scores"][name]) < 0.02


def test_every_claim_was_measured_with_three_seeds():
    rows = data.load(RESULTS, "claims")[0]
    found = [quality.configuration_of(row) for row in rows if "seed" in row]
    wanted = [row | {"seed": seed} for row in quality.claims_configurations() for seed in (0, 1, 2)]
    assert len(found) == len(wanted) and all(row in found for row in wanted)


@pytest.mark.parametrize(
    "section, configurations",
    [
        ("finetune", finetune.CONFIGURATIONS),
        ("stand-in-finetune", finetune.STAND_IN_CONFIGURATIONS),
        ("stand-in-simcse", finetune.STAND_IN_CONFIGURATIONS),
    ],
)
def test_every_fine_tuned_fusion_was_measured_with_three_seeds(section, configurations):
    rows = data.load(RESULTS, section)[0]
    found = sorted((row["fusion"], row.get("N", 0), row["seed"]) for row in rows)
    assert found == sorted((one["fusion"], one.get("N", 0), seed) for one in configurations for seed in (0, 1, 2))
    assert len({row["epochs"] for row in rows}) == len({row["triplets"] for row in rows}) == 1


@pytest.mark.parametrize(
    "file, parts", [("stand-in-frozen", [None]), ("truncated", [(6, n) for n in range(2, 7)] + [(12, 4), (12, 8)])]
)
def test_every_fusion_behind_other_encoders_had_the_whole_search(file, parts):
    rows = data.load(RESULTS, file)[0]
    wanted = [(setting, seed) for setting in train_selector.settings(STAND_IN) for seed in (0, 1, 2)]
    for part in parts:
        mine = [row for row in rows if part is None or (row["of"], row["blocks"]) == part]
        found = [(train_selector.setting_of(row), row["seed"]) for row in mine if "seed" in row]
        assert len(found) == len(wanted) and set(found) == set(wanted)
    assert len(rows) == len(parts) * (len(wanted) + 3)  # three averages need no training

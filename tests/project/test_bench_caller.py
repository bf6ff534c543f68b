"""Section "caller" of the benchmark suite, the writers, and what the report makes of their rows. Speed is not tested."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(next(f for f in Path(__file__).parents if (f / "bench/suite.py").is_file()) / "bench"))

import caller
import caller_encoder
import cases
import contestants
import costs
import end_to_end
import first_call
import formula
import latency
import parity
import quantities
import record
import suite
import targets
import timing
import training_step
import writers

SMALL = cases.Case("small", 6, 8, 4, 16, torch.float32)  # statistics of few sentences are badly conditioned
ONE = cases.Case("one", 1, 8, 4, 16, torch.float32)
TINY = end_to_end.Encoder("tiny", 4, 16, 2, 32, 1100)
CEILINGS = {"read": 1.0, "write": 0.5, "copy": 0.8}
RUN = {
    "device": "A device", "threads": 1, "python": "3.11", "cuda": None, "versions": {"torch": "2"}, "clocks": {},
    "commit": "abc", "date": "2026-01-01 00:00 UTC", "ceilings_tb_s": CEILINGS,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(timing, "ceilings", lambda: dict(CEILINGS))
    monkeypatch.setattr(writers, "fastest", lambda size: (writers.FILL, 0.25))
    for module in (cases, caller):
        monkeypatch.setattr(module, "caller_cases_of", lambda device: (ONE, SMALL))
    monkeypatch.setattr(caller_encoder, "plan", lambda device: (TINY, ((2, 4),)))
    monkeypatch.setattr(caller_encoder, "encode_plan", lambda device: (TINY, (1, 3)))
    monkeypatch.setattr(training_step, "plan", lambda device: [(TINY, 3, 4)])
    monkeypatch.setattr(first_call, "_run", lambda backend, device, cache: {"first": 20.0, "second": 1.0})


@pytest.fixture
def settings():
    return latency.Settings(CEILINGS, "eager", repeats=2)


def test_the_mean_is_that_of_sentence_transformers():
    # Its operators: earlier ones round 16-bit sums otherwise.
    pytest.importorskip("sentence_transformers", "6.2")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    states, mask = torch.randn(3, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0] * 5])
    for dtype in (torch.float32, torch.bfloat16):
        features = {"token_embeddings": states.to(dtype), "attention_mask": mask}
        theirs = modules.Pooling(16, "mean")(features)["sentence_embedding"]
        assert torch.equal(formula.masked_mean(states.to(dtype), mask), theirs)


def test_every_kind_of_row_is_measured_on_a_cpu(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("sentence_transformers")
    arguments = ["--sections", "caller", "--competitors", "eager", "--repeats", "2", "--output", str(tmp_path)]
    assert suite.main(arguments) == 0
    rows = record.load(tmp_path / "cpu.json")["rows"]
    assert {row["section"] for row in rows} == {caller.SECTION}
    assert {row["status"] for row in rows} == {"ok"}, [row for row in rows if row["status"] != "ok"]
    assert len({record.key(row) for row in rows}) == len(rows)
    auto = {(row["case"], row["what"], row["mode"]) for row in rows if row["contestant"] == caller.on_backend("auto")}
    both_paths = {(case, what, "forward") for case in ("one", "small") for what in cases.PATHS}
    # One sentence has no batch statistics.
    assert auto == both_paths | {
        ("one", "pooled", "both"),
        ("small", "pooled", "both"),
        ("small", "pooled", "training"),
    }
    of_small = {row["contestant"] for row in rows if (row["case"], row["mode"]) == ("small", "forward")}
    assert of_small >= {contestants.MEAN_OF_LAST, contestants.SUM, contestants.WEIGHTED, caller.EAGER}
    for row in rows:
        clock = row.get("host_us") or row.get("wall_us") or {"p20": 1, "median": row.get("first_call_ms"), "p80": 1e9}
        assert 0 < clock["p20"] <= clock["median"] <= clock["p80"], row
    judged = [
        row for row in rows if row["contestant"].startswith(("s2sent", "S2Sent", "+")) and "step" not in row["what"]
    ]
    assert judged and all(row["parity"]["ok"] for row in judged)
    baselines = {"tiny": 1, "encode": 2, f"{training_step.WHAT} tiny": 1}
    for what, count in baselines.items():
        of_what = [row for row in rows if row["what"] == what]
        assert len([row for row in of_what if "overhead" not in row]) == count, what


def test_a_gpu_adds_wall_and_device_times(settings, monkeypatch):
    """The GPU's clocks, on CPU tensors."""
    monkeypatch.setattr(caller, "on_gpu", lambda: True)
    rows = caller._measure(SMALL, ("both", "training"), ["auto"], settings)
    mine = [row for row in rows if row["contestant"] == caller.on_backend("auto")]
    assert [row["mode"] for row in mine] == ["both", "training"]
    assert all({"host_us", "wall_us", "device_us"} <= row.keys() and row["calls"] == 20 for row in mine)
    others = {row["contestant"]: row for row in rows if row not in mine}
    assert "device_us" in others[contestants.MEAN_OF_LAST] and "device_us" not in others[caller.EAGER]
    assert others[caller.EAGER]["calls"] == caller.CALLS_OF_MANY_KERNELS


def test_a_call_that_cannot_be_captured_keeps_its_host_time(settings, monkeypatch):
    monkeypatch.setattr(caller, "on_gpu", lambda: True)
    monkeypatch.setattr(
        caller,
        "device_times",
        lambda calls, repeats, *, seconds, errors: errors.update(dict.fromkeys(calls, "no")) or {},
    )
    rows = caller._measure(ONE, ("forward",), ["auto"], settings)
    mine = [row for row in rows if row["contestant"] == caller.on_backend("auto")]
    assert len(mine) == 2
    assert all(row["status"] == "ok" and row["note"] == "no graph: no" and "host_us" in row for row in mine)


def test_a_wrong_result_gets_no_times(settings, monkeypatch):
    from s2sent_kernels import S2SentSelector

    pool = S2SentSelector.pool
    monkeypatch.setattr(
        S2SentSelector, "pool", lambda self, *a, **k: pool(self, *a, **k) * (1.01 if self.backend == "auto" else 1)
    )
    rows = caller._measure(SMALL, ("both", "training"), ["auto"], settings)
    wrong = [row for row in rows if row["contestant"] == caller.on_backend("auto")]
    assert [row["mode"] for row in wrong] == ["both", "training"]
    assert all(row["status"] == "parity failed" and "host_us" not in row for row in wrong)


def test_training_mode_is_compared_with_training_mode(settings):
    training = contestants.ours(SMALL, "pooled", "cpu", training=True)
    assert parity.check(training, SMALL, "pooled", "cpu", "paper", True, draws=1).ok
    from dataclasses import replace

    running = replace(training, training=False)
    assert not parity.check(running, SMALL, "pooled", "cpu", "paper", True, draws=1).ok


def test_a_training_step_trains_encoder_and_selector():
    pytest.importorskip("transformers")
    for backend in (None, "auto"):
        step = training_step.Step(TINY, 3, 4, "cpu", backend)
        modules = [step.encoder] + ([] if step.selector is None else [step.selector])
        before = copy.deepcopy([dict(module.named_parameters()) for module in modules])
        assert torch.isfinite(step())
        changed = [
            not torch.equal(old[name], parameter)
            for module, old in zip(modules, before, strict=True)
            for name, parameter in module.named_parameters()
            if "attention.self.key.bias" not in name  # whose gradient is zero
        ]
        assert changed and sum(changed) > 0.9 * len(changed)


def test_latency_has_rows_with_batch_statistics_beside_those_without():
    settings = latency.Settings(CEILINGS, "none", repeats=2)
    found = latency._measure(SMALL, "pooled", settings)
    rows = {(row["contestant"], row["mode"]): row for row in found if row["section"] == "paths"}
    training, running = rows[contestants.OURS, "training"], rows[contestants.OURS, "both"]
    assert training["status"] == running["status"] == "ok"
    assert training["parity"]["ok"] and training["device_us"]["median"] > 0
    assert (contestants.OURS, "training") not in {
        (row["contestant"], row["mode"]) for row in latency._measure(ONE, "pooled", settings)
    }


def test_floors_of_a_backward_are_those_of_the_fastest_writer():
    settings = latency.Settings(CEILINGS, "none", repeats=2)
    mine = contestants.ours(SMALL, "pooled", "cpu")
    rows = {mode: latency._row(mine, SMALL, "pooled", mode, settings) for mode in ("forward", "backward")}
    read, write = cases.traffic(SMALL, "pooled", "backward")
    assert rows["backward"]["floor_us"] == pytest.approx(read / 1e6 + write / 0.25e6)
    assert rows["backward"]["write_tb_s"] == 0.25 and "write_tb_s" not in rows["forward"]
    read, write = cases.traffic(SMALL, "pooled", "forward")
    assert rows["forward"]["floor_us"] == pytest.approx(read / 1e6 + write / 0.5e6)


def test_writers_write_what_they_say_and_small_sizes_exceed_the_caches(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(writers, "l2_bytes", lambda: 1 << 18)
    asked = []
    monkeypatch.setattr(writers, "measure", lambda size: asked.append(size) or {"a": 1.0, "b": 2.0})
    assert writers.fastest(10) == writers.fastest(1 << 20) == ("b", 2.0)
    assert asked == [1 << 19, 1 << 20]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert set(writers.measure(1 << 16)) == {writers.FILL, writers.FILL_EACH}


def test_a_row_of_calls_is_not_interrupted_and_contestants_take_turns():
    order = []
    variants = {name: (lambda name=name: order.append(name), count) for name, count in (("a", 2), ("b", 1))}
    times = timing.host_times(variants, 2, seconds=0.0)
    assert set(times) == {"a", "b"}
    assert "".join(order) == "aab" + "aab" + "baa"


# ---------------------------------------------------------------- targets and pages


def called(case, what, mode, contestant, **fields):
    times = {
        name: {"median": value, "p20": value, "p80": value} for name, value in fields.items() if name.endswith("_us")
    }
    row = {
        "section": "caller", "case": case, "what": what, "mode": mode, "contestant": contestant, "status": "ok", "run": 0,
        "shape": [1, 32, 12, 768], "dtype": "bfloat16",
    }  # fmt: skip
    return row | fields | times


def synthetic():
    """All rows that a target of an H200 reads, with round numbers."""
    rows = []
    for place, case in enumerate(cases.CALLER):
        for mode, mean in (("forward", 100.0), ("both", 200.0)):
            rows.append(called(case, "pooled", mode, contestants.MEAN_OF_LAST, host_us=mean))
        for backend in ("native", "auto", "triton"):
            name = caller.on_backend(backend)
            rows.append(called(case, "pooled", "forward", name, host_us=120.0 + place))
            rows.append(called(case, "token", "forward", name, host_us=150.0))
            rows.append(called(case, "pooled", "both", name, host_us=500.0, device_us=9.0))
            if case != "C":
                rows.append(called(case, "pooled", "training", name, host_us=700.0))
    for case in ("1x32", "8x64", "64x32", "256x128"):
        rows.append(called(case, "BERT-base", "forward", end_to_end.BASE, wall_us=5000.0, peak_mib=100.0))
        mine = caller_encoder.captured("auto")
        more = {"overhead": 0.04, "peak_overhead": 0.02}
        rows.append(called(case, "BERT-base", "forward", mine, wall_us=5200.0, peak_mib=102.0, **more))
    for case in ("1", "128"):
        rows.append(called(case, "encode", "forward", caller_encoder.POOLING, wall_us=8000.0))
        rows.append(called(case, "encode", "forward", caller_encoder.pooled_by("auto"), wall_us=8080.0, overhead=0.01))
    step = f"{training_step.WHAT} BERT-base"
    rows.append(called("64x32", step, "training", end_to_end.BASE, wall_us=90000.0))
    rows.append(called("64x32", step, "training", caller_encoder.captured("auto"), wall_us=91000.0, overhead=0.011))
    for name, taken in ((first_call.NATIVE, 40.0), (first_call.COMPILING, 3000.0), (first_call.CACHED, 400.0)):
        rows.append(called("C", first_call.WHAT, "forward", name, first_call_ms=taken))
    rows.append(called("B", "pooled", "forward", caller.EAGER) | {"status": "error", "note": "no memory"})
    return rows


def content(rows, device=targets.GPU):
    return {"format": record.FORMAT, "device": device, "runs": [RUN], "rows": rows}


def test_targets_follow_from_rows():
    results = record.Results(content(synthetic()))
    verdicts = {text: rest[:3] for text, *rest in targets.verdicts(results.find)}
    # The worst of the four shapes.
    assert verdicts["pool, host time over the mean's, native"] == ["≤ 1.25 ×", "1.23 ×", "met"]
    assert verdicts["tokens, host time over the mean's, auto"] == ["≤ 1.25 ×", "1.50 ×", "missed by 20.0 %"]
    assert verdicts["tokens, host time over the mean's, triton"][2] == "met"
    assert verdicts["pool, forward + backward, eval mode, host time over the mean's, auto"][1:] == ["2.50 ×", "met"]
    training = verdicts["pool, forward + backward, training mode, host time over the mean's, auto"]
    assert training[1:] == ["3.50 ×", "missed by 16.7 %"]
    assert verdicts["BERT-base 64 x 32, capture.pool over encoder + mean, eager"][1:] == ["1.04 ×", "met"]
    assert verdicts["BERT-base 256 x 128, capture.pool over encoder + mean, eager"][2] == "missed by 3.0 %"
    assert verdicts["BERT-base 256 x 128, capture.pool, peak memory over encoder + mean"][1:] == ["+2.00 %", "met"]
    assert verdicts["first call of a process, native"] == ["≤ 300 ms", "40 ms", "met"]
    assert verdicts[f"first call of a process, {first_call.CACHED}"][2] == "missed by 33.3 %"
    # A shape that is missing leaves no value of the others.
    without = record.Results(content([row for row in synthetic() if row["case"] != "E6"]))
    assert quantities.host_over_mean(cases.CALLER, "pooled", "forward", "auto")(without.find) is None
    assert targets.verdicts(record.Results(content([])).find)[0][2:4] == ("–", "not measured")


def test_device_targets_of_the_backward():
    def timed(section, case, what, mode, median, **more):
        return called(case, what, mode, contestants.OURS, device_us=median, **more) | {"section": section}

    rows = [
        timed("paths", "B", "pooled", "both", 50.0),
        timed("paths", "B", "pooled", "training", 60.0),
        timed("stages", "A", "squeeze", "backward", 300.0, write_bytes=800_000_000, write_tb_s=4.0),
        timed("stages", "A", "gate", "backward", 39.0),
    ]
    find = record.Results(content(rows)).find
    assert quantities.training_over_eval("B")(find) == pytest.approx(1.2)
    assert quantities.over_writer("A", "squeeze")(find) == pytest.approx(1.5)
    assert quantities.stage_time("A", "gate", "backward")(find) == 39.0
    # Rows of before there were writers.
    del rows[2]["write_tb_s"]
    assert quantities.over_writer("A", "squeeze")(record.Results(content(rows)).find) is None


def test_targets_of_a_cpu_follow_from_rows():
    auto = caller.on_backend("auto")
    rows = [
        called("G", "pooled", "forward", auto, host_us=100.0) | {"kernels_us": 60.0},
        called("A-small", "pooled", "forward", auto, host_us=300.0),
        called("A-small", "pooled", "forward", contestants.SUM, host_us=250.0),
        called("A-small", "token", "forward", auto, host_us=500.0),
        called("A-small", "pooled", "both", auto, host_us=500.0),
        called("A-small", "pooled", "both", caller.EAGER, host_us=1500.0),
    ]
    find = record.Results(content(rows, "cpu")).find
    verdicts = {text: rest[1:3] for text, *rest in targets.verdicts(find, "cpu")}
    assert verdicts["pool at 1 x 16 x 6 x 384, time beside the kernels' own"] == ["40.0 µs", "met"]
    assert verdicts["A-small pooled forward, torch.sum of the same states"] == ["1.20 ×", "met"]
    assert verdicts["A-small token forward, torch.sum of the same states"] == ["2.00 ×", "met"]
    assert verdicts["A-small pooled forward + backward, the reference, eager"] == ["3.00 × faster", "missed by 25.0 %"]


def test_the_reports_first_tables_are_what_a_caller_waits_for(tmp_path):
    pytest.importorskip("matplotlib")
    import report

    (tmp_path / "gpu.json").write_text(json.dumps(content(synthetic())))
    text = report.build([tmp_path / "gpu.json"], tmp_path / "REPORT.md")
    assert text.index("### Eager calls of the selector") < text.index("### Targets")
    assert "| **s2sent_kernels, native** | 120 (120–120) | 1.20 | – | – | – |" in text
    assert "error: no memory" in text
    assert "| **+ capture.pool, auto** | 5.20 (5.20–5.20) | 1.040 | – | 102 | +2.0 % |" in text
    assert f"| {first_call.CACHED} | 1, 32, 12, 768 | 400 |" in text
    (tmp_path / "gpu.json").write_text(json.dumps(content([])))
    empty = report.build([tmp_path / "gpu.json"], tmp_path / "REPORT.md")
    assert "Not measured on this device yet" in empty
    assert "### Eager calls of the selector" not in empty


def test_the_table_of_costs_begins_with_eager_calls():
    path = called("A", "pooled", "forward", contestants.OURS, device_us=202.0)
    path |= {"section": "paths", "floor_us": 137.0, "shape": [256, 128, 12, 768]}
    rates = {"Embedder, packed": 6000.0, "Embedder, padded": 5000.0, "SentenceTransformer, mean, batch 256": 1000.0}
    texts = [
        called("30000 texts", "MiniLM", "corpus", name, texts_per_s=rate) | {"section": "encode"}
        for name, rate in rates.items()
    ]
    results = record.Results(content([*synthetic(), path, *texts]))
    lines = costs.costs(results, record.RESULTS / "quality").splitlines()
    rows = [line for line in lines if line.startswith("| ") and "---" not in line][1:]
    assert [row.split(" | ")[0] for row in rows[:5]] == [
        "| eager, host: embedding of one sentence of 32 tokens",
        "| eager, host: 64 of them, 3 blocks, forward + backward, training",
        "| eager: BERT-base and embeddings, 64 × 32 tokens",
        "| 30,000 Wikipedia sentences to embeddings, MiniLM, tokenization included",
        "| eager: training step of BERT-base, 64 × 32 tokens",
    ]
    assert rows[0].endswith("| 120 µs | – | 100 µs | – |")
    assert rows[2].endswith("| 5.20 ms (+4.0 %) | – | 5.00 ms | – |")
    assert rows[3].endswith("| 6,000/s (6.0 ×) | – | 1,000/s | – |")
    assert max(map(len, lines)) <= 130
    # What was not measured is left out.
    assert len(costs.costs(record.Results(content([path])), record.RESULTS / "quality").splitlines()) < len(lines)

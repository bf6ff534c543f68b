"""The benchmark suite: floors, quantiles, parity before speed, results that merge, pages, two trees. Speed is not tested."""

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(next(f for f in Path(__file__).parents if (f / "bench/suite.py").is_file()) / "bench"))

import calls
import cases
import compare
import contestants
import end_to_end
import formula
import measure
import memory
import parity
import quantities
import record
import report_caller  # noqa: F401  # before the fixture below replaces the cases that it imports
import suite
import targets
import timing

from s2sent_kernels import S2SentSelector

ROOT = record.BENCH.parent
SMALL = cases.Case("small", 2, 8, 3, 16, torch.float32)
PACKED = cases.Case("packed", 2, 8, 3, 16, torch.float32, "packed")
RUN = {
    "device": "A CPU", "threads": 1, "python": "3.11", "cuda": None, "versions": {"torch": "2"}, "clocks": {},
    "commit": "abc", "date": "2026-01-01 00:00 UTC", "ceilings_tb_s": {"read": 1.0, "write": 0.5, "copy": 0.8},
}  # fmt: skip


def row(**changes):
    fresh = calls.row_of(SMALL, "pooled", "forward", contestants.OURS) | {
        "section": "paths", "status": "ok", "device_us": {"median": 12.5, "p20": 12.0, "p80": 13.0}, "floor_us": 10.0,
        "read_bytes": 100, "write_bytes": 10, "run": 0,
        "parity": {"ok": True, "worst": "output 0", "share": 0.5, "output_error": 1e-7, "yardstick_error": 1e-7},
    }  # fmt: skip
    return fresh | changes


def results(*rows, device="cpu", run=RUN):
    return {"format": record.FORMAT, "device": device, "runs": [run], "rows": list(rows)}


@pytest.fixture(autouse=True)
def _small_cpu(monkeypatch):
    """One tiny case on the CPU, whatever the machine has."""
    monkeypatch.setattr(cases, "CPU_CASES", (SMALL,))
    monkeypatch.setattr(cases, "caller_cases_of", lambda device: ())  # see test_bench_caller.py
    monkeypatch.setattr(cases, "sweeps_of", lambda device: {"tokens": (SMALL,), "blocks": (SMALL,)})
    tiny = end_to_end.Encoder("tiny", 2, 16, 2, 32, 50)
    monkeypatch.setattr(end_to_end, "plan", lambda device: [(tiny, ((2, 4),))])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(timing, "ceilings", lambda: dict(RUN["ceilings_tb_s"]))
    monkeypatch.setattr(contestants, "MAIN", ("small",))


# ---------------------------------------------------------------- floors and times


@pytest.mark.parametrize(
    ("what", "mode", "read", "write"),
    # T D e = 16 * 16 * 4 = 1024 bytes a hidden state, B D e = 128; N = 3
    [
        ("pooled", "forward", 3072, 128),
        ("pooled", "backward", 0, 3072),
        ("pooled", "both", 3072, 3200),
        ("token", "forward", 6144, 1024),
        ("token", "backward", 3072 + 2048, 3072),
        ("token", "both", 6144 + 3072 + 2048, 1024 + 3072),
        ("squeeze", "forward", 3072, 128 + 384),
        ("fuse", "forward", 3072 + 384, 1024),
    ],
)
def test_bytes_are_those_of_the_specification(what, mode, read, write):
    assert cases.traffic(SMALL, what, mode) == (read, write)
    seconds = read / 1e12 + write / 0.5e12
    assert cases.floor_us(SMALL, what, mode, RUN["ceilings_tb_s"]) == pytest.approx(seconds * 1e6)


def test_bytes_of_ragged_and_packed_batches():
    real = PACKED.real_tokens
    assert 2 * 2 <= real < 2 * 8 + 1
    ragged = cases.Case("ragged", 2, 8, 3, 16, torch.float32, "ragged")
    assert cases.traffic(PACKED, "pooled", "backward") == (0, 3 * real * 64)
    assert cases.traffic(ragged, "pooled", "backward") == (0, 3 * 16 * 64)  # every place, padding too
    assert cases.traffic(ragged, "token", "forward") == (6 * real * 64, 16 * 64)
    inputs = cases.Inputs(PACKED, 0, False, "cpu")
    assert inputs.blocks[0].shape == (real, 16)
    assert inputs.cu_seqlens[-1] == real


def test_quantiles():
    times = timing.Times.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert (times.median, times.p20, times.p80) == (5.5, 3.0, 9.0)
    assert timing.Times.of([4.0]) == timing.Times(4.0, 4.0, 4.0)


def test_variants_take_turns_and_a_broken_one_is_named_where_asked():
    others, order = [], []
    variants = {"a": [lambda: order.append("a")], "b": [lambda: order.append("b"), lambda: others.append(1)]}
    times = timing.device_times(variants, 4)
    assert set(times) == {"a", "b"}
    assert order.count("a") == order.count("b") == len(others) == 5  # one warms up
    assert order[2:] == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_enough_inputs_to_exceed_the_cache():
    assert cases.input_sets(SMALL, SMALL.state_bytes * 8, "cuda") == 10
    assert cases.input_sets(SMALL, SMALL.state_bytes // 8, "cuda") == 1


def test_peak_memory_counts_what_lives_at_once():
    x = torch.ones(256)

    def call():
        y = x + 1
        y = y * 2  # the first is let go after this one is there
        return x.view(2, 128), y

    assert memory.peak_bytes(call, [x]) == 2 * 1024


# ---------------------------------------------------------------- competitors and parity


@pytest.mark.parametrize("profile", ["paper", "official"])
@pytest.mark.parametrize("what", cases.PATHS)
def test_competing_formula_is_the_reference(profile, what):
    case = cases.Case("ragged", 3, 9, 3, 16, torch.float32, "ragged")
    selector = contestants.make_selector(case, "cpu", profile, backend="reference")
    plain = formula.Formula(selector, case.tokens)
    call = contestants.Contestant(
        "", lambda i: getattr(plain, what)(i.blocks, i.mask), dict(selector.named_parameters())
    )
    outcome = parity.check(call, case, what, "cpu", profile, True)
    assert outcome.ok, outcome


@pytest.mark.parametrize("case", [SMALL, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("what", [*cases.STAGES, *cases.PATHS])
def test_every_stage_and_path_passes_parity(case, what):
    outcome = parity.check(contestants.ours(case, what, "cpu"), case, what, "cpu", "paper", True)
    assert outcome.ok, outcome


@pytest.mark.parametrize("broken", ["output", "gradient", "nan"])
def test_parity_finds_a_wrong_output_a_wrong_gradient_and_nan(broken):
    contestant = contestants.ours(SMALL, "pooled", "cpu")

    def call(inputs):
        right = contestant.call(inputs)
        if broken == "gradient":
            return right + 0.001 * (right - right.detach())
        return right * (1.001 if broken == "output" else float("nan"))

    wrong = contestants.Contestant("wrong", call, contestant.parameters)
    outcome = parity.check(wrong, SMALL, "pooled", "cpu", "paper", True)
    assert not outcome.ok
    assert outcome.worst.startswith("gradient" if broken == "gradient" else "")


def run_suite(tmp_path, *arguments):
    code = suite.main(["--repeats", "3", "--output", str(tmp_path), *arguments])
    return code, json.loads((tmp_path / "cpu.json").read_text())["rows"]


def test_failed_parity_prints_no_speed_and_fails_the_run(tmp_path, monkeypatch, capsys):
    pool = S2SentSelector.pool
    monkeypatch.setattr(
        S2SentSelector, "pool", lambda self, *a, **k: pool(self, *a, **k) * (1.01 if self.backend == "auto" else 1)
    )
    code, rows = run_suite(tmp_path, "--sections", "latency", "--competitors", "none")
    assert code == 1
    failed = [r for r in rows if r["status"] == "parity failed"]
    assert {(r["what"], r["contestant"]) for r in failed} == {
        ("pooled", contestants.OURS),
        ("pooled", contestants.SCALED),
    }
    assert not any(name.endswith(("_us", "_ms")) and name != "floor_us" for r in failed for name in r)
    printed = [line for line in capsys.readouterr().out.splitlines() if "pooled" in line]
    assert printed
    assert all("parity failed" in line and " us" not in line for line in printed)


def test_a_contestant_that_breaks_leaves_its_error_and_the_others_their_times(tmp_path, monkeypatch):
    def broken(inputs):
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr(contestants, "mean_of_last", broken)
    code, rows = run_suite(tmp_path, "--sections", "latency", "--competitors", "none")
    assert code == 1
    found = {r["contestant"]: r for r in rows if (r["section"], r["what"], r["mode"]) == ("paths", "pooled", "forward")}
    assert found[contestants.MEAN_OF_LAST]["note"] == "RuntimeError: no such kernel"
    assert "device_us" not in found[contestants.MEAN_OF_LAST]
    assert found[contestants.OURS]["device_us"]["median"] > 0


def test_whole_suite_and_its_report(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    # The caller's section: test_bench_caller.py.
    code, rows = run_suite(tmp_path, "--competitors", "eager", "--sections", "latency,sweep,memory,end_to_end")
    assert code == 0, [r for r in rows if r["status"] in ("error", "parity failed")]
    assert {r["section"] for r in rows} == {"stages", "paths", "sweep", "memory", "end to end"}
    assert {r["contestant"] for r in rows if r["section"] == "paths"} >= {
        contestants.OURS, contestants.MEAN_OF_LAST, contestants.WEIGHTED, contestants.ATTENTION,
        "published formula, eager", "paper formula, eager",
    }  # fmt: skip
    for each in rows:
        assert each["status"] != "ok" or "peak_mib" in each or each["device_us"]["p20"] <= each["device_us"]["p80"]
    import report

    assert report.main(["--results", str(tmp_path), "--output", str(tmp_path / "REPORT.md")]) == 0
    text = (tmp_path / "REPORT.md").read_text()
    for picture in ("scaling", "bandwidth", "contestants", "overhead", "memory"):
        assert f"(pictures/cpu-{picture}.png)" in text
        assert (tmp_path / "pictures" / f"cpu-{picture}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "small,Z"], "--cases: expected some of small, got 'Z'"),
        (["--sections", "speed"], "--sections: expected some of"),
        (["--competitors", "few"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_one_line_and_code_2(tmp_path, capsys, arguments, message):
    try:
        code = suite.main(["--output", str(tmp_path), *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- results, targets, report


def test_merging_replaces_rows_and_drops_runs_without_any():
    other = dict(RUN, date="later")
    old = results(row(), row(mode="both"))
    new = results(row(device_us={"median": 1.0, "p20": 1.0, "p80": 1.0}), run=other)
    merged = record.merge(old, new)
    assert [r["run"] for r in merged["rows"]] == [1, 0]
    assert [run["date"] for run in merged["runs"]] == [RUN["date"], "later"]
    assert merged["rows"][0]["device_us"]["median"] == 1.0
    everything = record.merge(merged, results(row(), row(mode="both"), run=dict(RUN, date="last")))
    assert [run["date"] for run in everything["runs"]] == ["last"]
    assert record.merge(merged, new)["runs"] == merged["runs"]  # a run that several parts share stays one
    with pytest.raises(record.UserError, match="cannot be merged"):
        record.merge(old, results(device="nvidia-h200"))


def test_a_run_keeps_what_it_has_measured_and_other_runs_rows(tmp_path):
    path = tmp_path / "cpu.json"
    for mode in ("forward", "both"):
        kept = record.Record(path, dict(RUN), "cpu")
        kept.add([row(mode=mode)])
        assert mode in [r["mode"] for r in record.load(path)["rows"]]
    assert [r["mode"] for r in record.load(path)["rows"]] == ["forward", "both"]
    assert [file.name for file in tmp_path.iterdir()] == ["cpu.json"]
    parts = [str(tmp_path / "merged.json"), str(path), str(path)]
    assert record.main(parts) == 0
    assert len(record.load(tmp_path / "merged.json")["rows"]) == 2


def test_results_have_one_row_a_line(tmp_path):
    content = results(row(), row(mode="both")) | {"empty": [], "numbers": [1, 2]}
    path = tmp_path / "some.json"
    record.write(path, content)
    lines = path.read_text().splitlines()
    assert [json.loads(line.rstrip(","))["mode"] for line in lines if '"section"' in line] == ["forward", "both"]
    assert '"empty": [],' in lines and '"numbers": [1, 2]' in lines
    assert json.loads(path.read_text()) == content
    assert record.dumps({"rows": [dict(reversed(row().items()))]}) == record.dumps({"rows": [row()]})
    path.write_text(json.dumps(content, indent=1))
    assert record.main(["--rewrite", str(path)]) == 0
    assert path.read_text().splitlines() == lines


def test_committed_results_are_as_they_are_written():
    files = list(record.RESULTS.rglob("*.json"))
    assert len(files) > 20
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert record.dumps(json.loads(text)) == text, path


def test_a_row_of_another_run_is_beside_this_package_in_its_own(tmp_path):
    """The merged file has this package at 12.5, the part at 20: of its native the ratio is to 20."""
    slow = {"median": 20.0, "p20": 19.0, "p80": 21.0}
    theirs = {"contestant": contestants.NATIVE, "device_us": {"median": 10.0, "p20": 9.0, "p80": 11.0}}
    for name, rows in (("old", [row()]), ("part", [row(device_us=slow), row(**theirs)])):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(*rows, run=dict(RUN, date=name))))
    old, part, merged = (str(tmp_path / f"{name}.json") for name in ("old", "part", "merged"))
    assert record.main([merged, old, f"--only={contestants.NATIVE}", part]) == 0
    mine, native = record.load(Path(merged))["rows"]
    assert mine["device_us"]["median"] == 12.5 and "ours_us" not in mine
    assert native["ours_us"] == 20.0 and record.times_ours(native, mine) == 0.5
    assert record.times_ours({"device_us": {"median": 25.0}}, mine) == 2.0
    ratio = quantities.beside(mine["case"], mine["what"], mine["mode"], contestants.NATIVE, faster=True)
    assert ratio(lambda *key: mine if key[-1] == contestants.OURS else native) == 0.5


def test_commit_is_told_or_unknown_never_head(monkeypatch):
    monkeypatch.setenv("COMMIT", "1234abc")
    assert record.commit() == "1234abc"
    monkeypatch.delenv("COMMIT")
    monkeypatch.setattr(record, "_output_of", lambda *command: None)
    assert record.commit() == "unknown"


def test_targets_are_met_or_missed_by_how_much():
    rows = {
        ("paths", "A", "pooled", "forward"): row(device_us={"median": 132.0}, floor_us=100.0),
        ("paths", "B", "pooled", "forward"): row(device_us={"median": 9.0}),
        ("end to end", "256x128", "BERT-base", "forward"): {"overhead": 0.012, "peak_overhead": 0.0},
    }
    verdicts = {text: rest for text, *rest in targets.verdicts(lambda *key: rows.get(key[:4]))}
    assert verdicts["A pooled forward"] == [
        "≤ 1.20 × floor",
        "1.32 × floor",
        "missed by 10.0 %",
        next(each.gap for each in targets.TARGETS[targets.GPU] if each.text == "A pooled forward"),
    ]
    assert verdicts["B pooled forward as a graph"] == ["≤ 10.0 µs", "9.0 µs", "met", ""]
    assert verdicts["BERT-base 256 x 128, block by block"] == ["≤ +1.50 %", "+1.20 %", "met", ""]
    assert verdicts["D pooled forward"][2] == "not measured"
    assert verdicts["BERT-base 256 x 128, the faster of states kept and block by block"][2] == "missed by 0.20 points"


def test_report_of_a_small_file_keeps_lost_cases_and_failures(tmp_path):
    pytest.importorskip("matplotlib")
    import report

    faster = row(contestant="paper formula, eager", device_us={"median": 5.0, "p20": 5.0, "p80": 5.0})
    failed = row(contestant="published formula, eager", status="parity failed", note="output 0: 3.00")
    failed.pop("device_us")
    missing = row(contestant=contestants.ATTENTION, status="not installed")
    content = results(row(), faster, failed, missing, device=targets.GPU)
    (tmp_path / "gpu.json").write_text(json.dumps(content))
    (tmp_path / "old.json").write_text("{}")
    text = report.build(sorted(tmp_path.glob("*.json")), tmp_path / "REPORT.md")
    assert (tmp_path / "REPORT.md").read_text() == text
    assert "| paper formula, eager | 5.0 (5.0–5.0) | 0.4 |" in text
    assert "parity failed: output 0: 3.00" in text
    assert "not installed" in text
    assert "12.5 (12.0–13.0) | 10.0 | 1.25 |" in text
    assert "### Targets" in text
    assert "| A pooled forward | ≤ 1.20 × floor | – | not measured |" in text


def test_report_without_results_is_one_line_and_code_2(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    import report

    assert report.main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "report: error: no results to report: run bench/suite.py first\n"


def test_the_readmes_table_of_costs_is_what_the_committed_results_give(tmp_path):
    import costs

    committed = (ROOT / "README.md").read_text(encoding="utf-8")
    between = committed.partition(costs.START + "\n")[2].partition("\n" + costs.END)[0]
    gpu = record.Results(record.load(record.RESULTS / f"{targets.GPU}.json"))
    assert between == costs.costs(gpu, record.RESULTS / "quality")
    assert 6 <= between.count("\n| ") - 1 <= 12
    assert max(map(len, between.splitlines())) <= 130


def test_the_committed_report_is_what_the_committed_results_give(tmp_path):
    pytest.importorskip("matplotlib")
    import report

    assert report.main(["--output", str(tmp_path / "REPORT.md")]) == 0
    assert (tmp_path / "REPORT.md").read_text() == (ROOT / "bench" / "REPORT.md").read_text()


def test_a_table_of_costs_without_its_results_or_markers_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    import report

    (tmp_path / "cpu.json").write_text(json.dumps(results(row())))
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(record.UserError, match="needs the results of nvidia-h200"):
        report.build([tmp_path / "cpu.json"], tmp_path / "REPORT.md", tmp_path / "README.md")
    (tmp_path / "gpu.json").write_text(json.dumps(results(row(case="A"), device=targets.GPU)))
    with pytest.raises(record.UserError, match="expected the markers"):
        report.build([tmp_path / "gpu.json"], tmp_path / "REPORT.md", tmp_path / "README.md")


# ---------------------------------------------------------------- two trees


def test_every_row_of_a_comparison_passes_parity():
    names = [*measure.FUNCTIONS, *measure.METHODS]
    rows = list(measure.rows_of("cpu", ["small"], ["auto"]))
    assert {(row.function, row.mode) for row in rows} == {
        *((name, mode) for name in names for mode in ("eval", "gradient")),
        *((name, "training") for name in measure.METHODS),
    }
    for each in rows:
        found = measure.measure(each, "cpu", 0.0, check=True)
        assert "error" not in found and found["parity"]["ok"], (each.name, found)
        assert len(found["samples"]) >= 3 and found["bits"]


def test_small_calls_and_an_encoder_have_rows_of_host_time():
    rows = {row.name for row in measure.rows_of("cpu", None, ["auto", "reference"]) if row.clock == "host"}
    for case in ("C", "B", "E6", "G"):
        assert {f"{name}/eval/host/{case}/auto" for name in measure.METHODS} <= rows
    assert {"pool/gradient/host/G/reference", "capture/eval/host/encoder/auto"} <= rows


def test_a_bit_of_difference_is_found():
    tensor = torch.randn(5, 3)
    other = tensor.clone()
    assert measure.checksum(tensor) == measure.checksum(other.T.contiguous().T)
    other[4, 2] = torch.nextafter(other[4, 2], torch.tensor(9.0))
    assert measure.checksum(tensor) != measure.checksum(other)
    assert measure.checksum(tensor) != measure.checksum(tensor.flip(0))


def test_what_measures_two_trees_runs_on_an_older_one():
    """It uses public names alone, and modules of bench/ that do not import the package."""
    allowed = {"s2sent_kernels", "s2sent_kernels.capture"}
    for name in ("measure", "cases", "timing", "tolerance"):
        tree = ast.parse((record.BENCH / f"{name}.py").read_text(encoding="utf-8"))
        found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        found |= {each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names}
        ours = {path.stem for path in record.BENCH.glob("*.py")} - {"cases", "timing", "tolerance"}
        assert not found & ours
        assert {each for each in found if each.startswith("s2sent")} <= (allowed if name == "measure" else set())


def test_a_tree_is_compared_with_itself():
    tree = compare.Tree(record.BENCH.parent, "this")
    options = ["--cases", "G", "--rows", "pool/eval/*", "--backends", "reference", "--seconds", "0"]
    found = compare.measured(tree, options, check=True)
    (each,) = compare.rows_of([found, found], [found, found])
    assert each["row"] == "pool/eval/host/G/reference"
    assert (each["ratio"], each["verdict"], each["bits"]) == (1.0, "within noise", "same")
    assert "1.000" in compare.table([each])


@pytest.mark.parametrize(
    ("base", "work", "verdict"),
    [
        ((10.0, 10.1), (8.9, 9.0), "faster"),
        ((10.0, 10.1), (11.0, 11.1), "slower"),
        ((10.0, 10.1), (9.95, 9.99), "within noise"),  # less than 2 %
        ((10.0, 10.1), (9.0, 10.05), "within noise"),  # rounds overlap
        ((10.0, 13.0), (9.0, 9.5), "within noise"),  # rounds of the base differ by more
    ],
)
def test_a_difference_is_one_that_every_round_shows_and_that_exceeds_noise(base, work, verdict):
    assert compare.compared([[value] for value in base], [[value] for value in work])["verdict"] == verdict


def test_a_comparison_refuses_ratios_without_parity_and_says_why():
    def side(usable=True, **rows):
        return [{"usable": {"native": usable}, "rows": {name.replace("_", "/"): row for name, row in rows.items()}}]

    good = {"samples": [1.0], "bits": [1], "parity": {"ok": True, "worst": "output 0", "share": 0.5}}
    wrong = {"bits": [2], "parity": {"ok": False, "worst": "output 0", "share": 3.0}}
    raised = {"error": "ValueError: no"}
    rows = compare.rows_of(
        side(a_auto=good, b=good, c=wrong, d=raised, e=good),
        side(False, a_auto=good, b=wrong, c=good, d=raised, f=good),
    )
    assert {row["row"]: (row["verdict"], row["why"]) for row in rows} == {
        "a/auto": ("not compared", "native: usable in one tree only"),
        "b": ("failed", "working tree: parity failed: output 0: 3.00 of the bound"),
        "c": ("not compared", "base: parity failed: output 0: 3.00 of the bound"),
        "d": ("not compared", "base: ValueError: no; working tree: ValueError: no"),
        "e": ("not compared", "working tree: no such row"),
        "f": ("not compared", "base: no such row"),
    }
    assert not any("ratio" in row for row in rows)


def test_a_revision_is_checked_out_and_gets_an_extension_of_its_interface_only(tmp_path, monkeypatch, capsys):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "s2sent_kernels"
    package.mkdir()
    git("init", "-b", "main")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    for number in (1, 2):
        (package / "some.py").write_text(f"{'NATIVE_' if number == 1 else ''}INTERFACE = {number}\n")
        git("add", "-A")
        git("commit", "-m", f"interface {number}")
    (package / "_C.abi3.so").write_bytes(b"compiled")
    for revision, copied in (("main", True), ("main~1", False)):
        with compare.checked_out(revision, build=False) as tree:
            assert tree.interface == ("2" if copied else "1")
            assert (tree.extension is not None) == copied
        assert not tree.folder.exists()
        told = capsys.readouterr().err
        assert ("only the Python side" if copied else "its interface was 1 and is 2") in told
    with compare.checked_out(str(tmp_path), build=True) as tree:  # a folder, as it is
        assert tree.folder == tmp_path
    with pytest.raises(record.UserError, match="nothing"), compare.checked_out("nothing", build=False):
        pass


def test_the_notes_on_host_cost_are_what_the_files_give():
    """Geometric means of the ratios, by function and mode."""
    means = {}
    for name in ("host", "gradient"):
        path = record.RESULTS / "parts" / f"nvidia-h200-compare-{name}.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        assert all(row["bits"] == "same" for row in rows if "ratio" in row)
        groups = {"all": []}
        for row in rows:
            if "ratio" in row:
                function, mode, *_ = row["row"].split("/")
                groups.setdefault((function, mode), []).append(row["ratio"])
                groups["all"].append(row["ratio"])
        means[name] = {key: f"{statistics.geometric_mean(ratios):.2f}" for key, ratios in groups.items()}
    host, after = means["host"], means["gradient"]
    notes = (record.BENCH / "NOTES.md").read_text(encoding="utf-8")
    eager = [host[function, "eval"] for function in ("pool", "tokens", "capture")]
    assert "pool {}, tokens {}, capture {} |".format(*eager) in notes
    assert f"pool {host['pool', 'gradient']}, tokens {host['tokens', 'gradient']}: too much |" in notes
    pool, tokens = after["pool", "gradient"], after["tokens", "gradient"]
    assert f"pool {pool}, tokens {tokens}, together {after['all']} |" in notes

"""bench/accuracy.py on a small grid, and the committed page beside the committed results."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(next(f for f in Path(__file__).parents if (f / "bench/suite.py").is_file()) / "bench"))

import accuracy
import record
import report_accuracy

GRID = ["--blocks", "3,6", "--tokens", "16", "--dtypes", "float32"]


def run(tmp_path, *options):
    assert accuracy.main([*GRID, "--jobs", "1", "--output", str(tmp_path / "cpu.json"), *options]) == 0
    return record.Results(record.load(tmp_path / "cpu.json"))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(accuracy, "on_gpu", lambda: False)
    monkeypatch.setattr(record, "slug", lambda: "cpu")
    monkeypatch.setattr(accuracy, "MAGNITUDES", (1.0, 1e4))
    yield
    torch.set_num_threads(threads)


def test_every_backend_and_result_is_measured_and_reported(tmp_path):
    results = run(tmp_path)
    assert {row["contestant"] for row in results.rows} == set(accuracy.usable("cpu"))
    assert len(results.rows) == len(accuracy.usable("cpu")) * 2 * len(accuracy.KINDS)  # no N but 6 at L = 16
    for row in results.rows:
        assert len(row["errors"]) == 10
        assert all(0 < accuracy.Errors(*each).ours < 100 for each in row["errors"].values())
    text = report_accuracy.build([tmp_path / "cpu.json"], tmp_path / "ACCURACY.md")
    assert "| huge token, L = 16 |" in text and "| magnitude 10000 |" in text


def test_a_result_that_is_off_is_beyond_the_limit_and_marked(tmp_path, monkeypatch, capsys):
    right = accuracy.of_backend

    def wrong(inputs, backend):
        found = right(inputs, backend)
        if inputs.hidden[0].dtype == torch.float32:
            found["p"] = found["p"] * (1 + 2.0**-20)
            found["gates"] = found["gates"] * float("nan")
        return found

    monkeypatch.setattr(accuracy, "of_backend", wrong)
    results = run(tmp_path)
    text = capsys.readouterr().out
    assert "reference, p: float32, L = 16, N = 6" in text and "nan  reference, gates" in text
    assert {what for _, what, _, _ in report_accuracy.beyond(results)} >= {"p", "gates"}
    page = report_accuracy.build([tmp_path / "cpu.json"], tmp_path / "ACCURACY.md")
    assert "| **nan** |" in page and "**not explained**" in page


def test_wrong_arguments_are_one_line_and_code_2(tmp_path, capsys):
    assert report_accuracy.main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "report_accuracy: error: no results to report: run bench/accuracy.py first\n"


def test_the_committed_page_is_what_the_committed_results_give_and_explains_what_is_beyond(tmp_path):
    files = sorted((record.RESULTS / "accuracy").glob("*.json"))
    assert report_accuracy.build(files, tmp_path / "ACCURACY.md") == (record.BENCH / "ACCURACY.md").read_text(
        encoding="utf-8"
    )
    for path in files:
        for where, what, _, _ in report_accuracy.beyond(record.Results(record.load(path))):
            assert "not explained" not in report_accuracy.reason(where, what), (where, what)

"""What a training says of its result: the table, the words where it lost, and the history that it leaves."""

import json
import math
import sys

import pytest
import torch

from s2sent_kernels.tools import history, verdict
from s2sent_kernels.tools.baselines import ScalarMix
from s2sent_kernels.tools.history import Line
from s2sent_kernels.tools.problems import CLASSES, LABELS, NUMBERS, Problem

BEFORE = verdict.rows({"mean of last": 90.78, "scalar mix": 90.9}, "trained alike")


def result(score, rising=True):
    return verdict.Result("selector", verdict.Row("trained selector", score), rising)


def report(score, rising=True):
    return verdict.report("a score", BEFORE, result(score, rising))


def test_a_result_that_won_is_a_table_alone():
    assert report(91.0) == [
        "on dev (a score):",
        "  mean of last, before        90.78",
        "  scalar mix, trained alike   90.90",
        "  trained selector            91.00",
    ]


@pytest.mark.parametrize(("score", "lost"), [(90.9, 0), (90.8, 1), (90.78, 1), (89.98, 2), (math.nan, 2)])
def test_a_result_that_lost_is_said_to_have(score, lost):
    words = report(score)[4:]
    assert len(words) == lost
    mean = [line for line in words if "scores less than the encoder's own mean pooling: do not use it" in line]
    assert len(mean) == (lost == 2)
    assert sum("a scalar mix" in line for line in words) == (lost > 0)


@pytest.mark.parametrize("score, said", [(91.1, 0), (91.0, 1), (90.95, 1), (math.nan, 1)])
def test_what_it_began_with_is_a_row_to_be_beaten(score, said):
    before = verdict.rows({"mean of last": 0.5, "scalar mix": 0.5, verdict.UNTRAINED: 91.0}, "trained alike")
    lines = verdict.report("a score", before, result(score))
    assert lines[3] == "  untrained selector          91.00"
    words = "no epoch scored more than the selector before its training, 91.00: try a smaller learning rate"
    assert lines.count(words) == said and not any("less than this" in line for line in lines)


def test_two_scores_that_are_no_numbers_are_equal():
    nothing = [verdict.Row("mean of last, before", math.nan)]
    assert len(verdict.report("x", nothing, result(math.nan))) == 3


@pytest.mark.parametrize("rising, advice", [(True, "train longer, or with a"), (False, "train with a")])
def test_longer_is_advised_where_the_last_epoch_was_the_best(rising, advice):
    assert report(80.0, rising)[4].endswith(f": do not use it, or {advice} smaller learning rate")


@pytest.mark.parametrize("mix, steps, said", [(90.0, 40, "40 steps"), (90.0, 1, "1 step"), (90.78, 40, None)])
def test_a_scalar_mix_that_hardly_trained_is_said_to_have(mix, steps, said):
    lines = verdict.hardly_trained({"mean of last": 90.78, "scalar mix": mix}, ScalarMix.of_weights([1, 1, 2]), steps)
    began = f"the scalar mix began with equal weights, was trained for {said} and has 0.25, 0.25, 0.50: "
    assert lines == (
        [] if said is None else [f"{began}more steps or a larger --prior-learning-rate may bring it further"]
    )


@pytest.mark.parametrize(("loss", "said"), [(None, 0), (1e-3, 0), (9e-4, 1), (0.0, 1), (math.nan, 0)])
def test_a_loss_that_says_nothing_has_a_hint(loss, said):
    assert len(verdict.hint(loss, "other negatives")) == said


def test_constants():
    """What a classifier has to beat, by hand."""
    classes = Problem(CLASSES, 3).score_of_constant(torch.tensor([2, 1, 2]), torch.tensor([2, 2, 0, 1]))
    assert classes == 50
    known, targets = torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.tensor([[1.0, 1], [0, 0]])
    assert Problem(LABELS, 2).score_of_constant(known, targets) == 50  # 2 * 1 / (2 + 2)
    assert Problem(NUMBERS, 1).score_of_constant(torch.tensor([1.0, 3]), torch.tensor([1.0, 3])) == 0
    assert Problem(NUMBERS, 1).score_of_constant(torch.tensor([0.0]), torch.tensor([1.0, 3])) == -400


# ---------------------------------------------------------------- history

LINES = [Line(0, 0, None, 12.5), Line(3, 1, 0.5, math.nan), Line(6, 2, 0.25, 14.0)]


def test_what_is_written_is_json_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    history.write(tmp_path, [line._replace(trial={"seed": 1}) for line in LINES], "a score")
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / history.FILE).read_text().splitlines()]
    assert rows == [
        {"seed": 1, "step": 0, "epoch": 0, "dev": 12.5},
        {"seed": 1, "step": 3, "epoch": 1, "loss": 0.5},
        {"seed": 1, "step": 6, "epoch": 2, "loss": 0.25, "dev": 14.0},
    ]
    assert (tmp_path / history.PICTURE).read_bytes().startswith(b"\x89PNG")
    found = history.read(tmp_path)
    assert history.last_loss(found) == 0.25 and history.of_best(found) == " (epoch 2)" and history.of_best([]) == ""
    assert history.ends_best(found) and not history.ends_best(found[:2] + [Line(9, 3, 0.1, 12.5)])
    assert not history.ends_best([])


def test_the_picture_has_every_point_of_every_trial(tmp_path):
    """And says of what it is."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []

    class Seen(Figure):
        def savefig(self, *args, **options):
            drawn.append(self)
            super().savefig(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure", Seen)
        title = history.title_of({"encoder": "my $x$ encoder", "freeze_encoder": True, "task": "sts"})
        history.write(tmp_path, [*LINES, Line(3, 1, 0.75, 9.0, {"seed": 1})], "a score", title)
        history.write(tmp_path, LINES, None)
    loss, dev = ([[tuple(point) for point in curve.get_xydata()] for curve in axes.lines] for axes in drawn[0].axes)
    assert loss == [[(1, 0.5), (2, 0.25)], [(1, 0.75)]]
    assert dev[0][0] == (0, 12.5) and dev[0][2] == (2, 14.0) and dev[1] == [(1, 9.0)]
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["training loss", "a score, on dev"]
    assert all(axes.get_xlabel() == "epoch" for figure in drawn for axes in figure.axes)
    assert drawn[0].get_suptitle() == "my $x$ encoder, the selector trained (sts)\nloss, and a score on dev"
    assert drawn[1].get_suptitle() == "loss" and len(drawn[1].axes) == 1


def test_without_matplotlib_the_lines_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    history.write(tmp_path, LINES, "a score")
    assert [path.name for path in tmp_path.iterdir()] == [history.FILE]
    error = capsys.readouterr().err
    assert "history.png is left out: matplotlib cannot be imported" in error and error.count("\n") == 1


def test_a_trainers_log_has_a_line_for_each_step():
    log = [
        {"loss": 0.5, "epoch": 0.5, "step": 1, "grad_norm": 3.0},
        {"loss": 0.25, "epoch": 1.0, "step": 2},
        {"eval_score": 0.7, "epoch": 1.0, "step": 2, "eval_runtime": 9.0},
        {"train_runtime": 4.0, "train_loss": 0.4, "epoch": 1.0, "step": 2},
    ]
    assert history.of_trainer(log, "eval_score", 100) == [Line(1, 0.5, 0.5), Line(2, 1.0, 0.25, 70.0)]

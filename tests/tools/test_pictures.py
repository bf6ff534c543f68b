"""Pictures of scores, energies and gates."""

import itertools

import pytest
import torch

from s2sent_kernels.tools import pictures

PNG = b"\x89PNG\r\n\x1a\n"
POOLINGS = ["mean of last", "first-last average", "average of blocks", "cls", "s2sent", "scalar mix"]


@pytest.mark.parametrize("texts, pairs", [(1, 1), (16, 4), (3, 16)])
def test_everything_written_in_the_picture_of_energies_is_inside(texts, pairs, monkeypatch):
    pytest.importorskip("matplotlib")
    figures, draw = [], pictures._png
    monkeypatch.setattr(pictures, "_png", lambda figure: figures.append(figure) or draw(figure))
    pictures.energy_picture(torch.rand(texts, pairs) + 0.1, [(0, i) for i in range(pairs)], ["w" * 47 + "…"] * texts)
    (figure,) = figures
    figure.draw_without_rendering()
    whole, (axes,) = figure.bbox, figure.axes
    for box in (axes.xaxis.label.get_window_extent(), figure.legends[0].get_window_extent()):
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    assert axes.bbox.height > whole.height / 3


@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_everything_written_in_the_picture_of_scores_is_inside(tasks, monkeypatch):
    pytest.importorskip("matplotlib")
    figures, draw = [], pictures._png
    monkeypatch.setattr(pictures, "_png", lambda figure: figures.append(figure) or draw(figure))
    scores = {f"/a/folder/with/a/name/task{i}.tsv": dict.fromkeys(POOLINGS, 70.0 + i) for i in range(tasks)}
    pictures.scores_picture(
        scores, "/home/somebody/projects/embeddings/models/an-encoder: Spearman or accuracy, times 100"
    )
    (figure,) = figures
    figure.draw_without_rendering()
    whole, (axes,) = figure.bbox, figure.axes
    (title,) = figure.texts
    boxes = [text.get_window_extent() for text in (title, *axes.get_xticklabels(), axes.get_legend())]
    for box in boxes:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    labels = boxes[1 : tasks + 1]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(labels))
    assert axes.bbox.height > whole.height / 3


def test_pictures_of_scores_and_energies():
    pytest.importorskip("matplotlib")
    assert pictures.scores_picture({"one": {"a": 70.0, "b": 80.0}, "two": {"a": 60.0}}, "title").startswith(PNG)
    assert pictures.energy_picture(torch.rand(2, 3), [(0, 0), (0, 1), (1, 0)], ["x", "y"]).startswith(PNG)
    with pytest.raises(ValueError, match="scores: expected at least one"):
        pictures.scores_picture({}, "title")
    with pytest.raises(ValueError, match="energy: expected"):
        pictures.energy_picture(torch.rand(2, 2), [(0, 0)], ["x", "y"])
    with pytest.raises(ValueError, match="gates: expected"):
        pictures.gates_by_text_picture(torch.rand(2, 3, 4), ["x"])
    formulas = ["$x$ costs $\\frac{1$", "$\\nope{$"]  # texts of users, not formulas
    assert pictures.energy_picture(torch.rand(2, 3), [(0, 0), (0, 1), (1, 0)], formulas).startswith(PNG)
    assert pictures.gates_by_text_picture(torch.rand(2, 3, 4), formulas).startswith(PNG)
    assert pictures.scores_picture({formulas[0]: {"a": 70.0}, formulas[1]: {"a": 60.0}}, formulas[1]).startswith(PNG)

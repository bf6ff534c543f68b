"""Pictures of scores, energies and gates."""

import itertools
import warnings

import pytest
import torch

from s2sent_kernels.tools import fonts, pictures

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


def draw_each(text):
    """The text in every place where a picture has one of a user's."""
    pictures.energy_picture(torch.rand(2, 3) + 0.1, [(0, 0), (0, 1), (1, 0)], [text, "plain"])
    pictures.gates_by_text_picture(torch.rand(2, 3, 4), [text, "plain"])
    pictures.scores_picture({text: {text: 70.0}}, text)


def test_characters_of_an_installed_font_are_drawn_without_a_warning():
    pytest.importorskip("matplotlib")
    own, other = (fonts._characters(fonts._families()[name]) for name in ("DejaVu Sans", "STIXGeneral"))
    letter = chr(min(code for code in other - own if chr(code).isprintable()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_each(f"a {letter} b\nc")


@pytest.mark.parametrize(
    "text", ["\u4e2d\u6587\u53e5\u5b50", "\u0939\u093f\u0928\u094d\u0926\u0940", "ok \U0001f600\U0001f389"]
)
def test_one_warning_of_the_characters_that_no_font_has(text, monkeypatch):
    pytest.importorskip("matplotlib")
    some = {"DejaVu Serif": fonts._families()["DejaVu Serif"], "gone": "/gone.ttf"}
    monkeypatch.setattr(fonts, "_families", lambda: some)
    for picture in (
        lambda: pictures.energy_picture(torch.rand(2, 1) + 0.1, [(0, 0)], [text, text + "!"]),
        lambda: pictures.gates_by_text_picture(torch.rand(2, 3, 4), [text, text]),
        lambda: pictures.scores_picture({text: {text: 70.0}}, text),
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert picture().startswith(PNG)
        (warning,) = said
        assert "are drawn as boxes" in str(warning.message) and text[-1] in str(warning.message)

"""Pictures of scores, energies and gates."""

import itertools
import warnings

import pytest
import torch

from s2sent_kernels.tools import fonts, pictures

PNG = b"\x89PNG\r\n\x1a\n"
POOLINGS = ["mean of last", "first-last average", "average of blocks", "cls", "s2sent", "scalar mix"]


NAME = "encoder /home/somebody/projects/embeddings/models/an-encoder; selector ./a/selector"


def drawn(monkeypatch):
    """The figures that are drawn from now on."""
    figures, draw = [], pictures._png
    monkeypatch.setattr(pictures, "_png", lambda figure: figures.append(figure) or draw(figure))
    return figures


def check_inside(figure, boxes):
    whole = figure.bbox
    for box in boxes:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1


def check_apart(boxes):
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("texts, pairs", [(1, 1), (10, 4), (3, 16), (11, 4), (16, 16)])
def test_everything_written_in_the_picture_of_energies_is_inside(texts, pairs, monkeypatch):
    pytest.importorskip("matplotlib")
    figures, titles = drawn(monkeypatch), ["w" * 47 + "…"] * texts
    pictures.energy_picture(torch.rand(texts, pairs) + 0.1, [(0, i) for i in range(pairs)], titles, NAME)
    (figure,) = figures
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [axes.xaxis.label.get_window_extent()]
    if texts > pictures.COLOURS:
        boxes += [label.get_window_extent() for label in axes.get_yticklabels()] + [
            figure._suptitle.get_window_extent()
        ]
        assert len(axes.images) == 1 and not axes.containers
    else:
        boxes.append(figure.legends[0].get_window_extent())
        assert len({bars[0].get_facecolor() for bars in axes.containers}) == texts  # each text has its own colour
        assert "embeddings" in figure.legends[0].get_title().get_text() and figure._suptitle is None
    check_inside(figure, boxes)
    check_apart(boxes)
    assert axes.bbox.height > figure.bbox.height / 3


@pytest.mark.parametrize("texts", [3, 12])
def test_energies_are_on_a_linear_scale_from_0_with_their_values(texts, monkeypatch):
    pytest.importorskip("matplotlib")
    figures, energy = drawn(monkeypatch), torch.rand(texts, 2) + 0.1
    pictures.energy_picture(energy, [(0, 0), (0, 1)], ["a"] * texts)
    axes = figures[0].axes[0]
    assert {text.get_text() for text in axes.texts} == {f"{value:#.2g}" for value in energy.flatten().tolist()}
    if texts > pictures.COLOURS:
        assert axes.images[0].get_clim() == (0, energy.max().item())
    else:
        assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0
        figures[0].draw_without_rendering()
        assert all(text.get_window_extent().y1 <= axes.bbox.y1 for text in axes.texts)


@pytest.mark.parametrize("texts", [1, 2])
def test_gates_by_text(texts, monkeypatch):
    """Of one text its gates, since it does not differ from the mean; and labels that fit."""
    pytest.importorskip("matplotlib")
    figures, gates = drawn(monkeypatch), torch.rand(texts, 3, 4)
    pictures.gates_by_text_picture(gates, ["a"] * texts, title=NAME)
    (figure,) = figures
    figure.draw_without_rendering()
    *maps, bar = figure.axes
    shown = torch.stack([torch.tensor(axes.images[0].get_array().data) for axes in maps])
    wanted = gates if texts == 1 else 100 * (gates / gates.mean(0) - 1)
    torch.testing.assert_close(shown, wanted.double(), rtol=1e-5, atol=1e-4)
    assert (bar.get_ylabel() == "gate") is (texts == 1)
    title = figure._suptitle
    assert "embeddings" in title.get_text()
    boxes = [title.get_window_extent(), *(axes.title.get_window_extent() for axes in maps)]
    check_inside(figure, [*boxes, bar.yaxis.label.get_window_extent()])
    check_apart(boxes)


def test_titles(monkeypatch):
    pytest.importorskip("matplotlib")
    figures = drawn(monkeypatch)
    pictures.gates_picture(torch.rand(2, 3, 4), title=NAME)
    pictures.bases_picture(3, 4, 9, title="$x$ of a model")
    pictures.gates_picture(torch.rand(1, 3, 4))
    assert "embeddings" in figures[0]._suptitle.get_text() and figures[2]._suptitle is None
    assert figures[1]._suptitle.get_text().startswith("$x$ of a model\nDCT over 3 blocks")
    assert figures[2].axes[0].get_title() == "Gates of one sentence"


@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_everything_written_in_the_picture_of_scores_is_inside(tasks, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = drawn(monkeypatch)
    scores = {f"/a/folder/with/a/name/task{i}.tsv": dict.fromkeys(POOLINGS, 70.0 + i) for i in range(tasks)}
    pictures.scores_picture(scores, NAME, dict.fromkeys(scores, "Spearman\n1379 pairs"))
    (figure,) = figures
    figure.draw_without_rendering()
    whole, (axes,) = figure.bbox, figure.axes
    (title,) = figure.texts
    boxes = [text.get_window_extent() for text in (title, *axes.get_xticklabels(), axes.get_legend())]
    for box in boxes:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    assert all(label.get_text().endswith("\nSpearman\n1379 pairs") for label in axes.get_xticklabels())
    labels = boxes[1 : tasks + 1]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(labels))
    assert axes.bbox.height > whole.height / 3


@pytest.mark.parametrize("low", [70.0, -5.0])
def test_bars_of_scores_begin_at_0_and_have_their_values(low, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = drawn(monkeypatch)
    scores = {"one": {"a": low, "b": 80.126}, "two": {"a": 70.5, "b": float("nan")}, "three": {"a": 69.0}}
    pictures.scores_picture(scores, "title")
    (axes,) = figures[0].axes
    bars = [bar for group in axes.containers for bar in group]
    assert {bar.get_y() for bar in bars} == {0} and axes.get_ylim()[0] <= min(0, low)
    assert bool(axes.get_ylim()[0] == 0) is (low > 0)
    written = sorted(text.get_text() for text in axes.texts if text.get_text())
    assert written == sorted([f"{low:.2f}", "80.13", "70.50", "69.00"])
    figures[0].draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert all(axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1 for box in boxes)
    check_apart(boxes)


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

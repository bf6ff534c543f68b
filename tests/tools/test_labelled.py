"""Labelled examples: from files to targets, and the part that is held out."""

import json
from collections import Counter

import pytest
import torch

from s2sent_kernels.tools.columns import Columns
from s2sent_kernels.tools.labelled import (
    Labelled,
    hold_out,
    label_names,
    read_labelled,
    read_scored,
    read_texts,
    targets,
)
from s2sent_kernels.tools.problems import CLASSES, LABELS, NUMBERS


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def made(labels):
    return Labelled("data", [f"text {i}" for i in range(len(labels))], labels, [f"row {i}" for i in range(len(labels))])


def test_classes_become_numbers_in_the_order_of_their_names(tmp_path):
    path = write(
        tmp_path / "a.jsonl", {"text": "a", "label": 7}, {"text": "b", "label": " no "}, {"text": "c", "label": "7"}
    )
    found = read_labelled(path, CLASSES)
    names = label_names(found, CLASSES)
    assert found.labels == ["7", "no", "7"] and names == ["7", "no"]
    assert targets(found, CLASSES, names).tolist() == [0, 1, 0]


def test_several_labels_as_a_list_or_with_commas(tmp_path):
    rows = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": "y, z"}, {"text": "c", "label": []}]
    rows += [{"text": "d", "label": label} for label in ("", None, 5)]
    found = read_labelled(write(tmp_path / "a.jsonl", *rows), LABELS)
    names = label_names(found, LABELS)
    assert names == ["5", "x", "y", "z"]
    none = [0, 0, 0, 0]
    assert targets(found, LABELS, names).tolist() == [[0, 1, 1, 0], [0, 0, 1, 1], none, none, none, [1, 0, 0, 0]]


def test_numbers_that_float32_cannot_tell_apart():
    with pytest.raises(ValueError, match="data: expected different numbers"):
        label_names(made([1.7e9 + i for i in range(20)]), NUMBERS)


@pytest.mark.parametrize("labels", [[f"r{i}" for i in range(25)], [*(f"r{i}" for i in range(22)), "z", "z"]])
def test_too_few_labels_with_a_second_example(labels):
    with pytest.raises(ValueError, match="data: expected --dev, since too few labels"):
        hold_out(made(labels))


def test_numbers_and_scores(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "score": score, "label": score} for score in (1, "2.5")]
    path = write(tmp_path / "a.jsonl", *rows)
    assert read_scored(path).labels == [1, 2.5] and read_scored(path).texts == [("a", "b")] * 2
    found = read_labelled(path, NUMBERS)
    assert torch.equal(targets(found, NUMBERS, label_names(found, NUMBERS)), torch.tensor([1, 2.5]))


def test_other_columns_and_other_names(tmp_path):
    rows = [{"a": "x", "b": "y", "gold": score, "genre": "news", "text": "z"} for score in (1, 2)]
    path, told = write(tmp_path / "a.jsonl", *rows), []
    names = {"sentence1": "a", "sentence2": "b", "score": "gold", "label": "gold"}
    pairs = {what: names[what] for what in ("sentence1", "sentence2", "score")}
    with pytest.raises(ValueError, match="expected columns score, sentence1, sentence2, got text too"):
        read_scored(path, columns=Columns(pairs))
    found = read_scored(path, columns=Columns(pairs, ["text"], told.append))
    assert found.texts == [("x", "y")] * 2 and found.labels == [1, 2] and told == [f"{path}: not read: genre"]
    assert read_scored(path, columns=Columns(pairs, judged=False)).texts == found.texts
    texts = read_labelled(path, NUMBERS, columns=Columns({"text": "a", "label": "gold"}, ["text"]))
    assert texts.texts == ["x", "x"] and texts.labels == [1, 2]


def test_texts_beside_pairs_are_not_read_for_either(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a", "sentence1": "b", "sentence2": "c", "id": 1})
    why = (
        "expected a column text, or sentence1 and sentence2, got all three: --columns text=text or --columns sentence1="
    )
    with pytest.raises(ValueError, match=why):
        read_texts(path)


def test_of_texts_beside_pairs_those_are_read_that_are_wanted(tmp_path):
    """Which the caller knows, or the names that the user gives, which come first."""
    path = write(tmp_path / "a.jsonl", {"text": "a", "sentence1": "b", "sentence2": "c", "body": "d"})
    one = Columns({"text": "body"}, judged=False)
    two = Columns({"sentence1": "sentence1", "sentence2": "body"}, judged=False)
    assert read_texts(path, None, False) == ["a"] == read_texts(path, Columns({"text": "text"}, judged=False))
    assert read_texts(path, None, True) == [("b", "c")]
    assert read_texts(path, one) == ["d"] == read_texts(path, one, True)
    assert read_texts(path, two) == [("b", "d")] == read_texts(path, two, False)
    alone = write(tmp_path / "b.jsonl", {"text": "a"})
    assert read_texts(alone, None, True) == ["a"]  # what it has; whoever wants pairs says so


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"text": "b"}, CLASSES, "line 2: label: expected a text, got a row without it"),
        ({"text": "b", "label": None}, CLASSES, "line 2: label: expected a text, got null"),
        ({"text": "b", "label": None}, NUMBERS, "line 2: label: expected a finite number, got null"),
        ({"text": "b", "label": ""}, NUMBERS, "line 2: label: expected a finite number, got an empty text"),
        ({"text": "b", "label": ""}, CLASSES, "line 2: label: expected a label, got an empty text"),
        ({"text": None, "label": "x"}, CLASSES, "line 2: text: expected a text, got null"),
        ({"text": "", "label": "x"}, CLASSES, "line 2: text: expected a text, got an empty one"),
        ({"text": " ", "label": "x"}, CLASSES, "line 2: text: expected a text, got ' '"),
        ({"label": "x"}, CLASSES, "line 2: text: expected a text, got a row without it"),
        ({"text": "b", "label": 1.5}, CLASSES, "line 2: label: expected a text, got 1.5"),
        ({"text": 5, "label": "x"}, CLASSES, "line 2: text: expected a text, got 5"),
        ({"text": "b", "label": "x\ty"}, CLASSES, "line 2: label: expected a label without tabs"),
        ({"text": "b", "label": ["x,y"]}, LABELS, "line 2: label: expected labels without commas"),
        ({"text": "b", "label": True}, NUMBERS, "line 2: label: expected a finite number, got True"),
        ({"text": "b", "label": "1e999"}, NUMBERS, "line 2: label: expected a finite number, got '1e999'"),
        ({"text": "b", "label": "1_0"}, NUMBERS, "line 2: label: expected a finite number, got '1_0'"),
        ({"text": "b", "label": 1e39}, NUMBERS, "line 2: label: expected a finite number, got 1e"),  # beyond float32
        ({"text": "b", "label": True}, CLASSES, "line 2: label: expected a text, got True"),
        (
            {"sentence1": "b", "sentence2": "c", "label": "1"},
            CLASSES,
            "expected columns label, text, got sentence1, sentence2 too",
        ),
        ({"text": "b", "text_pair": "c", "label": "1"}, CLASSES, "expected columns label, text, got text_pair too"),
        ({"text": "b", "sentence2": "c", "label": "1"}, CLASSES, "expected columns label, text, got sentence2 too"),
        ({"text": "b", "weight": 2, "label": "1"}, CLASSES, "expected columns label, text, got weight too"),
    ],
)
def test_rows_that_are_none(tmp_path, row, kind, message):
    path = write(tmp_path / "a.jsonl", {"text": "a", "label": "1"}, row)
    with pytest.raises(ValueError, match=message):
        read_labelled(path, kind)


@pytest.mark.parametrize("splits, told", [("aab", " of split 'b', of 3 in all"), ("b", " of split 'b', of 1 in all")])
def test_too_few_rows_are_told_by_their_split(tmp_path, splits, told):
    rows = [{"split": split, "text": f"{n}", "label": n} for n, split in enumerate(splits)]
    with pytest.raises(ValueError, match=f"expected two or more rows, got 1{told}$"):
        read_labelled(write(tmp_path / "a.jsonl", *rows), CLASSES, "b")


def test_a_tenth_of_each_class_is_held_out():
    labels = ["x"] * 60 + ["y"] * 30 + ["z"]
    rest, held = hold_out(made(labels))
    assert Counter(held.labels) == {"x": 6, "y": 3} and set(rest.labels) == {"x", "y", "z"}
    assert sorted(rest.texts + held.texts) == sorted(made(labels).texts)
    assert hold_out(made(labels)) == (rest, held)


def test_a_class_of_one_stays_and_numbers_are_held_out_over_their_range():
    labels = [f"{number:02}" for number in range(40)]
    rest, _held = hold_out(made(["x"] * 20 + labels))
    assert set(labels) <= set(rest.labels)
    _, held = hold_out(made([float(number) for number in range(40)]))
    assert held.labels == [5.0, 15.0, 25.0, 35.0]

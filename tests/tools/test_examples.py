"""Training examples from files, and what is wrong with a file."""

import csv

import pytest
from builders import write_examples

from s2sent_kernels.cli import main
from s2sent_kernels.tools.examples import Examples, read_examples

pytest.importorskip("pyarrow")

COLUMNS = ("anchor", "positive", "negative")
ROWS = [("a b", 'b, "c"', "d"), ("é", "f", "")]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    examples = read_examples(write_examples(tmp_path / f"data{suffix}", ROWS, COLUMNS))
    assert examples == Examples(COLUMNS, ROWS, supervised=True)


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_long_texts(tmp_path, suffix):
    """csv's own limit is 131,072 characters; others may rely on it."""
    rows, before = [("a" * 300_000, 'b, "' * 50_000, "d")], csv.field_size_limit()
    assert read_examples(write_examples(tmp_path / f"data{suffix}", rows, COLUMNS)).rows == rows
    assert csv.field_size_limit() == before


def test_the_limit_of_csv_is_put_back_after_an_error(tmp_path):
    before, path = csv.field_size_limit(), tmp_path / "data.csv"
    path.write_text('anchor,positive\n"a"x,b\n')
    with pytest.raises(ValueError, match="line 2 is broken"):
        read_examples(path)
    assert csv.field_size_limit() == before


def test_several_negatives_and_other_columns(tmp_path):
    columns = ("id", "negative_2", "positive", "anchor", "negative_1", "negatives")
    examples = read_examples(write_examples(tmp_path / "data.jsonl", [("1", "n2", "p", "a", "n1", "x")], columns))
    assert examples == Examples(("anchor", "positive", "negative_2", "negative_1"), [("a", "p", "n2", "n1")], True)


def test_any_row_may_be_the_first_with_a_negative(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"anchor": "a", "positive": "b"}\n{"anchor": "c", "positive": "d", "negative": "e"}\n')
    assert read_examples(path).rows == [("a", "b", ""), ("c", "d", "e")]


def test_the_rows_of_a_split(tmp_path):
    rows = [("train", "a", "b"), ("test", "c", "d"), ("train", "e", "f")]
    path = write_examples(tmp_path / "data.tsv", rows, ("split", "anchor", "positive"))
    assert read_examples(path).rows == [("a", "b"), ("e", "f")] and read_examples(path, "test").rows == [("c", "d")]
    with pytest.raises(ValueError, match="expected rows of split 'dev', got splits test, train"):
        read_examples(path, "dev")


def test_sentences_are_their_own_positives(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("One.\n\n Two.\n", encoding="utf-8")
    assert read_examples(path) == Examples(("anchor", "positive"), [("One.", "One."), ("Two.", "Two.")], False)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data.doc", b"a", "expected a file of .tsv, .csv, .jsonl, .parquet, .txt, got suffix '.doc'"),
        ("data.txt", b"\n \n", "expected sentences, got an empty file"),
        ("data.txt", b"ok\n\xff\n", "line 2 is not UTF-8"),
        ("data.tsv", b"", "got an empty file"),
        ("data.tsv", b"anchor\tother\na\tb\n", "expected a tab-separated column positive"),
        ("data.csv", b"", "expected rows with columns anchor and positive, got none"),
        ("data.csv", b"anchor,other\na,b\n", "expected a column positive, got anchor, other"),
        ("data.csv", b"anchor,positive\na\n", "line 2: expected 2 comma-separated fields"),
        ("data.csv", b"anchor,positive\na,b,c\n", "line 2: expected 2 comma-separated fields"),
        ("data.csv", b'anchor,positive\n"a"x,b\n', "line 2 is broken"),
        ("data.csv", b"anchor,positive\na,b\n\xff,b\n", "line 3 is not UTF-8"),
        ("data.jsonl", b'{"anchor": "a", "positive": "b"}\n{\n', "line 2 is not JSON"),
        ("data.jsonl", b"[1]\n", "line 1: expected an object"),
        ("data.jsonl", b"[" * 200_000, "line 1 cannot be read"),
        ("data.jsonl", b'{"anchor": "a", "positive": "b", "n": ' + b"9" * 5000 + b"}", "line 1 cannot be read"),
        (
            "data.jsonl",
            b'{"anchor": "a", "positive": "\\ud83d"}',
            "line 1: positive: expected a text, got half a character",
        ),
        ("data.tsv", b"anchor\tpositive\tanchor\na\tb\tc\n", "expected each column once, got anchor twice"),
        ("data.csv", b"anchor,positive,anchor\na,b,c\n", "expected each column once, got anchor twice"),
        ("data.jsonl", b'{"anchor": "a"}\n', "expected a column positive"),
        ("data.jsonl", b'{"anchor": "a", "positive": 3}\n', "line 1: positive: expected a text, got 3"),
        (
            "data.jsonl",
            b'{"anchor": "a", "positive": "b", "negative": 0}\n',
            "line 1: negative: expected a text, got 0",
        ),
        ("data.jsonl", b'{"anchor": "a", "positive": " "}\n', "line 1: expected an anchor and a positive"),
        ("data.parquet", b"PAR1 no", "cannot be read"),
    ],
)
def test_broken_files(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_examples(path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert main(["train", "--data", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()

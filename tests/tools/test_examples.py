"""Training examples from files, and what is wrong with a file."""

import csv
import re

import pytest
from builders import write_examples

from s2sent_kernels.cli import main
from s2sent_kernels.tools.columns import Columns, names, parse
from s2sent_kernels.tools.examples import COLUMNS as KNOWN
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
    columns = ("id", "negative_2", "positive", "anchor", "negative_1", "source")
    examples = read_examples(write_examples(tmp_path / "data.jsonl", [("1", "n2", "p", "a", "n1", "x")], columns))
    assert examples == Examples(("anchor", "positive", "negative_2", "negative_1"), [("a", "p", "n2", "n1")], True)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_list_of_negatives(tmp_path, suffix):
    rows = [("a", "b", ["c", "d"]), ("e", "f", ["g"]), ("h", "i", []), ("j", "k", None)]
    path = write_examples(tmp_path / f"data{suffix}", rows, ("anchor", "positive", "negatives"))
    found = read_examples(path)
    assert found.columns == ("anchor", "positive", "negatives_1", "negatives_2")
    assert found.rows == [("a", "b", "c", "d"), ("e", "f", "g", ""), ("h", "i", "", ""), ("j", "k", "", "")]


NAMES = [
    "neg",
    "hard_negative",
    "Negative",
    "negative_passages",
    "neg1",
    "score",
    "label",
    "Anchor",
    "query",
    "doc2",
    "text",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_column_that_looks_like_training_data_is_named_renamed_or_left_out(tmp_path, capsys, name):
    path = write_examples(tmp_path / "data.tsv", [("a", "b", "c")], ("anchor", "positive", name))
    message = (
        f"expected columns anchor, positive, negative, negatives, got {name} too: say what they are with --columns"
    )
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        read_examples(path)
    assert main(["train", "--data", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert read_examples(path, columns=Columns(ignored=[name])).rows == [("a", "b")]
    named = read_examples(path, columns=Columns({"negative": name}))
    assert named == Examples(("anchor", "positive", "negative"), [("a", "b", "c")], True)


def test_columns_of_other_names(tmp_path):
    rows = [("q", "d", "h", "n", "fr")]
    path = write_examples(tmp_path / "data.csv", rows, ("query", "doc", "hard_neg", "negative", "language"))
    told = []
    columns = Columns({"anchor": "query", "positive": "doc", "negative_1": "hard_neg"}, ["negative"], told.append)
    assert read_examples(path, columns=columns) == Examples(
        ("anchor", "positive", "negative_1"), [("q", "d", "h")], True
    )
    assert told == [f"{path}: not read: language"]
    swapped = read_examples(path, columns=Columns({"anchor": "doc", "positive": "query"}, ["hard_neg"]))
    assert swapped.rows == [("d", "q", "n")]
    with pytest.raises(
        ValueError,
        match=r"expected columns query and other, got .*, without other; --columns says that there is one named other",
    ):
        read_examples(path, columns=Columns({"anchor": "query", "positive": "other"}))
    with pytest.raises(ValueError, match="expected the column Neg, which --columns names, got query, doc"):
        read_examples(path, columns=Columns({"anchor": "query", "positive": "doc", "negative_1": "Neg"}))
    with pytest.raises(ValueError, match="expected the column genre, which --ignore-columns names, got query, doc"):
        read_examples(path, columns=Columns({"anchor": "query", "positive": "doc"}, ["genre"]))
    with pytest.raises(ValueError, match="expected one column for negative, got negative and hard_neg: see --ignore"):
        read_examples(path, columns=Columns({"anchor": "query", "positive": "doc", "negative": "hard_neg"}))
    (tmp_path / "data.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="expected a table, whose columns are named, got sentences"):
        read_examples(tmp_path / "data.txt", columns=Columns({"anchor": "query"}))


PARTS = "expected what a column holds and its name, as anchor=NAME, with commas between several,"
WORDS = "expected anchor or positive or negative or negatives or split before the sign =,"
ONCE = "expected one column for each word and one word for each column,"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("anchor", f"{PARTS} got 'anchor'"),
        ("", f"{PARTS} got ''"),
        ("anchor=", f"{PARTS} got 'anchor='"),
        ("anchor=a,positive", f"{PARTS} got 'positive' in 'anchor=a,positive'"),
        ("anker=a", f"{WORDS} got 'anker' in 'anker=a'"),
        ("negative_x=a", f"{WORDS} got 'negative_x' in 'negative_x=a'"),
        ("anchor=a,positive=a", f"{ONCE} got 'anchor=a,positive=a', which names a twice"),
        ("anchor=a,anchor=b", f"{ONCE} got 'anchor=a,anchor=b', which names anchor twice"),
    ],
)
def test_broken_names_of_columns(tmp_path, capsys, text, message):
    path = write_examples(tmp_path / "data.tsv", [("a", "b")])
    assert main(["train", "--data", str(path), "--columns", text, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == f"s2sent: error: --columns: {message}\n"


def test_names_of_columns():
    assert parse("anchor = my query,negative_12=n=1", KNOWN, "negative") == {"anchor": "my query", "negative_12": "n=1"}
    assert names("genre, year") == ["genre", "year"]
    with pytest.raises(
        ValueError, match="--ignore-columns: expected names of columns with commas between them, got 'a,'"
    ):
        names("a,")


def test_a_row_without_a_split_beside_others(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"anchor": "a", "positive": "b", "split": "train"}\n{"anchor": "c", "positive": "d"}\n')
    with pytest.raises(ValueError, match="line 2: expected a split, as other rows have, got none"):
        read_examples(path)


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
        (
            "data.doc",
            b"a",
            "expected a file of .tsv, .csv, .jsonl, .parquet, .arrow, .txt, also with .gz or .zst, got suffix '.doc'",
        ),
        ("data.txt", b"\n \n", "expected sentences, got an empty file"),
        ("data.txt", b"ok\n\xff\n", "line 2 is not UTF-8"),
        ("data.tsv", b"", "got an empty file"),
        (
            "data.tsv",
            b"anchor\tother\na\tb\n",
            "got anchor, other, without positive: --columns positive=NAME",
        ),
        ("data.csv", b"", "expected rows with columns anchor and positive, got none"),
        (
            "data.csv",
            b"anchor,other\na,b\n",
            "got anchor, other, without positive: --columns positive=NAME",
        ),
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
        (
            "data.jsonl",
            b'{"anchor": "a", "positive": "b", "negatives": "c"}\n',
            "line 1: negatives: expected a list of texts, as .jsonl and .parquet have, got 'c'",
        ),
        (
            "data.jsonl",
            b'{"anchor": "a", "positive": "b", "negatives": ["c", 1]}\n',
            "line 1: negatives: expected a text, got 1",
        ),
        ("data.tsv", b"anchor\tpositive\tanchor\na\tb\tc\n", "expected each column once, got anchor twice"),
        ("data.csv", b"anchor,positive,anchor\na,b,c\n", "expected each column once, got anchor twice"),
        ("data.jsonl", b'{"anchor": "a"}\n', "expected columns anchor and positive, got anchor, without positive"),
        ("data.jsonl", b'{"anchor": "a", "positive": 3}\n', "line 1: positive: expected a text, got 3"),
        (
            "data.jsonl",
            b'{"anchor": "a", "positive": "b", "negative": 0}\n',
            "line 1: negative: expected a text, got 0",
        ),
        ("data.jsonl", b'{"anchor": "a", "positive": " "}\n', "line 1: positive: expected a text, got ' '"),
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


@pytest.mark.parametrize("column", ["anchor", "positive"])
@pytest.mark.parametrize(
    "row, got",
    [
        ("null", "null"),
        ('""', "an empty one"),
        ('" "', "' '"),
        (None, "a row without it"),
    ],
)
def test_null_empty_and_absent_are_three_things(tmp_path, column, row, got):
    other = "positive" if column == "anchor" else "anchor"
    broken = f'{{"{other}": "x"' + ("" if row is None else f', "{column}": {row}') + "}"
    (tmp_path / "data.jsonl").write_text('{"anchor": "a", "positive": "b"}\n' + broken + "\n")
    with pytest.raises(ValueError) as error:
        read_examples(tmp_path / "data.jsonl")
    assert (
        str(error.value)
        == f"{tmp_path / 'data.jsonl'}: line 2: {column}: expected a text, got {got}: fill it in, or leave the row out"
    )

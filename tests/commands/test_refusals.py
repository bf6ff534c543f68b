"""What a message says: what was expected, what came, in which file, under the names that the user typed."""

import json
import os

import pytest

pytest.importorskip("sentence_transformers")
pa = pytest.importorskip("pyarrow")

from pyarrow import parquet  # noqa: E402

from s2sent_kernels import files  # noqa: E402
from s2sent_kernels.cli import main  # noqa: E402

ROWS = {"review": ["good", "bad"], "text": ["1", "2"], "stars": ["5", "1"]}
PREDICT = ["predict", "--model", "nosuch", "--output", "out.tsv"]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        assert main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error.removeprefix("s2sent: error: ").strip()

    return run


def write(path, columns):
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        tab = {".tsv": "\t", ".csv": ","}[path.suffix]
        path.write_text("".join(tab.join(row) + "\n" for row in [columns, *(row.values() for row in rows)]))
    return path.name


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
def test_predict_names_the_columns_wanted_and_found(tmp_path, refused, suffix):
    name = write(tmp_path / f"a.{suffix}", {"review": ["good"], "stars": ["5"]})
    wanted = f"{name}: expected columns either text or sentence1 and sentence2, got review, stars: --columns "
    assert refused(*PREDICT, name) == wanted + "text=NAME says which it is"
    wanted = f"{name}: expected columns either body or sentence1 and sentence2, got review, stars; --columns "
    assert refused(*PREDICT, name, "--columns", "text=body") == wanted + "says that there is one named body"
    name = write(tmp_path / f"b.{suffix}", {"sentence1": ["good"], "other": ["5"]})
    wanted = "got sentence1, other, without sentence2: --columns sentence2=NAME says which it is"
    assert refused(*PREDICT, name).endswith(wanted)


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
def test_evaluate_names_the_columns_wanted_and_found(tmp_path, refused, suffix):
    name = write(tmp_path / f"a.{suffix}", {"anchor": ["a"], "score": ["b"], "split": ["test"]})
    wanted = (
        "expected columns score, sentence1 and sentence2, got anchor, score, split, without sentence1 and sentence2"
    )
    advice = "--columns sentence1=NAME,sentence2=NAME says which they are"
    assert refused("evaluate", "--sts", name) == f"{name}: {wanted}: {advice}"


def test_a_table_of_commas_with_the_suffix_of_tabs(tmp_path, refused):
    (tmp_path / "a.tsv").write_text("label,text\n1,a\n")
    got = "a.tsv: expected columns that tabs separate, got a first line without a tab, 'label,text': one of commas is a .csv"
    assert refused(*PREDICT, "a.tsv") == got
    (tmp_path / "a.tsv").write_text("one, of its own\na\n")  # a column may have a comma in its name
    assert "without a tab" in refused(*PREDICT, "a.tsv")
    (tmp_path / "text.tsv").write_text("text\na, b\n")
    assert refused(*PREDICT, "text.tsv").startswith("--model nosuch: ")


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
def test_a_named_column_counts_where_another_has_its_name(tmp_path, refused, suffix):
    """These commands pass over other columns, and have no --ignore-columns that a message could advise."""
    from s2sent_kernels.tools.columns import Columns
    from s2sent_kernels.tools.labelled import read_texts

    name = write(tmp_path / f"a.{suffix}", ROWS)
    assert refused(*PREDICT, name, "--columns", "text=review").startswith("--model nosuch: ")
    assert read_texts(tmp_path / name, Columns({"text": "review"}, judged=False)) == ["good", "bad"]
    with pytest.raises(
        ValueError, match="expected one column for text, got text and review: see --ignore-columns text"
    ):
        read_texts(tmp_path / name, Columns({"text": "review"}))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("command", [["evaluate", "--sts"], ["evaluate", "--transfer"], ["inspect", "--file"], PREDICT])
def test_a_file_that_is_not_there_and_a_folder(tmp_path, refused, command):
    """Whatever the suffix."""
    (tmp_path / "folder").mkdir()
    assert refused(*command, "nosuch.pdf") == "nosuch.pdf: there is no such file"
    assert refused(*command, "folder").endswith("got a folder that datasets has not saved")
    (tmp_path / "a.pdf").write_text("")
    assert refused(*command, "a.pdf").endswith("also with .gz or .zst, got suffix '.pdf'")


def closed(path):
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")


@pytest.mark.parametrize(
    "command",
    [
        ["encode", "folder", "--output", "a.npy"],
        ["encode", "other", "--output", "a.npy"],
        ["encode", "other/a.txt", "--output", "a.npy", "--selector", "folder"],
        ["encode", "other/a.txt", "--output", "a.npy", "--model", "folder"],
        ["search", "a", "--index", "folder"],
        ["encode", "a.csv", "--output", "a.npy"],
    ],
    ids=" ".join,
)
def test_what_may_not_be_read(tmp_path, refused, command):
    """Also below a folder of texts: nothing is left out in silence."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("a\n")
    (tmp_path / "other" / "below").mkdir()
    (tmp_path / "folder").mkdir()
    write(tmp_path / "a.csv", ROWS)
    for name in ("folder", "other/below", "a.csv"):
        closed(tmp_path / name)
    try:
        found = refused(*command)
    finally:
        for name in ("folder", "other/below"):
            (tmp_path / name).chmod(0o700)
    assert (
        "Permission denied" in found and "Errno" not in found.partition("cannot be loaded")[0] and "Error" not in found
    )


def test_a_folder_of_other_files(tmp_path, refused):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.pdf").write_text("")
    assert refused("encode", "folder", "--output", "a.npy").endswith("in it, got others, as folder/a.pdf")


def test_texts_beside_pairs(tmp_path, refused):
    write(tmp_path / "a.csv", {"text": ["a"]})
    write(tmp_path / "b.csv", {"sentence1": ["a"], "sentence2": ["b"]})
    assert refused(*PREDICT, "a.csv", "b.csv") == "b.csv: expected texts, as a.csv has, got pairs of sentences"


def test_too_few_rows_name_their_file_and_split(tmp_path, refused):
    pair = write(tmp_path / "a.tsv", {"anchor": ["a"], "positive": ["b"]})
    splits = {"split": ["train", "dev"], "score": ["1", "2"], "sentence1": ["a", "b"], "sentence2": ["c", "d"]}
    scored = write(tmp_path / "b.tsv", splits)
    data = write(tmp_path / "c.tsv", {"anchor": ["a", "b"], "positive": ["c", "d"]})
    parted = write(tmp_path / "d.tsv", {"split": ["b", "d"], "anchor": ["a", "b"], "positive": ["c", "d"]})
    (tmp_path / "a.txt").write_text("one\n")
    for way in ([], ["--freeze-encoder"]):
        train = ["train", "--output", "out", "--model", "nosuch", *way, "--data"]
        why = "since the others of a batch are the negatives, got 1"
        assert refused(*train, pair) == f"a.tsv: expected two or more examples, {why}"
        assert refused(*train, "a.txt") == f"a.txt: expected two or more examples, {why}"
        assert refused(*train, parted, "--split", "b") == f"d.tsv: expected two or more examples of split 'b', {why}"
        said = refused(*train, scored, "--task", "sts")
        assert said == "b.tsv: expected two or more rows, got 1 of split 'train', of 2 in all"
        said = refused(*train, data, "--dev", scored)
        assert said == "b.tsv: expected two or more rows, got 1 of split 'dev', of 2 in all"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("value, got", [(None, "null"), ("", "an empty one"), (" ", "' '")])
def test_an_empty_text_has_a_remedy(tmp_path, refused, suffix, value, got):
    place = "line" if suffix == "jsonl" else "row"
    advice = f": expected a text, got {got}: fill it in, or leave the row out"
    name = write(tmp_path / f"a.{suffix}", {"anchor": ["a", value], "positive": ["c", "d"]})
    assert refused("train", "--output", "out", "--data", name) == f"{name}: {place} 2: anchor{advice}"
    name = write(tmp_path / f"b.{suffix}", {"score": [1, 2], "sentence1": ["c", "d"], "sentence2": ["a", value]})
    said = f"{name}: {place} 2: sentence2{advice}"
    assert refused("train", "--output", "out", "--task", "sts", "--data", name) == said


@pytest.mark.parametrize(
    "rows, arguments, message",
    [
        ("dev\t1\ta\tb\n", [], "expected rows of split 'test', got splits dev"),
        ("test\t1\ta\tb\n", [], "expected two or more rows, got 1 of split 'test', of 1 in all"),
    ],
)
def test_too_few_pairs(tmp_path, refused, rows, arguments, message):
    (tmp_path / "a.tsv").write_text("split\tscore\tsentence1\tsentence2\n" + rows)
    assert refused("evaluate", "--sts", "a.tsv", *arguments) == f"a.tsv: {message}"


def test_one_label(tmp_path, refused):
    write(tmp_path / "a.csv", {"split": ["all", "all"], "label": ["x", "x"], "text": ["a", "b"]})
    assert refused("evaluate", "--transfer", "a.csv") == "a.csv: expected at least two labels, got 'x' in each row"


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["encode", "--finish", "out/", "--on-error", "skip"],
            "--finish: expected nothing beside the folder, got --on-error",
        ),
        (
            ["encode", "a.txt", "--output", "a.npy", "--precision", "uint8"],
            "--precision uint8: expected --calibration FILE",
        ),
        (
            ["search", "-", "-", "--index", "x"],
            "-: expected once, since standard input can be read once, got it 2 times",
        ),
        (["cache", "list", "abc"], "list: expected neither names nor --all, which clear takes, got abc"),
        (
            ["export", "--output", "a.onnx", "--max-length", "8"],
            "--max-length: expected with an --output FOLDER/ for servers",
        ),
    ],
)
def test_options(refused, arguments, message):
    assert refused(*arguments).startswith(message)


# ---------------------------------------------------------------- extras


def test_help_says_how_an_extra_is_installed(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    shown = "".join(capsys.readouterr().out.split())  # argparse breaks lines, also at hyphens
    assert f"It needs the extra demo: {files.installs('demo')}.".replace(" ", "") in shown

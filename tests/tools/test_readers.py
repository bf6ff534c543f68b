"""The same table in every format that the commands take, compressed and not, from standard input, from a data set on disk, with
columns of other names and fields within columns."""

import gzip
import io
import json
import re
import sys

import numpy as np
import pytest
from builders import save_encoder, save_model

pa = pytest.importorskip("pyarrow")

from pyarrow import feather, parquet  # noqa: E402

from s2sent_kernels import S2SentSelector, files  # noqa: E402
from s2sent_kernels.cli import main  # noqa: E402
from s2sent_kernels.tools import columns, evaluation, examples, labelled, readers, tables  # noqa: E402
from s2sent_kernels.tools.columns import Columns  # noqa: E402

PAIRS = [(f"a cat {i}", f"the dog {i}") for i in range(6)]
KINDS = ("tsv", "csv", "jsonl", "parquet", "arrow", "feather")


def as_bytes(rows, kind):
    """Rows of strings as a file of the kind."""
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind in ("tsv", "csv"):
        mark = "\t" if kind == "tsv" else ","
        return "".join(f"{mark.join(row)}\n" for row in [list(rows[0]), *(row.values() for row in rows)]).encode()
    if kind == "parquet":
        parquet.write_table(table, sink)
        return sink.getvalue()
    if kind == "feather":
        feather.write_feather(table, sink, compression="uncompressed")
        return sink.getvalue()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def compressed(content, ending):
    if ending == ".gz":
        return gzip.compress(content)
    return pa.compress(content, codec="zstd", asbytes=True) if ending == ".zst" else content


def given(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows(tmp_path, monkeypatch, kind, ending):
    rows = [{"query": one, "passage": other} for one, other in PAIRS]
    path = tmp_path / f"data.{kind}{ending}"
    path.write_bytes(compressed(as_bytes(rows, kind), ending))
    named = Columns({"anchor": "query", "positive": "passage"})
    assert examples.read_examples(path, columns=named).rows == PAIRS
    if not ending:
        given(monkeypatch, as_bytes(rows, kind))
        assert examples.read_examples("-", columns=named._replace(format=tables.KINDS[f".{kind}"])).rows == PAIRS


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_lines_of_text(tmp_path, monkeypatch, ending):
    path = tmp_path / f"data.txt{ending}"
    path.write_bytes(compressed(b"one\ntwo\n", ending))
    assert examples.read_examples(path).rows == [("one", "one"), ("two", "two")]
    assert labelled.read_texts(path) == ["one", "two"]
    given(monkeypatch, b"one\ntwo\n")
    assert labelled.read_texts("-") == ["one", "two"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("harm", ["cut", "other"])
def test_a_compressed_file_that_is_broken(tmp_path, ending, harm):
    content = compressed("".join(f"text {i}\n" for i in range(5000)).encode(), ending)
    path = tmp_path / f"data.txt{ending}"
    path.write_bytes(content[: len(content) // 2] if harm == "cut" else b"something else" * 9)
    with pytest.raises(ValueError, match=rf"data.txt{ending}: cannot be read: "):
        labelled.read_texts(path)


def test_zst_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError, match=rf"a.txt.zst: pyarrow cannot be imported .*{re.escape(files.installs('train'))}$"
    ):
        labelled.read_texts(tmp_path / "a.txt.zst")


def test_a_data_set_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"anchor": one, "positive": other} for one, other in PAIRS])
    one.save_to_disk(tmp_path / "one")
    assert readers.kind(tmp_path / "one") == "dataset"
    assert examples.read_examples(tmp_path / "one").rows == PAIRS
    datasets.DatasetDict({"train": one, "dev": one.select(range(2))}).save_to_disk(tmp_path / "several")
    assert examples.read_examples(tmp_path / "several").rows == PAIRS
    assert examples.read_examples(tmp_path / "several", split="dev").rows == PAIRS[:2]
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state.json: cannot be read, save the dataset again"):
        examples.read_examples(tmp_path / "one")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"expected a file of \.tsv"):
        examples.read_examples(tmp_path / "none")


# ---------------------------------------------------------------- fields within columns


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_fields_within_columns(tmp_path, kind):
    """The columns that hold them look like training data, and are read."""
    path = tmp_path / f"data.{kind}"
    path.write_bytes(
        as_bytes([{"query": {"text": one, "id": 7}, "doc": {"a": {"b": other}}} for one, other in PAIRS], kind)
    )
    named = columns.parse("anchor=query.text,positive=doc.a.b", examples.COLUMNS)
    assert examples.read_examples(path, columns=Columns(named)).rows == PAIRS
    with pytest.raises(
        ValueError,
        match=r"expected columns query.none and .*, got .*; --columns says that there is one named query.none",
    ):
        examples.read_examples(path, columns=Columns({"anchor": "query.none", "positive": "doc.a.b"}))


def test_a_column_whose_name_has_a_dot_comes_first(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"a.b": "mine", "a": {"b": "nested"}, "positive": "x"}) + "\n")
    found = examples.read_examples(path, columns=Columns({"anchor": "a.b"}))
    assert found.rows == [("mine", "x")]
    assert columns.field({"a": {"b": None}}, "a.b") is None
    for row in ({"a": 7}, {"a": None}, {}):
        with pytest.raises(KeyError):
            columns.field(row, "a.b")


# ---------------------------------------------------------------- the commands


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_evaluation_reads_what_training_reads(tmp_path, kind):
    rows = [{"split": "test", "sim": str(i), "a": one, "b": other} for i, (one, other) in enumerate(PAIRS)]
    path = tmp_path / f"sts.{kind}.gz"
    path.write_bytes(gzip.compress(as_bytes(rows, kind)))
    named = Columns({"score": "sim", "sentence1": "a", "sentence2": "b"})
    found = evaluation.read_sts(path, columns=named)
    assert [(pair.sentence1, pair.sentence2, pair.score) for pair in found] == [
        (one, other, float(i)) for i, (one, other) in enumerate(PAIRS)
    ]
    rows = [
        {"split": split, "label": str(i % 2), "body": one}
        for split in ("train", "test")
        for i, (one, _) in enumerate(PAIRS)
    ]
    path.write_bytes(gzip.compress(as_bytes(rows, kind)))
    assert [item.texts for item in evaluation.read_transfer(path, Columns({"text": "body"}))["test"]] == [
        (one,) for one, _ in PAIRS
    ]


def test_evaluation_refuses_what_is_no_text(tmp_path):
    path = tmp_path / "sts.jsonl"
    path.write_text('{"split": "test", "score": 1, "sentence1": "a", "sentence2": null}\n')
    with pytest.raises(ValueError, match=r"line 1: sentence2: expected a text, got null"):
        evaluation.read_sts(path)
    path.write_text('{"split": "train", "label": null, "text": "a"}\n')
    with pytest.raises(ValueError, match=r"line 1: label: expected a label, got null"):
        evaluation.read_transfer(path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize(
    "way", [["--columns", "text=doc.body,id=meta.key"], ["--column", "doc.body", "--id-column", "meta.key"]]
)
def test_encode_reads_fields_and_standard_input(place, monkeypatch, kind, way):
    rows = [{"doc": {"body": one}, "meta": {"key": f"n{i}", "other": 1}} for i, (one, _) in enumerate(PAIRS)]
    content = as_bytes(rows, kind)
    (place / f"in.{kind}").write_bytes(content)
    (place / "a.txt").write_text("".join(f"{one}\n" for one, _ in PAIRS))
    command = ["--model", "whole", "--device", "cpu", "--keep-text"]
    assert main(["encode", f"in.{kind}", "--output", "a.parquet", *way, *command]) == 0
    given(monkeypatch, content)
    assert main(["encode", "-", "--format", kind, "--output", "b.parquet", *way, *command]) == 0
    assert main(["encode", "a.txt", "--output", "c.parquet", *command]) == 0
    found, same, plain = (parquet.read_table(f"{name}.parquet") for name in "abc")
    assert found["text"].to_pylist() == [one for one, _ in PAIRS] and found["id"].to_pylist() == [
        f"n{i}" for i in range(6)
    ]
    assert found.equals(same)
    np.testing.assert_array_equal(found["embedding"].to_pylist(), plain["embedding"].to_pylist())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["encode", "a.txt", "--output", "a.npy", "--format", "csv"], "--format: expected with -, standard input"),
        (["encode", "-", "-", "--output", "a.npy"], "-: expected once"),
        (
            ["encode", "a.txt", "--output", "a.npy", "--columns", "body=x"],
            "--columns: expected text or id before the sign =, got 'body' in 'body=x'",
        ),
        (
            ["encode", "a.txt", "--output", "a.npy", "--columns", "text=x", "--column", "y"],
            "--columns: expected no --column and --id-column, which say the same, got 'text=x' beside one",
        ),
        (["evaluate", "--sts", "a.tsv", "--format", "csv"], "--format: expected with -"),
        (
            ["evaluate", "--sts", "a.tsv", "--columns", "label=x"],
            "--columns: expected score or sentence1 or sentence2 or split or subset before the sign =, got 'label' in 'label=x'",
        ),
        (
            ["evaluate", "--mteb", "Task", "--columns", "label=x"],
            "--columns: expected --sts or --transfer, whose columns it names, got 'label=x' beside --mteb alone",
        ),
        (["evaluate", "--sts", "-", "--transfer", "-"], "-: expected once"),
        (["train", "--data", "-", "--dev", "-", "--output", "out"], "-: expected once"),
        (["predict", "a.txt", "--model", "m", "--output", "a.tsv", "--format", "csv"], "--format: expected with -"),
        (["inspect", "--format", "csv"], "--format: expected with -"),
        (
            ["inspect", "--columns", "text=x"],
            "--columns: expected --file, whose columns it names, got 'text=x' without one",
        ),
        (["inspect", "--file", "a.txt", "--text", "x"], "--file and --text: expected one of them, got both"),
        (["encode", "-", "--output", "a.npy", "--format", "doc"], "invalid choice: 'doc'"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a cat\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_training_evaluation_and_inspection_from_standard_input(tmp_path, monkeypatch, capsys):
    for package in ("datasets", "matplotlib", "scipy", "sentence_transformers"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    save_encoder("encoder")
    S2SentSelector(16, 2, 4, 4).save_pretrained("selector", about={"encoder": "encoder"})
    content = as_bytes([{"q": {"t": one}, "p": other} for one, other in PAIRS], "jsonl")
    given(monkeypatch, content)
    train = ["train", "--freeze-encoder", "--data", "-", "--format", "jsonl", "--columns", "anchor=q.t,positive=p"]
    train += ["--model", "encoder", "--device", "cpu", "--epochs", "1", "--batch-size", "3", "--output", "out"]
    assert main(train) == 0
    rows = [{"split": "test", "sim": i, "sentence1": one, "sentence2": other} for i, (one, other) in enumerate(PAIRS)]
    given(monkeypatch, as_bytes(rows, "jsonl"))
    assert main(["evaluate", "--model", "out", "--sts", "-", "--format", "jsonl", "--columns", "score=sim"]) == 0
    (tmp_path / "few.csv").write_text("body\na cat\nthe moon\n")
    assert main(["inspect", "--model", "out", "--file", "few.csv", "--columns", "text=body"]) == 0
    assert " the moon" in capsys.readouterr().out

"""What `s2sent encode` reads: kinds of files, folders, globs, datasets on disk, the types of ids, and where each is refused."""

import json
import os
from decimal import Decimal

import pytest

pa = pytest.importorskip("pyarrow")

from pyarrow import csv, feather, ipc, parquet  # noqa: E402

from s2sent_kernels.tools.encoding import Columns, Request, plan, read_texts  # noqa: E402
from s2sent_kernels.tools.encoding.reading import Reader, format_of  # noqa: E402
from s2sent_kernels.tools.encoding.rows import DataError  # noqa: E402
from s2sent_kernels.tools.encoding.sources import expand, source  # noqa: E402

ROWS = 2500
TEXTS = [f'te\u00e9 {i}, "{i}"' if i % 7 else "" for i in range(ROWS)]
KINDS = ["txt", "jsonl", "csv", "tsv", "parquet", "feather", "arrow"]


def write(path, texts=TEXTS):
    """Texts, and names n0, n1, ... where there are columns, as a file of the kind of the path's first suffix."""
    kind, compression = path.name.split(".")[1:] + [None] * path.name.endswith(tuple(KINDS))
    plain = path.with_name(f"plain.{kind}")
    table = pa.table({"name": [f"n{i}" for i in range(len(texts))], "text": texts})
    if kind == "txt":
        plain.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    elif kind == "jsonl":  # with a byte order mark, empty lines and both ends of lines
        lines = [json.dumps({"text": text, "name": f"n{i}"}) + "\r\n" * (i % 3) for i, text in enumerate(texts)]
        plain.write_text("\ufeff\n" + "\n".join(lines), encoding="utf-8")
    elif kind == "csv":
        csv.write_csv(table, plain)
    elif kind == "tsv":
        plain.write_text("name\ttext\n" + "".join(f"n{i}\t{text}\n" for i, text in enumerate(texts)), encoding="utf-8")
    elif kind == "parquet":
        parquet.write_table(table, plain, row_group_size=300)
    elif kind == "feather":
        feather.write_feather(table, plain, chunksize=300)
    else:
        with ipc.new_stream(plain, table.schema) as writer:
            writer.write_table(table, 300)
    if compression is None:
        os.replace(plain, path)
    else:
        with pa.output_stream(path, compression={"gz": "gzip", "zst": "zstd"}[compression]) as stream:
            stream.write(plain.read_bytes())
        plain.unlink()
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts(tmp_path, kind):
    """Longer than the 131,072 characters that Python's csv module takes."""
    texts = ["a" * 300_000, "b " * 200_000, "c"]
    assert [row.text for row in read_texts([write(tmp_path / f"a.{kind}", texts)])] == texts


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_begins_at_any_part(tmp_path, kind, ending):
    path = write(tmp_path / f"a.{kind}{ending}")
    columns = Columns("text", None if kind == "txt" else "name")
    rows = list(read_texts([path], id_column=columns.id))
    assert [row.text for row in rows] == TEXTS
    assert [row.id for row in rows] == [i if kind == "txt" else f"n{i}" for i in range(ROWS)]
    where = source(path)
    survey = format_of(where, columns).survey(600)
    assert survey.rows == ROWS and [mark.row for mark in survey.marks] == [0, 600, 1200, 1800, 2400]
    assert survey.id_type == (None if kind == "txt" else pa.string())
    reader = Reader(columns)
    for part in (0, 1, 3, 4, 2):  # on, past others, and back
        start, stop = survey.marks[part], min(ROWS, 600 * (part + 1))
        texts, names = [], []
        for some, ids, _, _ in reader.rows(where, start, stop, 256):
            assert len(some) <= 256
            texts += some
            names += [name for each in ids or () for name in (each if isinstance(each, list) else each.to_pylist())]
        assert texts == TEXTS[start.row : stop]
        assert kind == "txt" or names == [f"n{i}" for i in range(start.row, stop)]


def test_csv_may_have_line_ends_within_a_text(tmp_path):
    (tmp_path / "a.csv").write_text('text,id\n"one\ntwo",007\nNA,\n"",null\n', encoding="utf-8")
    assert list(read_texts([str(tmp_path / "a.csv")], id_column="id")) == [
        ("007", "one\ntwo"),
        ("", "NA"),
        ("null", ""),
    ]


def test_folders_and_globs(tmp_path, capsys):
    for name in ("b.txt", "a.jsonl", "sub/c.txt.gz", "README.md", ".hidden.txt", "_notes.jsonl", "out/part-0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "sub" / "circle").symlink_to(tmp_path)

    def names(*arguments):
        found = expand([str(tmp_path / argument) for argument in arguments], str(tmp_path / "out"))
        return [os.path.relpath(path, tmp_path) for path in found]

    assert names(".") == ["a.jsonl", "b.txt", "sub/c.txt.gz"]
    assert "1 other files are left out" in capsys.readouterr().out
    (tmp_path / "sub" / "circle").unlink()
    assert names("*.txt", "a.jsonl") == ["b.txt", "a.jsonl"] and names("**/*.gz") == ["sub/c.txt.gz"]
    assert expand(["-"]) == ["-"]
    (tmp_path / "empty").mkdir()
    for argument, message in (("no*.txt", "there is no such file"), ("empty", "in it, got none")):
        with pytest.raises(ValueError, match=message):
            names(argument)


def test_the_folder_of_a_model_is_no_input(tmp_path, capsys):
    """A training leaves history.jsonl there, whose lines are no texts."""
    for name in ("selector", "sharded", "library"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "history.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "selector" / "model.safetensors").write_text("")
    (tmp_path / "sharded" / "pytorch_model.bin.index.json").write_text("")
    (tmp_path / "library" / "modules.json").write_text("[]")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "config.json").write_text("{}")  # of somebody's data: no weights are beside it
    (tmp_path / "data" / "a.txt").write_text("a\n")
    for name in ("selector", "sharded", "library"):
        for given in (tmp_path / name, f"{tmp_path / name}/"):
            with pytest.raises(
                ValueError, match=f"{name}/?: expected a folder of texts, got that of a model: --model "
            ):
                expand([str(given)])
    assert expand([str(tmp_path / "selector" / "history.jsonl")]) == [str(tmp_path / "selector" / "history.jsonl")]
    capsys.readouterr()
    for given in (".", "*"):
        found = expand([os.path.join(tmp_path, given)])
        assert [os.path.relpath(path, tmp_path) for path in found] == ["data/a.txt"], given
        said = capsys.readouterr().out
        assert all(name in said for name in ("selector", "sharded", "library")) and "left out" in said


def test_a_dataset_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS, "key": list(range(ROWS))})
    data.shuffle(seed=1).save_to_disk(tmp_path / "one", num_shards=2)
    files = expand([str(tmp_path / "one")])
    assert len(files) == 2
    assert sorted(read_texts(files, id_column="key")) == list(enumerate(TEXTS))
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "dictionary")
    with pytest.raises(ValueError, match=r"expected one split of the dataset, as .*dictionary/train"):
        expand([str(tmp_path / "dictionary")])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"", "expected texts, got an empty file"),
        ("a.csv", b"text\n", "expected texts, got an empty file"),
        ("a.csv", b"text,id\nx,1,2\n", "cannot be read: CSV parse error"),
        ("a.csv", b"text,text\nx,y\n", "expected each column once"),
        ("a.tsv", b"a\tb\nx\ty\n", "expected a column text, got a, b"),
        ("a.arrow", b"x", "cannot be read"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.parquet.zst", b"no zstd", "cannot be read"),
        ("a.json", b"[]", r"expected a file of .txt, .jsonl, .parquet, .csv, .tsv, .arrow, .feather, also with .gz"),
    ],
)
def test_broken_files_are_refused_by_the_plan(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        make([str(tmp_path / name)])
    assert name in str(caught.value) and "\n" not in str(caught.value)


def make(paths, id_column=None):
    request = Request(paths, Columns("text", id_column), part_rows=600)
    return plan.make(request, plan.key_of(request), None)


def test_a_text_that_is_not_utf8_has_a_row(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\nx\n\xff\n")
    with pytest.raises(DataError, match=r"row 2 is not UTF-8 \(byte 0xff\)") as caught:
        list(read_texts([str(tmp_path / "a.csv")]))
    assert caught.value.row == 2
    column = pa.array([b"x", b"\xff"]).view(pa.string())
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2 is not UTF-8"):
        list(read_texts([str(tmp_path / "a.parquet")]))
    parquet.write_table(pa.table({"text": [7]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="text: expected texts, got int64"):
        make([str(tmp_path / "b.parquet")])
    parquet.write_table(pa.table({"text": ["x", None]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="row 2: text: expected a text, got null"):
        list(read_texts([str(tmp_path / "c.parquet")]))


# ---------------------------------------------------------------- ids

IDS = {
    "uint64": pa.array([2**64 - 1, 0, None], pa.uint64()),
    "decimal": pa.array([Decimal("1.5"), None, Decimal("2.25")], pa.decimal128(20, 4)),
    "list": pa.array([[1], [], None], pa.list_(pa.int32())),
    "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": "y"}]),
    "nanoseconds": pa.array([1, 2, None], pa.timestamp("ns", "UTC")),
    "nulls": pa.nulls(3),
    "nulls at first": pa.array([None, None, "x"]),
    "bytes": pa.array([b"x", b"", None]),
    "large": pa.array(["x", "y", "z"], pa.large_string()),
    "dictionary": pa.array(["x", "y", "x"]).dictionary_encode(),
}


@pytest.mark.parametrize("name", IDS)
def test_ids_keep_their_type(tmp_path, name):
    """Also where the first part has nulls alone."""
    from fake_encoders import lengths

    from s2sent_kernels.tools.encoding import encode_file, in_this_process

    ids = IDS[name]
    path, output = tmp_path / "a.arrow", tmp_path / "out.parquet"
    feather.write_feather(pa.table({"text": ["a", "b", "c"], "key": ids}), path)
    request = Request([str(path)], Columns("text", "key"), part_rows=2)
    assert encode_file(request, in_this_process(lengths("cpu")), output) == 3
    found = parquet.read_table(output)["id"]
    assert found.combine_chunks().equals(ids.dictionary_decode() if name == "dictionary" else ids)


def test_ids_that_cannot_be_written_are_refused(tmp_path):
    interval = pa.array([pa.MonthDayNano([1, 2, 3])])
    feather.write_feather(pa.table({"text": ["a"], "key": interval}), tmp_path / "a.arrow")
    with pytest.raises(ValueError, match="key: ids of type month_day_nano_interval cannot be written"):
        make([str(tmp_path / "a.arrow")], "key")


@pytest.mark.parametrize(
    "values, message",
    [
        ([1, 2**70], "line 2: ids: expected values of one type"),
        (["a", 3], "line 2: ids: expected values of one type, got int and str"),
        ([1, None, 2.5], "line 3: ids: expected values of one type, got float and int"),
        ([*range(2000), 2**63], "line 2001: ids: expected values of one type"),
    ],
)
def test_ids_of_lines_have_one_type(tmp_path, values, message):
    lines = [json.dumps({"text": "x", "id": value}) for value in values]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        make([str(tmp_path / "a.jsonl")], "id")


def test_ids_of_files_have_one_type(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "id": null}\n')
    (tmp_path / "b.csv").write_text("text,id\nx,1\n")
    (tmp_path / "c.jsonl").write_text('{"text": "x", "id": 1}\n')
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.csv", "c.jsonl")]
    assert make(paths[:2], "id").id_type == pa.string()
    with pytest.raises(ValueError, match=r"c.jsonl: ids: expected values of one type, got string before and int64"):
        make(paths, "id")

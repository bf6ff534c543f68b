"""`s2sent search`: the rows that a comparison of all embeddings gives, for everything that encode writes; and what it refuses."""

import io
import json
import shutil
import sys
import weakref

import numpy as np
import pytest
import torch
from builders import save_model, sentences

pa = pytest.importorskip("pyarrow")
pytest.importorskip("sentence_transformers")

from pyarrow import parquet  # noqa: E402

from s2sent_kernels import Embedder, S2SentSelector, __version__  # noqa: E402
from s2sent_kernels.cli import main  # noqa: E402
from s2sent_kernels.tools import searching  # noqa: E402
from s2sent_kernels.tools.encoding import stored  # noqa: E402

TEXTS = sentences(30)
QUERY = "the small dog sleeps"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, its parts, and its embeddings of TEXTS in every form, with options and without."""
    root = tmp_path_factory.mktemp("search")
    save_model(root)
    (root / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    for name, options in {
        "plain.parquet": ["--keep-text"],
        "array.npy": [],
        "parts/": ["--keep-text", "--part-rows", "7"],
        "options.parquet": ["--normalize", "--truncate-dim", "8", "--prompt", "a ", "--output-dtype", "float16"],
        "int8.parquet": ["--precision", "int8", "--calibration", str(root / "texts.txt")],
        "binary.npy": ["--precision", "binary"],
    }.items():
        encode(root, f"{root}/{name}", *options)
    return root


def encode(root, output, *options, model="whole"):
    arguments = ["encode", str(root / "texts.txt"), "--output", output, "--model", str(root / model)]
    assert main([*arguments, "--device", "cpu", *map(str, options)]) == 0


def search(index, *arguments):
    return main(["search", "--index", str(index), "--device", "cpu", *map(str, arguments)])


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def cosines(root, query, prompt="", size=16):
    """By float64, of the model's own embeddings."""
    found = Embedder.from_pretrained(root / "whole", device="cpu").encode([prompt + text for text in (query, *TEXTS)])
    found = found[:, :size].astype(np.float64)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found[1:] @ found[0]


# ---------------------------------------------------------------- what it finds


@pytest.mark.parametrize("name", ["plain.parquet", "array.npy", "parts/", "options.parquet"])
def test_the_nearest_rows_are_found(places, capsys, name, monkeypatch):
    monkeypatch.setattr(stored, "ROWS", 4)  # several blocks
    of_options = name == "options.parquet"
    want = cosines(places, QUERY, *(("a ", 8) if of_options else ()))
    capsys.readouterr()
    assert search(f"{places}/{name}", QUERY, "--top", 5, "--json") == 0
    found = lines(capsys)
    best = np.argsort(-want, kind="stable")[:5]
    # A float16 has 11 bits; the sums of float32 are of 16 features.
    np.testing.assert_allclose([one["score"] for one in found], want[best], atol=2**-10 if of_options else 1e-6)
    assert [one["rank"] for one in found] == [1, 2, 3, 4, 5] and {one["query"] for one in found} == {QUERY}
    for one in found:  # texts of equal scores may stand in another order
        assert abs(want[one["id"]] - one["score"]) < 2**-10
        assert one["text"] == (TEXTS[one["id"]] if name in ("plain.parquet", "parts/") else None)


def test_lines_for_people_and_several_queries(places, capsys, monkeypatch):
    assert search(places / "plain.parquet", TEXTS[3], "--top", 1) == 0
    assert capsys.readouterr().out == f"1.0000  {TEXTS.index(TEXTS[3])}  {TEXTS[3]}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TEXTS[4]}\n\n{TEXTS[5]}\n"))
    assert search(places / "array.npy", TEXTS[3], "-", "--top", 1) == 0
    want = "\n".join(f"{TEXTS[i]}\n1.0000  {TEXTS.index(TEXTS[i])}\n" for i in (3, 4, 5))
    assert capsys.readouterr().out == want


def test_more_than_there_are(places, capsys):
    assert search(places / "plain.parquet", QUERY, "--top", 1000) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(TEXTS)


def test_ids_and_row_groups_of_other_programs(tmp_path, places, capsys):
    """What pandas makes of it: lists of any size, other row groups, ids of any type."""
    table = parquet.read_table(places / "plain.parquet")
    values = pa.array(table["embedding"].to_pylist(), pa.list_(pa.float32()))
    ids = pa.array([f"n{i}" for i in range(len(TEXTS))])
    other = pa.table({"text": table["text"], "embedding": values, "id": ids})
    parquet.write_table(other.replace_schema_metadata(table.schema.metadata), tmp_path / "a.parquet", row_group_size=4)
    assert search(tmp_path / "a.parquet", TEXTS[9], "--top", 1) == 0
    assert capsys.readouterr().out == f"1.0000  n{TEXTS.index(TEXTS[9])}  {TEXTS[9]}\n"


@pytest.mark.parametrize("engine", searching.ENGINES)
def test_the_engines_find_the_same(engine):
    if engine == "faiss":
        pytest.importorskip("faiss")
    generator = np.random.default_rng(0)
    queries, rows = generator.standard_normal((300, 8)), generator.standard_normal((50, 8))
    rows[7] = 0  # of an empty text: no direction, and no neighbour
    found = searching.nearest(queries.astype("f4"), np.split(rows.astype("f4"), [3, 30]), 4, engine).hits
    length = np.maximum(np.linalg.norm(rows, axis=1), 1e-12)
    want = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (rows / length[:, None]).T
    for hits, scores in zip(found, want, strict=True):
        assert [hit.row for hit in hits] == np.argsort(-scores)[:4].tolist()
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][:4], atol=1e-6)


def test_of_equal_scores_the_first_row_comes_first():
    rows = np.ones((9, 3), "f4")
    (hits,) = searching.nearest(np.ones((1, 3), "f4"), np.split(rows, [4]), 6).hits
    assert [hit.row for hit in hits] == [0, 1, 2, 3, 4, 5]


def test_rows_without_an_embedding_are_left_out():
    """As rows that encode has skipped."""
    rows = np.random.default_rng(0).normal(size=(9, 4)).astype("f4")
    rows[[0, 4, 8]] = np.nan
    found = searching.nearest(rows[[1, 5]], np.split(rows, [3, 4, 5]), 9)
    assert found.without == 3 and [hits[0].row for hits in found.hits] == [1, 5]
    assert all(sorted(hit.row for hit in hits) == [1, 2, 3, 5, 6, 7] for hits in found.hits)
    rows[6, 2] = np.inf
    with pytest.raises(ValueError, match="row 6: expected finite numbers"):
        searching.nearest(rows[[1]], np.split(rows, [3]), 2)


def test_memory_is_that_of_a_block(monkeypatch):
    """A block is gone once the one after the next is read, and few queries at once are compared with it."""
    known, alive = [], []

    def blocks():
        for _ in range(20):
            values = np.ones((10, 3), "f4")
            known.append(weakref.ref(values))
            yield values
            del values
            alive.append(sum(one() is not None for one in known))

    searching.nearest(np.ones((2, 3), "f4"), blocks(), 4)
    assert len(alive) == 20 and max(alive) <= 2
    monkeypatch.setattr(searching, "QUERIES", 1)
    sizes = []
    best = searching.ENGINES["torch"]
    monkeypatch.setitem(searching.ENGINES, "torch", lambda *some: sizes.append(some[0].shape) or best(*some))
    searching.nearest(np.ones((5, 3), "f4"), blocks(), 4)
    assert set(sizes) == {torch.Size([1, 3])}


# ---------------------------------------------------------------- the record


def test_what_encode_records(places):
    about = json.loads(parquet.read_schema(places / "options.parquet").metadata[b"s2sent"])
    options = about["options"]
    assert about["version"] == __version__ and about["model"] == str(places / "whole") and about["selector"] is None
    assert options["prompt"] == "a " and options["truncate_dim"] == 8 and options["normalize"] is True
    assert options["output_dtype"] == "float16" and options["dtype"] == "float32"
    assert options["max_length"] == Embedder.from_pretrained(places / "whole", device="cpu").max_length
    plain = json.loads((places / "array.npy.json").read_text())
    assert plain["weights"] == about["weights"] and plain["shape"] == [len(TEXTS), 16]
    assert json.loads((places / "parts" / "manifest.json").read_text())["provenance"]["weights"] == about["weights"]


def test_a_model_of_another_place_and_another_model(tmp_path, places, capsys):
    shutil.copytree(places / "whole", tmp_path / "copy")
    assert search(places / "plain.parquet", QUERY, "--model", tmp_path / "copy") == 0
    capsys.readouterr()
    torch.manual_seed(5)
    other = S2SentSelector.from_pretrained(places / "selector")
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    other.save_pretrained(tmp_path / "other", about={"encoder": str(places / "encoder"), "pooling": "mean"})
    assert search(places / "plain.parquet", QUERY, "--model", tmp_path / "other") == 2
    error = capsys.readouterr().err
    assert (
        f"--model {tmp_path / 'other'}: is another than the one that wrote" in error and str(places / "whole") in error
    )


def test_a_model_that_was_trained_since(tmp_path, places, capsys):
    for name in ("encoder", "selector", "texts.txt"):
        (shutil.copytree if (places / name).is_dir() else shutil.copy)(places / name, tmp_path / name)
    encode(tmp_path, f"{tmp_path}/a.npy", "--selector", tmp_path / "selector", model="encoder")
    assert search(tmp_path / "a.npy", QUERY) == 0
    selector = S2SentSelector.from_pretrained(tmp_path / "selector")
    config = json.loads((tmp_path / "selector" / "config.json").read_text())
    with torch.no_grad():
        next(selector.parameters()).mul_(1.5)
    about = {key: value for key, value in config.items() if key not in ("format", "selector")}
    selector.save_pretrained(tmp_path / "selector", about=about)
    capsys.readouterr()
    assert search(tmp_path / "a.npy", QUERY) == 2
    error = capsys.readouterr().err
    assert "or was trained since" in error and error.count("s2sent: error") == 1


def test_an_index_without_a_record(tmp_path, places, capsys):
    shutil.copy(places / "array.npy", tmp_path / "a.npy")
    assert search(tmp_path / "a.npy", QUERY) == 2
    assert "does not say which model wrote it: give --model" in capsys.readouterr().err
    assert search(tmp_path / "a.npy", TEXTS[2], "--model", places / "whole", "--top", 1) == 0
    assert capsys.readouterr().out.startswith(f"1.0000  {TEXTS.index(TEXTS[2])}")
    np.save(tmp_path / "b.npy", np.load(tmp_path / "a.npy")[:, :5])
    assert search(tmp_path / "b.npy", QUERY, "--model", places / "whole") == 2
    assert "expected embeddings of 16 features, as the model gives, got 5" in capsys.readouterr().err


# ---------------------------------------------------------------- what it refuses

WANTED = "what encode wrote, a file of .parquet or .npy or a finished folder of parts"


def test_a_folder_that_holds_no_parts(places, tmp_path, capsys):
    capsys.readouterr()
    assert search(tmp_path, QUERY) == 2
    assert f"{tmp_path}: expected {WANTED}, got an empty folder" in capsys.readouterr().err
    shutil.copy(places / "int8.parquet", tmp_path / "b.parquet")
    assert search(tmp_path, QUERY) == 2
    error = capsys.readouterr().err
    assert f"got a folder without manifest.json: name the file in it, as {tmp_path / 'b.parquet'}" in error
    shutil.copytree(places / "parts", tmp_path / "parts")
    (tmp_path / "parts" / "manifest.json").unlink()
    assert search(tmp_path / "parts", QUERY) == 2
    assert "expected a finished folder of parts, got one without manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, message",
    [
        ("int8.parquet", "expected embeddings of float16, float32, float64, got int8"),
        ("binary.npy", "expected embeddings of float16, float32, float64, got binary, stored as int8"),
        ("texts.txt", f"expected {WANTED}, got a file of suffix '.txt'"),
        ("whole", f"expected {WANTED}, got the folder of a model or selector"),
        ("nosuch.parquet", "there is no such file or folder"),
    ],
)
def test_what_cannot_be_compared(places, capsys, name, message):
    capsys.readouterr()
    assert search(places / name, QUERY) == 2
    error = capsys.readouterr().err
    assert message in error and name in error and error.count("\n") == 1


def test_an_index_whose_encoding_was_interrupted(places, tmp_path, capsys):
    capsys.readouterr()
    (tmp_path / ".a.parquet.parts").mkdir()
    assert search(tmp_path / "a.parquet", QUERY) == 2
    assert "was to write it: the same command goes on\n" in capsys.readouterr().err
    assert search(tmp_path / "b.parquet", QUERY) == 2
    assert f"{tmp_path / 'b.parquet'}: there is no such file or folder\n" in capsys.readouterr().err


def test_broken_indices(tmp_path, places, capsys):
    def refused(path, message):
        capsys.readouterr()
        assert search(path, QUERY) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("s2sent: error") == 1, error

    shutil.copytree(places / "parts", tmp_path / "parts")
    (tmp_path / "parts" / "part-000001.parquet").unlink()
    refused(tmp_path / "parts", "part-000001.parquet: cannot be read")
    shutil.copy(places / "parts" / "part-000000.parquet", tmp_path / "parts" / "part-000001.parquet")
    shutil.copy(places / "parts" / "part-000004.parquet", tmp_path / "parts" / "part-000000.parquet")
    refused(tmp_path / "parts", "expected 7 rows, as manifest.json says, got 2")
    manifest = json.loads((tmp_path / "parts" / "manifest.json").read_text())
    for parts, message in (
        ([], "got none"),
        ([{"file": "../a.parquet", "rows": 1}], "got ../a.parquet"),
        ([7], "no parts"),
    ):
        (tmp_path / "parts" / "manifest.json").write_text(json.dumps(manifest | {"parts": parts}))
        refused(tmp_path / "parts", message)
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    refused(tmp_path / "a.parquet", "cannot be read")
    (tmp_path / "e.npy").write_bytes(b"nothing")
    refused(tmp_path / "e.npy", "e.npy: cannot be read: it is no array of numpy's, although its suffix is .npy")
    parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    refused(tmp_path / "b.parquet", "expected a column embedding, as encode writes, got text")
    np.save(tmp_path / "c.npy", np.ones((2, 16), "f4"))
    shutil.copy(places / "array.npy.json", tmp_path / "c.npy.json")
    refused(tmp_path / "c.npy", "it tells of another array")
    values = np.load(places / "array.npy")
    values[3, 2] = np.nan
    np.save(tmp_path / "d.npy", values)
    shutil.copy(places / "array.npy.json", tmp_path / "d.npy.json")
    refused(tmp_path / "d.npy", "row 3: expected finite numbers")
    about = json.loads((places / "array.npy.json").read_text())
    for wrong in ({"options": {}}, {"weights": 7}, {"options": about["options"] | {"dtype": "float1"}}):
        (tmp_path / "d.npy.json").write_text(json.dumps(about | wrong))
        refused(tmp_path / "d.npy", "its record of the model cannot be read")
    (tmp_path / "d.npy.json").write_text(json.dumps(about | {"model": str(tmp_path / "gone")}))
    refused(tmp_path / "d.npy", "cannot load the model that it records; --model names another place")


@pytest.mark.parametrize("arguments, message", [([" "], "got an empty text"), (["-", "-"], "-: expected once")])
def test_wrong_queries(places, capsys, arguments, message):
    assert search(places / "array.npy", *arguments) == 2
    assert message in capsys.readouterr().err


def test_faiss_may_be_missing(places, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert search(places / "array.npy", QUERY, "--engine", "faiss") == 2
    assert "pip install faiss-cpu" in capsys.readouterr().err

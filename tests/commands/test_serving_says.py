"""What encode, search, predict, export, inspect and doctor say unasked: what is made, left out or kept, how to mend an input."""

import multiprocessing
import sys

import pytest
from builders import TEXTS, make_encoder_and_tokenizer, save_encoder, save_model

pytest.importorskip("pyarrow")
pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

from s2sent_kernels import S2SentSelector, waiting  # noqa: E402
from s2sent_kernels.cli import main  # noqa: E402
from s2sent_kernels.commands import encode_worker, predict  # noqa: E402
from s2sent_kernels.transformers import S2SentForSequenceClassification  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, a classifier that no command trained, and an index without texts."""
    root = tmp_path_factory.mktemp("says")
    save_model(root)
    (root / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    save_encoder(root / "plain")
    made = S2SentForSequenceClassification.from_encoder(str(root / "plain"), None, num_labels=3, bottleneck=4)
    made.eval().save_pretrained(root / "classifier")
    make_encoder_and_tokenizer()[1].save_pretrained(root / "classifier")
    return root


@pytest.fixture
def run(root, tmp_path, monkeypatch, capsys):
    """A command in a folder of its own; returns what it said on both streams."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        capsys.readouterr()
        assert main([*map(str, arguments), "--device", "cpu"]) == code
        return capsys.readouterr()

    return run


@pytest.mark.parametrize("kept", [False, True])
def test_search_says_that_an_index_keeps_no_texts(root, run, kept):
    options = ["--keep-text"] if kept else []
    run("encode", root / "texts.txt", "--model", root / "whole", "--output", "a.parquet", *options)
    for options in ([], ["--json"]):
        said = run("search", "--index", "a.parquet", TEXTS[0], "--top", 2, *options).err
        assert said == ("" if kept else "a.parquet: keeps no texts: `s2sent encode --keep-text` would show them\n")


@pytest.mark.parametrize("output, folder", [("no/such/a.parquet", "no/such"), ("no/parts/", "no")])
def test_encode_says_which_folder_it_makes(root, run, output, folder):
    command = ("encode", root / "texts.txt", "--model", root / "whole", "--output", output)
    said = f"{folder}: there is no such folder yet: it will be made\n"
    assert run(*command).err == said
    assert said not in run(*command, "--force").err


def test_predict_and_inspect_say_it_too(root, run):
    pytest.importorskip("matplotlib")
    said = run("predict", root / "texts.txt", "--model", root / "classifier", "--output", "no/a.tsv").err
    assert said == "no: there is no such folder yet: it will be made\n"
    command = ("inspect", "--model", root / "whole", "--text", "a", "--output-dir")
    assert run(*command, "deep/er/pictures").err == "deep/er: there is no such folder yet: it will be made\n"
    assert "no such folder" not in run(*command, "pictures").err


def test_encode_says_that_a_classifier_is_one(root, run):
    said = run("encode", root / "texts.txt", "--model", root / "classifier", "--output", "a.npy").err
    assert said == f"{root / 'classifier'}: is a classifier: its embeddings are written, and not its labels\n"


def test_inspect_says_whose_texts_it_looks_at(root, run):
    pytest.importorskip("matplotlib")
    said = run("inspect", "--model", root / "whole").err
    assert said == "no --text and no --file: 3 example sentences are looked at\n"
    assert "example" not in run("inspect", "--model", root / "whole", "--text", "a", "--force").err
    assert "--force replaces it" in run("inspect", "--model", root / "whole", code=2).err


def test_a_file_of_another_encoding_is_told_the_remedy(root, run, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"a\n\xe9t\xe9\n")
    (tmp_path / "latin.csv").write_bytes(b"text\n\xe9t\xe9\n")
    remedy = ": convert it, as `iconv -f LATIN1 -t UTF-8` does from Latin-1"
    for name in ("latin.txt", "latin.csv"):
        command = ("--output", "a.tsv", "--model", root / "classifier")
        assert f"is not UTF-8 (byte 0xe9){remedy}\n" in run("predict", name, *command, code=2).err
        command = ("--output", "a.npy", "--model", root / "whole")
        assert f"is not UTF-8 (byte 0xe9){remedy}" in run("encode", name, *command, code=2).err


def test_a_stray_word_is_told_before_what_is_missing(run):
    said = run("export", "m1", code=2).err
    assert "unrecognized arguments: m1: it takes options alone, a model or its folder with --model" in said
    assert "required: --output" in run("export", code=2).err


def test_an_interrupted_prediction_keeps_nothing(root, run, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "_logits", interrupted)
    command = ("predict", root / "texts.txt", "--model", root / "classifier", "--output", "a.tsv")
    assert run(*command, code=130).err.startswith("nothing is kept: ")
    assert not (tmp_path / "a.tsv").exists()


def test_empty_texts_are_texts_of_encode_and_predict(root, run, tmp_path):
    """A row of the output for each of the input."""
    (tmp_path / "a.txt").write_text("a cat\n\n \na dog\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a cat"}\n{"text": ""}\n')
    for name, rows in (("a.txt", 4), ("a.jsonl", 2)):
        options = ("--output", "a.tsv", "--force")
        assert run("predict", name, "--model", root / "classifier", *options).out == f"wrote a.tsv: {rows} rows\n"
        assert (tmp_path / "a.tsv").read_text().count("\n") == rows + 1
        options = ("--output", "a.npy", "--force")
        assert run("encode", name, "--model", root / "whole", *options).out == f"wrote a.npy: {rows} texts\n"


def test_doctor_does_not_call_a_folder_twice_what_it_is(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    about = {"blocks": [0, 1], "encoder": str(root / "encoder"), "pooling": "mean"}
    S2SentSelector(16, 2, 4, 4).save_pretrained("selector", about=about)
    assert main(["doctor", "--model", "selector"]) == 0
    out = capsys.readouterr().out
    assert "a selector alone, selector, for the encoder " in out and "selector selector" not in out


def test_a_worker_leaves_the_terminal_to_its_parent(root, monkeypatch, capsys):
    monkeypatch.setattr(waiting, "SILENCE", 0.0)
    monkeypatch.setattr(waiting, "SHORT", 0.0)
    options = encode_worker.EncoderOptions(
        str(root / "whole"), None, "float32", None, "truncate", None, None, False, None
    )
    encode_worker.make_encoder(options, "cpu")
    assert f"loading {root / 'whole'} ..." in capsys.readouterr().err
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: sys)
    encode_worker.make_encoder(options, "cpu")
    assert capsys.readouterr().err == ""

"""One length everywhere: the tokens at which a model's folders cut texts are those of training, evaluation, encoding, inspection
and export."""

import json

import numpy as np
import pytest
import torch
from builders import pairs, save_encoder, write_examples

pytest.importorskip("sentence_transformers")
pytest.importorskip("pyarrow")

from s2sent_kernels import Embedder, S2SentSelector, parts
from s2sent_kernels.cli import main
from s2sent_kernels.commands import common
from s2sent_kernels.sentence_transformers import load
from s2sent_kernels.tools import encoders

LONG = " ".join(["the cat sat on the mat"] * 6)  # 38 tokens
TEXTS = [LONG, "a dog ran", f"{LONG} the moon", "the dog"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An encoder of 512 positions whose folder says 24 tokens; a selector whose folder says 20, and one that says nothing."""
    monkeypatch.chdir(tmp_path)
    save_encoder("encoder")
    (tmp_path / "encoder" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    torch.manual_seed(0)
    selector = S2SentSelector(16, 2, 4, 4, block_prior=True)
    selector.save_pretrained("short", about={"max_length": 20, "encoder": "encoder"})
    selector.save_pretrained("silent", about={"encoder": "encoder"})
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    rows = "".join(f"test\t{i}\t{text}\t{TEXTS[i - 1]}\n" for i, text in enumerate(TEXTS))
    (tmp_path / "sts.tsv").write_text("split\tscore\tsentence1\tsentence2\n" + rows)
    write_examples(tmp_path / "data.tsv", [(LONG, f"{LONG} is"), *pairs(7)])
    return tmp_path


@pytest.fixture
def lengths(monkeypatch):
    """The lengths of the longest texts that tokenizers gave."""
    from s2sent_kernels.batches import TextTokenizer

    seen, begin = set(), TextTokenizer.__init__

    def init(self, tokenizer, limit, *rest):
        seen.add(limit)
        begin(self, tokenizer, limit, *rest)

    monkeypatch.setattr(TextTokenizer, "__init__", init)
    return seen


@pytest.mark.parametrize("selector, expected", [("silent", 24), ("short", 20)])
@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "--sts", "sts.tsv", "--output-dir", "out"],
        ["inspect", "--text", LONG, "--output-dir", "out"],
        ["encode", "texts.txt", "--output", "out.npy"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_cuts_where_the_folders_say(place, lengths, selector, expected, command):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    assert main([*command, "--model", "encoder", "--selector", selector, "--device", "cpu"]) == 0
    assert lengths == {expected}


@pytest.mark.parametrize("kind", [["--freeze-encoder"], ["--freeze-encoder", "--task", "classification"], []])
def test_training_cuts_where_the_encoders_folder_says(place, lengths, kind):
    pytest.importorskip("datasets")
    data = "data.tsv"
    if "--task" in kind:
        data = "labelled.tsv"
        rows = "".join(f"{i % 2}\t{TEXTS[i % 4]} {i}\n" for i in range(24))
        (place / data).write_text("label\ttext\n" + rows)
    command = ["train", "--data", data, "--model", "encoder", "--output", "out", "--epochs", "1", "--batch-size", "4"]
    command += ["--cache", "cache"] if kind else []
    assert main([*command, *kind, "--device", "cpu"]) == 0
    if not kind:
        assert load("out").max_seq_length == 24
        return
    assert lengths == {24}
    if "--task" not in kind:
        assert json.loads((place / "out" / "config.json").read_text())["max_length"] == 24
        assert Embedder.from_pretrained("out", device="cpu").max_length == 24


def test_servers_truncate_there_too(place):
    pytest.importorskip("onnxscript")
    assert main(["export", "--model", "encoder", "--selector", "short", "--output", "served/"]) == 0
    assert json.loads((place / "served" / "sentence_bert_config.json").read_text())["max_seq_length"] == 20


def test_encode_gives_what_the_library_gives(place, capsys):
    command = ["encode", "texts.txt", "--model", "encoder", "--selector", "short", "--output", "a.npy"]
    assert main([*command, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "2 of 4 texts have more than 20 tokens and were cut"
    np.testing.assert_allclose(np.load("a.npy"), load("short", device="cpu").encode(TEXTS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "--sts", "sts.tsv", "--output-dir", "out", "--selector", "short"],
        ["encode", "texts.txt", "--output", "out.npy", "--selector", "short"],
        ["export", "--output", "served/", "--selector", "short"],
        ["train", "--data", "data.tsv", "--output", "out"],
    ],
    ids=lambda command: command[0],
)
def test_a_length_beyond_the_folders_is_refused(place, capsys, command):
    """It would be taken and ignored."""
    if command[0] == "train":
        pytest.importorskip("datasets")
    pytest.importorskip("matplotlib")
    own = 24 if command[0] == "train" else 20
    assert main([*command, "--model", "encoder", "--max-length", "30", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"--max-length: expected at most {own}, at which the model's folder cuts texts, got 30" in error


def test_where_no_folder_says_the_encoder_decides(place):
    (place / "encoder" / "sentence_bert_config.json").unlink()
    assert parts.max_length("encoder") is None and common.within(None, None) is None and common.within(7, None) == 7
    made = Embedder.from_pretrained("encoder", "silent", device="cpu")
    rows = [[0]]
    (batch,) = encoders.token_batches(made.encoder, made.tokenizer, ["cat " * 700], rows, max_length=None)
    assert batch.inputs["input_ids"].shape == (1, 512) and made.max_length == 512

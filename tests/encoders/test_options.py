"""The options of transformers that S2SentModel's loaders take mean what they mean there: each has an effect, or is refused by
name. Those of ``load`` are in test_loading.py, those of its ONNX backend in test_servers.py."""

import copy

import pytest
import torch
import transformers
from builders import save_encoder

from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel

KINDS = (S2SentModel, S2SentForSequenceClassification)
BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder, layers=3)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def saved(encoder, kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    kind.from_encoder(encoder, "last:2", bottleneck=4).save_pretrained(folder)
    return folder


def encoder_of(model):
    return getattr(model, "model", model).encoder


def loaders(kind, saved, encoder):
    """Functions of options."""
    auto = transformers.AutoModel if kind is S2SentModel else transformers.AutoModelForSequenceClassification
    return [
        lambda **options: kind.from_pretrained(saved, **options),
        lambda **options: auto.from_pretrained(saved, **options),
        lambda **options: kind.from_encoder(encoder, "last:2", bottleneck=4, **options),
        lambda **options: kind.from_encoder(encoder, "last:2", bottleneck=4, model_kwargs=options),
    ]


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_attn_implementation(name, kind, saved, encoder):
    for load in loaders(kind, saved, encoder):
        model = load(attn_implementation=name)
        assert encoder_of(model).config._attn_implementation == name
    assert encoder_of(kind.from_pretrained(saved)).config._attn_implementation == "sdpa"  # the library's default
    model.set_attn_implementation("eager")
    assert encoder_of(model).config._attn_implementation == "eager"


def test_attn_implementation_that_the_encoder_has_not(kind, saved, encoder):
    """The message is the encoder's own."""
    for load in loaders(kind, saved, encoder):
        with pytest.raises(ValueError, match='attn_implementation="bogus"` is not supported'):
            load(attn_implementation="bogus")
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    deberta = transformers.DebertaV2Model(transformers.DebertaV2Config(**sizes, intermediate_size=32))  # eager alone
    model = S2SentModel.from_encoder(deberta, bottleneck=4, blocks="last:2")
    again = S2SentModel(copy.deepcopy(model.config))
    assert again.encoder.config._attn_implementation == "eager"
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="DebertaV2Model does not support an attention implementation through torch"):
        S2SentModel(model.config)


def test_dtype(kind, saved, encoder):
    for load in loaders(kind, saved, encoder):
        model = load(dtype="bfloat16")
        assert encoder_of(model).dtype == model.dtype == encoder_of(model).config.dtype == torch.bfloat16
        (found,) = model(**BATCH, return_dict=False)
        assert found.dtype == torch.bfloat16


def test_a_value_of_the_encoders_configuration(kind, encoder):
    model = kind.from_encoder(encoder, "last:2", model_kwargs={"hidden_act": "relu"})
    assert encoder_of(model).config.hidden_act == "relu"


OTHERS = ("processor_kwargs", "config_kwargs", "truncate_dim", "prompts", "tokenizer")


@pytest.mark.parametrize("name", [*OTHERS, "model_kwargs", "backend"])
def test_what_from_pretrained_cannot_follow(name, kind, saved):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        kind.from_pretrained(saved, **{name: {}})


@pytest.mark.parametrize("name", OTHERS)
def test_what_from_encoder_cannot_follow(name, kind, encoder):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        kind.from_encoder(encoder, "last:2", **{name: {}})


def test_backend_is_the_selectors(kind, encoder):
    model = kind.from_encoder(encoder, "last:2", backend="reference")
    assert getattr(model, "model", model).selector.backend == "reference"


def test_options_of_an_encoder_beside_a_model(kind, encoder):
    model = transformers.AutoModel.from_pretrained(encoder)
    for name, value in (("dtype", "bfloat16"), ("attn_implementation", "eager"), ("model_kwargs", {})):
        with pytest.raises(ValueError, match=rf"^{name}: expected none beside a model, .* with BertModel$"):
            kind.from_encoder(model, "last:2", **{name: value})
    with pytest.raises(TypeError, match="model_kwargs: expected a mapping, got str"):
        kind.from_encoder(encoder, "last:2", model_kwargs="bfloat16")
    with pytest.raises(ValueError, match=r"model_kwargs: expected none of the other arguments in it, got dtype"):
        kind.from_encoder(encoder, "last:2", dtype="float16", model_kwargs={"dtype": "bfloat16"})

"""What is changed after a model was made, in the encoder's configuration or in its selector, is saved and comes back."""

import copy
import pickle

import pytest
import torch
import transformers
from builders import save_encoder

from s2sent_kernels import S2SentSelector
from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel

KINDS = (S2SentModel, S2SentForSequenceClassification)
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
}


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


def t5():
    config = transformers.T5Config(vocab_size=50, d_model=16, num_layers=3, num_heads=2, d_kv=8, d_ff=32)
    return transformers.T5EncoderModel(config).eval()


def reloaded(kind, model, path):
    model.save_pretrained(path)
    return kind.from_pretrained(path)


def made(kind, encoder, path):
    """Models of all origins."""
    torch.manual_seed(0)
    model = kind.from_encoder(encoder(), "last:2", bottleneck=4)
    return {
        "fresh": model,
        "copied": copy.deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
        "loaded": reloaded(kind, model, path),
    }


def encoder_of(model):
    return model.base_model.encoder


@torch.no_grad()
@pytest.mark.parametrize("through", ["model", "encoder"])
@pytest.mark.parametrize("encoder", [bert, t5])
@pytest.mark.parametrize("kind", KINDS)
def test_more_tokens(kind, encoder, through, tmp_path):
    for origin, model in made(kind, encoder, tmp_path / "first").items():
        resized = model if through == "model" else encoder_of(model)
        assert resized.resize_token_embeddings(57, pad_to_multiple_of=64).weight.shape == (64, 16)
        assert model.get_input_embeddings().num_embeddings == 64
        again = reloaded(kind, model, tmp_path / origin)
        assert encoder_of(again).config.vocab_size == again.config.encoder_config.vocab_size == 64
        wanted, found = (one(**BATCH, return_dict=False)[0] for one in (model, again))
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoders_configuration_is_the_one_that_is_saved(kind, tmp_path):
    for origin, model in made(kind, bert, tmp_path / "first").items():
        assert model.config.encoder_config is encoder_of(model).config
        encoder_of(model).config.hidden_dropout_prob = 0.25
        again = reloaded(kind, model, tmp_path / origin)
        dropout = encoder_of(again).embeddings.dropout
        assert dropout.p == again.config.encoder_config.hidden_dropout_prob == 0.25
        encoder_of(again).config = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.5)
        assert encoder_of(reloaded(kind, again, tmp_path / origin)).config.hidden_dropout_prob == 0.5


def test_a_model_and_the_classifier_around_it_have_one_encoder(tmp_path):
    model = S2SentModel.from_encoder(bert(), "last:2", bottleneck=4)
    whole = S2SentForSequenceClassification.from_model(model)
    model.resize_token_embeddings(60)
    for one in (model, whole):
        assert encoder_of(reloaded(type(one), one, tmp_path / type(one).__name__)).config.vocab_size == 60


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_another_selector(kind, tmp_path):
    model = kind.from_encoder(bert(), "last:2", bottleneck=4, backend="reference")
    other = S2SentSelector(16, 2, 6, block_prior=True, gate_scale=2.0, gate_norm=None, backend="reference")
    model.base_model.selector = other.eval()
    model.base_model.selector.frequencies = 8
    again = reloaded(kind, model, tmp_path)
    selector = again.base_model.selector
    assert (selector.bottleneck, selector.frequencies, selector.norm, selector.backend) == (6, 8, None, "reference")
    assert torch.equal(again(**BATCH, return_dict=False)[0], model(**BATCH, return_dict=False)[0])


def test_another_selector_of_a_sentence_transformer(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Transformer

    from s2sent_kernels.sentence_transformers import S2SentPooling, load

    save_encoder(tmp_path / "encoder")
    transformer = Transformer(str(tmp_path / "encoder"))
    pooling = S2SentPooling.behind(transformer, "last:2", bottleneck=4)
    pooling.selector = S2SentSelector(16, 2, 6, block_prior=True).eval()
    transformer.auto_model.resize_token_embeddings(64)
    model = sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu")
    wanted = model.encode(["the cat"])
    model.save(str(tmp_path / "saved"), create_model_card=False)
    assert (load(tmp_path / "saved", device="cpu").encode(["the cat"]) == wanted).all()

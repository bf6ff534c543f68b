"""S2SentModel: what from_encoder computes, and a saved and loaded model gives the same bits."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import transformers

from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.engines.triton.limits import triton_interprets
from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel

_SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def _encoder(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if family == "bert":
        return transformers.BertModel(transformers.BertConfig(**_SIZES)).eval()
    config = transformers.T5Config(vocab_size=50, d_model=16, num_layers=3, num_heads=2, d_kv=8, d_ff=32)
    return transformers.T5EncoderModel(config).eval()


def _batch() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
    }


@pytest.mark.parametrize("family", ["bert", "t5"])
@torch.no_grad()
def test_a_saved_model_comes_back_with_the_same_bits(family, tmp_path):
    encoder = _encoder(family)
    model = S2SentModel.from_encoder(
        encoder, "last:2", block_norm=None, bottleneck=4, frequencies=2, block_prior=True, gate_scale=3.0
    )
    model.selector.block_prior[0] = 0.5
    found = model(**_batch()).embedding
    with BlockCapture(encoder, "last:2", block_norm=None) as capture:
        torch.testing.assert_close(found, capture.pool(model.selector, **_batch()), rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    for loader in (S2SentModel, transformers.AutoModel):
        loaded = loader.from_pretrained(tmp_path)
        assert loaded.config.block_norm is None and type(loaded.encoder) is type(encoder)
        assert torch.equal(loaded(**_batch()).embedding, found)


@torch.no_grad()
def test_tokens_and_gates_on_request():
    model = S2SentModel.from_encoder(_encoder("bert"), "last:2", bottleneck=4, frequencies=2)
    output = model(**_batch(), output_tokens=True, output_gates=True)
    assert output.tokens.shape == (2, 4, 16) and not output.tokens[1, 2:].any()
    torch.testing.assert_close(output.gates.sum(dim=1), torch.ones(2, 16))
    assert model(**_batch()).tokens is None


def test_tokens_and_gates_do_not_count_as_batches_of_their_own():
    model = S2SentModel.from_encoder(_encoder("bert"), "last:2", bottleneck=4, frequencies=2).train()
    model(**_batch(), output_tokens=True, output_gates=True).embedding.sum().backward()
    assert model.selector.norm.num_batches_tracked == 1
    assert model.selector.up.weight.grad.isfinite().all()


@torch.no_grad()
def test_the_embedding_beside_tokens_and_gates():
    model = S2SentModel.from_encoder(_encoder("bert"), "last:2", bottleneck=4, frequencies=2)
    output = model(**_batch(), output_tokens=True, output_gates=True)
    torch.testing.assert_close(output.embedding, model(**_batch()).embedding, rtol=1e-5, atol=1e-6)
    mask = _batch()["attention_mask"][..., None]
    mean = (output.tokens * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(output.embedding, mean, rtol=1e-5, atol=1e-6)


def test_what_the_library_asks_of_a_model():
    model = S2SentModel.from_encoder(_encoder("bert"), "last:2", bottleneck=4, frequencies=2)
    assert model.get_input_embeddings() is model.encoder.embeddings.word_embeddings
    batch = _batch()
    expected = model(**batch).embedding
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"], return_dict=False)[0], expected)
    expected.sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.encoder.encoder.layer[0].gradient_checkpointing
    model.encoder.train()
    for module in model.encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model(**batch).embedding.sum().backward()
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert (grad is None) == (parameter.grad is None)
        assert grad is None or torch.equal(grad, parameter.grad)


def test_a_path_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"path_or_model: expected a folder or a hub's model, got '.*none'"):
        S2SentModel.from_encoder(tmp_path / "none")


def test_a_pooling_that_does_not_exist():
    with pytest.raises(ValueError, match="pooling"):
        S2SentModel.from_encoder(_encoder("bert"), pooling="max")


# ---------------------------------------------------------------- the encoder's own inputs


def _distilbert() -> transformers.PreTrainedModel:
    config = transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=32)
    return transformers.DistilBertModel(config).eval()


def _names(model: torch.nn.Module) -> set[str]:
    """What Trainer reads."""
    return set(inspect.signature(model.forward).parameters)


def _both(encoder: transformers.PreTrainedModel) -> list[Any]:
    model = S2SentModel.from_encoder(encoder, "last:2", bottleneck=4, frequencies=2)
    return [model, S2SentForSequenceClassification.from_model(model)]


def test_the_signature_names_what_the_encoder_takes(tmp_path):
    """Of copies, pickles, loaded models and compiled ones too. Each model names its own encoder's inputs."""
    known = {"input_ids", "attention_mask", "pooling_mask", "return_dict"}
    options = {"output_attentions", "output_hidden_states", "return_dict", "args", "kwargs"}
    for encoder in (_encoder("bert"), _distilbert(), _encoder("t5")):
        wanted = set(inspect.signature(encoder.forward).parameters) - options
        for model in _both(encoder):
            model.save_pretrained(tmp_path)
            copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), type(model).from_pretrained(tmp_path))
            for each in (model, *copies):
                assert _names(each) >= wanted | known
                own = {"labels"} if "labels" in _names(each) else {"output_tokens", "output_gates"}
                assert _names(each) - wanted - known - own == {"encoder_inputs"}
    for model in _both(_encoder("bert")):
        assert (
            "token_type_ids" in _names(model) and "token_type_ids" in inspect.signature(type(model).forward).parameters
        )
    assert "token_type_ids" not in _names(_both(_distilbert())[1])


@torch.no_grad()
def test_each_input_reaches_the_encoder():
    batch, encoder = _batch(), _encoder("bert")
    inputs = {
        "token_type_ids": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]),
        "position_ids": torch.tensor([[4, 3, 2, 1], [3, 2, 1, 0]]),
    }
    for model in _both(encoder):
        plain = model(**batch)[0]
        for name, value in inputs.items():
            assert not torch.equal(model(**batch, **{name: value})[0], plain), name
        embedded = encoder.get_input_embeddings()(batch["input_ids"])
        assert torch.equal(model(inputs_embeds=embedded, attention_mask=batch["attention_mask"])[0], plain)


def test_trainer_hands_on_token_type_ids_and_divides_by_accumulated_steps(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"input_ids": [5, 6, 7], "attention_mask": [1] * 3, "token_type_ids": [0, 1, 1], "other": 3, "label": i % 2}
        for i in range(4)
    ]
    model, calls = _both(_encoder("bert"))[1], []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=datasets.Dataset.from_list(rows))
    trainer.train()
    assert len(calls) == 2
    for call in calls:
        assert call["token_type_ids"].tolist() == [[0, 1, 1]] * 2 and "other" not in call
    assert not trainer.model_accepts_loss_kwargs


@torch.no_grad()
@pytest.mark.parametrize("option", ["output_attentions", "output_hidden_states"])
def test_the_encoders_outputs_are_returned_where_they_are_asked_for(option):
    name = option.removeprefix("output_")
    for model in _both(_encoder("bert")):
        encoder, plain = model.base_model.encoder, model(**_batch())
        assert name not in plain and name not in model(**_batch(), **{option: False})
        if option == "output_attentions":
            model.set_attn_implementation("eager")  # transformers lets the configuration ask for them only then
            plain = model(**_batch())
        wanted = encoder(**_batch(), **{option: True})[name]
        asked = model(**_batch(), **{option: True})
        setattr(model.config, option, True)
        for found in (asked, model(**_batch())):
            assert len(found[name]) == len(wanted) and all(map(torch.equal, found[name], wanted))
            torch.testing.assert_close(found[0], plain[0])
        assert model(**_batch(), return_dict=False)[-1][0].shape == wanted[0].shape
        assert name not in model(**_batch(), **{option: False})
        setattr(model.config, option, False)


def test_the_vocabulary_is_the_encoders():
    for size, model in zip((60, 70), _both(_encoder("bert")), strict=True):
        model.resize_token_embeddings(size)
        assert model.vocab_size == model.config.vocab_size == model.base_model.encoder.config.vocab_size == size


def test_options_of_the_other_model_are_refused():
    model, classifier = _both(_encoder("bert"))
    with pytest.raises(ValueError, match="labels: expected none of an S2SentModel"):
        model(**_batch(), labels=torch.tensor([0, 1]))
    for option in ("output_tokens", "output_gates"):
        classifier(**_batch(), **{option: False})
        with pytest.raises(ValueError, match=f"{option}: expected False of a classifier, got True"):
            classifier(**_batch(), **{option: True})


@torch.no_grad()
def test_tuples_where_the_call_or_the_configuration_asks_for_them():
    for model in _both(_encoder("bert")):
        wanted = model(**_batch())
        assert torch.equal(model(**_batch(), return_dict=False)[0], wanted[0])
        model.config.return_dict = False
        assert type(model(**_batch())) is tuple
        assert type(model(**_batch(), return_dict=True)) is type(wanted)


@pytest.mark.skipif(triton_interprets(), reason="compiling and interpreting need separate processes")
@torch.no_grad()
def test_compiled_into_one_graph():
    batch = _batch() | {"token_type_ids": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])}
    for model in _both(_encoder("bert")):
        wanted = model(**batch)[0]
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**batch)[0], wanted)
        assert "token_type_ids" in _names(model)
    torch._dynamo.reset()


def test_the_attention_is_the_encoders(tmp_path):
    """The one asked for when a model is loaded, or later, is the encoder's; the model tells which it is."""
    eager = _encoder("bert")
    eager.set_attn_implementation("eager")
    for model in _both(eager):
        assert model.config._attn_implementation == "eager"
        model.save_pretrained(tmp_path)
        for asked, found in (
            (None, "sdpa"),
            ("eager", "eager"),
            ("sdpa", "sdpa"),
            ("flex_attention", "flex_attention"),
        ):
            options = {} if asked is None else {"attn_implementation": asked}
            loaded = type(model).from_pretrained(tmp_path, **options)
            encoder = getattr(loaded, "model", loaded).encoder
            assert encoder.config._attn_implementation == loaded.config._attn_implementation == found
        loaded.set_attn_implementation("eager")
        assert encoder.config._attn_implementation == loaded.config._attn_implementation == "eager"
        with pytest.raises(ValueError, match="not supported"):
            type(model).from_pretrained(tmp_path, attn_implementation="none")

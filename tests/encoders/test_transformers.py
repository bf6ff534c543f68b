"""S2SentModel: what from_encoder computes, and a saved and loaded model gives the same bits."""

from __future__ import annotations

import pytest
import torch
import transformers

from s2sent_kernels.capture import BlockCapture
from s2sent_kernels.transformers import S2SentModel

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

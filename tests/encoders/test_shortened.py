"""Layers removed from an encoder whose blocks are fused already: hidden states and indices stay those of the same blocks."""

import pytest
import torch
from builders import TEXTS, save_encoder

pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.modules import Transformer  # noqa: E402

from s2sent_kernels.sentence_transformers import S2SentPooling, load  # noqa: E402
from s2sent_kernels.transformers import S2SentModel  # noqa: E402

BLOCKS = (1, 3)
IDS = torch.tensor([[1, 5, 7, 3], [2, 9, 4, 8]])


def encoder_of():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertModel(config).eval()


def keep(encoder, kept):
    """As people cut encoders: a list of the layers that stay, and their number."""
    encoder.encoder.layer = torch.nn.ModuleList([encoder.encoder.layer[index] for index in kept])
    encoder.config.num_hidden_layers = len(kept)


@pytest.mark.parametrize("kept, now", [((0, 1, 3), [1, 2]), ((1, 2, 3), [0, 2]), ((1, 3), [0, 1]), (range(4), [1, 3])])
@torch.no_grad()
def test_a_model_is_saved_with_the_indices_of_its_blocks(kept, now, tmp_path):
    model = S2SentModel.from_encoder(encoder_of(), BLOCKS, bottleneck=4)
    keep(model.encoder, kept)
    wanted = model(IDS).embedding
    model.save_pretrained(tmp_path / "model")
    loaded = S2SentModel.from_pretrained(tmp_path / "model")
    assert loaded.config.blocks == now
    torch.testing.assert_close(loaded(IDS).embedding, wanted)


def sentence_transformer(folder):
    save_encoder(folder)  # its tokenizer
    encoder_of().save_pretrained(folder)
    transformer = Transformer(str(folder))
    pooling = S2SentPooling.behind(transformer, BLOCKS, bottleneck=4, frequencies=2)
    return SentenceTransformer(modules=[transformer, pooling], device="cpu").eval()


def test_a_sentence_transformer_too(tmp_path):
    model = sentence_transformer(tmp_path / "encoder")
    keep(model[0].auto_model, (1, 2, 3))
    wanted = model.encode(TEXTS)
    model.save(str(tmp_path / "model"))
    loaded = load(tmp_path / "model", device="cpu")
    assert loaded[1].blocks == [0, 2]
    torch.testing.assert_close(torch.from_numpy(loaded.encode(TEXTS)), torch.from_numpy(wanted))


@pytest.mark.parametrize("grad", [True, False])
def test_a_block_that_was_removed_is_named(tmp_path, grad):
    model = sentence_transformer(tmp_path / "encoder")
    keep(model[0].auto_model, (0, 1, 2))
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="block 3 never ran in this forward"):
        model(model.preprocess(TEXTS))
    with pytest.raises(ValueError, match="encoder: expected block 3, whose hidden states are fused"):
        model.save(str(tmp_path / "model"))
    with pytest.raises(RuntimeError, match="no call of the encoder was heard"):  # said once
        model[1](model.preprocess(TEXTS))


def test_a_model_without_one_of_its_blocks_is_not_saved(tmp_path):
    model = S2SentModel.from_encoder(encoder_of(), BLOCKS, bottleneck=4)
    keep(model.encoder, (0, 1, 2))
    with pytest.raises(RuntimeError, match="block 3 never ran"):
        model(IDS)
    with pytest.raises(
        ValueError, match="encoder: expected block 3, whose hidden states are fused, got BertModel without"
    ):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@torch.no_grad()
def test_a_wrapped_block_is_still_the_same(tmp_path):
    """As torch's checkpoint_wrapper and FSDP1 do."""
    model = S2SentModel.from_encoder(encoder_of(), BLOCKS, bottleneck=4)

    class Wrapper(torch.nn.Module):
        def __init__(self, wrapped):
            super().__init__()
            self.wrapped = wrapped

        def forward(self, *args, **kwargs):
            return self.wrapped(*args, **kwargs)

    layers = model.encoder.encoder.layer
    layers[1] = Wrapper(layers[1])
    assert model.capture.find_again() == BLOCKS


def test_shared_blocks_keep_their_indices():
    config = transformers.AlbertConfig(
        vocab_size=30,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
    )
    model = S2SentModel.from_encoder(transformers.AlbertModel(config), BLOCKS, bottleneck=4)
    assert model.capture.find_again() == BLOCKS

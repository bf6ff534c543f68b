"""Models that accelerate has offloaded: parameters are on the device "meta" until a module's ``forward`` is called."""

import copy

import pytest
import torch

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel  # noqa: E402

IDS = torch.tensor([[1, 5, 7, 3], [2, 9, 4, 8], [6, 6, 1, 2]])


def encoder_of():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertModel(config).eval()


@pytest.fixture
def model():
    return S2SentModel.from_encoder(encoder_of(), bottleneck=4, block_prior=True, gate_scale=4.0)


@pytest.mark.parametrize("options", [{}, {"output_tokens": True}, {"output_gates": True}])
@torch.no_grad()
def test_an_offloaded_model_gives_the_same(model, options):
    wanted = model(IDS, **options)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), "cpu", offload_buffers=True)
    assert offloaded.selector.block_prior.is_meta and offloaded.selector.down.weight.is_meta
    torch.testing.assert_close(tuple(offloaded(IDS, **options).values()), tuple(wanted.values()))
    assert offloaded.selector.block_prior.is_meta  # and no longer than the call


@torch.no_grad()
def test_a_selector_on_the_disk(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    places = {"encoder": "cpu", "selector": "disk"}
    loaded = S2SentModel.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    assert loaded.selector.block_prior.is_meta
    torch.testing.assert_close(loaded(IDS).embedding, model(IDS).embedding)


@torch.no_grad()
def test_a_classifier(model):
    classifier = S2SentForSequenceClassification.from_model(model, num_labels=3)
    wanted = classifier(IDS).logits
    torch.testing.assert_close(accelerate.cpu_offload(classifier, "cpu")(IDS).logits, wanted)


@torch.no_grad()
def test_a_fresh_selector_behind_an_offloaded_encoder_has_its_weights():
    torch.manual_seed(1)
    wanted = S2SentModel.from_encoder(encoder_of(), bottleneck=4)
    offloaded = accelerate.cpu_offload(encoder_of(), "cpu")
    assert offloaded.device.type == "meta"
    torch.manual_seed(0)
    encoder_of()  # as many numbers are drawn
    torch.manual_seed(1)
    model = S2SentModel.from_encoder(offloaded, bottleneck=4)
    assert all(tensor.device.type == "cpu" for tensor in model.selector.state_dict().values())
    model.selector.load_state_dict(wanted.selector.state_dict())
    torch.testing.assert_close(model(IDS).embedding, wanted(IDS).embedding)


def test_a_selector_stays_without_weights_beside_such_an_encoder():
    with torch.device("meta"):
        encoder = transformers.BertModel(encoder_of().config)
    model = S2SentModel.from_encoder(encoder, bottleneck=4)
    assert all(tensor.is_meta for tensor in model.selector.state_dict().values())

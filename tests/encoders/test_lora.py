"""LoRA (peft) on the encoder with the selector trained in full, by the recipe of docs/training.md."""

import pytest
import torch
from builders import save_encoder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers.base.modules import Transformer  # noqa: E402

from s2sent_kernels import consumers, loading, sources  # noqa: E402
from s2sent_kernels.embedder import Embedder  # noqa: E402
from s2sent_kernels.sentence_transformers import S2SentPooling, load  # noqa: E402
from s2sent_kernels.transformers import S2SentForSequenceClassification, S2SentModel  # noqa: E402

TEXTS = ["the cat sat on the mat", "a dog ran", "moon", "the old moon is bright"]
SELECTOR = {"bottleneck": 4, "block_prior": True, "gate_scale": 4.0}


def lora(**options):
    return peft.LoraConfig(target_modules=["query", "value"], r=2, lora_alpha=4, **options)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder)
    return folder


def inputs(encoder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    return tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)


def train(model, batch):
    """Two steps of what requires a gradient. Returns the model in eval mode."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        found = model(**batch)
        (found.loss if "labels" in batch else found.embedding.square().mean()).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def tuned(encoder, tmp_path_factory):
    """Folders "base" and "adapter", the tuned model, and its embeddings."""
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    model = S2SentModel.from_encoder(encoder, None, **SELECTOR)
    model.save_pretrained(folder / "base")
    wrapped = train(peft.get_peft_model(model, lora(modules_to_save=["selector"])), inputs(encoder))
    wrapped.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return folder, wrapped, wrapped(**inputs(encoder)).embedding


def adapted(folder):
    return peft.PeftModel.from_pretrained(S2SentModel.from_pretrained(folder / "base"), folder / "adapter").eval()


def test_the_selector_is_trained_in_full_and_the_encoder_in_its_adapters(tuned):
    folder, wrapped, _ = tuned
    before, after = S2SentModel.from_pretrained(folder / "base").state_dict(), wrapped.state_dict()
    for name, tensor in before.items():
        if name.startswith("selector."):  # block prior, gate scale and the running statistics among them
            now = after[f"base_model.model.selector.modules_to_save.default.{name.removeprefix('selector.')}"]
            assert not torch.equal(now, tensor), name
        else:
            kept = f"base_model.model.{name}"
            kept = (
                kept
                if kept in after
                else kept.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
            )
            assert torch.equal(after[kept], tensor), name


@torch.no_grad()
@pytest.mark.parametrize("share", [None, 0], ids=["kept", "streamed"])
def test_an_adapter_comes_back_with_the_same_bits(tuned, encoder, monkeypatch, share):
    if share is not None:
        monkeypatch.setattr(consumers, "KEPT_SHARE", share)
    folder, wrapped, expected = tuned
    found = adapted(folder)(**inputs(encoder)).embedding
    assert torch.equal(found, wrapped(**inputs(encoder)).embedding)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_merged_it_is_a_model_as_any_other(tuned, encoder, tmp_path):
    folder, _, expected = tuned
    merged = adapted(folder).merge_and_unload()
    assert type(merged) is S2SentModel
    torch.testing.assert_close(merged(**inputs(encoder)).embedding, expected)
    merged.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    loaded = S2SentModel.from_pretrained(tmp_path)
    assert loaded.missing_weights == loaded.unexpected_weights == []
    assert torch.equal(loaded(**inputs(encoder)).embedding, merged(**inputs(encoder)).embedding)
    embedder = Embedder.from_pretrained(tmp_path, dtype="float32", device="cpu")
    torch.testing.assert_close(torch.as_tensor(embedder.encode(TEXTS)), expected, rtol=1e-4, atol=1e-5)


def test_saved_without_merging_it_is_no_model(tuned, tmp_path):
    tuned[1].get_base_model().save_pretrained(tmp_path)
    with pytest.raises(
        sources.LoadError, match=r"expected weights 'encoder\.encoder\.layer\.0\.attention\.self\.query\."
    ):
        loading.load_saved(str(tmp_path))


def test_a_classifier_with_its_head(encoder, tmp_path):
    torch.manual_seed(0)
    model = S2SentForSequenceClassification.from_encoder(encoder, None, num_labels=2, **SELECTOR)
    batch = {**inputs(encoder), "labels": torch.tensor([0, 1, 0, 1])}
    before = model.classifier.weight.clone()
    wrapped = train(peft.get_peft_model(model, lora(modules_to_save=["selector", "classifier"])), batch)
    with torch.no_grad():
        expected = wrapped(**inputs(encoder)).logits
        merged = wrapped.merge_and_unload()
        assert not torch.equal(merged.classifier.weight, before)
        merged.save_pretrained(tmp_path)
        found = S2SentForSequenceClassification.from_pretrained(tmp_path)(**inputs(encoder)).logits
    torch.testing.assert_close(found, expected)


def test_within_a_sentence_transformer(encoder, tmp_path):
    torch.manual_seed(0)
    transformer = Transformer(str(encoder))
    pooling = S2SentPooling.behind(transformer, None, **SELECTOR)
    model = sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu")
    wrapped = peft.get_peft_model(model[0].auto_model, lora())
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("1.selector.") for name in wanted)
    assert {f"1.selector.{name}" for name, _ in pooling.selector.named_parameters()} < wanted
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = model.encode(TEXTS, convert_to_tensor=True)
    wrapped.merge_and_unload()
    model.save(str(tmp_path))
    torch.testing.assert_close(load(tmp_path, device="cpu").encode(TEXTS, convert_to_tensor=True), expected)

